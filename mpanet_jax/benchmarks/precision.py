"""Whether training in bfloat16 follows training in float32: the same batches, from several nearby starts."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mpanet_jax.data.pipeline import TrainFeed
from mpanet_jax.experiment import check_config, initial_variables, load_split
from mpanet_jax.parallel import Parallel, all_devices, global_num_ids
from mpanet_jax.train import calls, initial_state, make_feed, make_train_steps, stack_batches

DTYPES = ("float32", "bfloat16")


def benchmark_precision(
    config: ConfigDict, *, num_steps: int = 200, num_starts: int = 4, window: int = 20
) -> dict[str, Any]:
    """Train `num_steps` steps in float32 and in bfloat16, with the same batches and draws.

    The first steps from a random network amplify every rounding, so two runs in float32 come apart too. Therefore each
    type is trained from the same `num_starts` starts, the random network and copies of it whose parameters are off by
    one in a million, and the means over the starts are compared.

    Args:
      config: the run; its data set has to be prepared, or config.dataset.source named. config.dtype is not read.
      num_steps: of each run; at most those of config.train.num_epochs.
      num_starts: runs of each type.
      window: the loss curves are smoothed by the mean over so many steps.

    Returns:
      largest_difference: of the mean curves, relative to that of float32.
      final_difference: that of the last `window` steps.
      spread_float32, spread_bfloat16: the largest relative difference of a single curve from its type's mean; with one
        start there are none. The means are uncertain by about spread/√num_starts.
      loss_float32, loss_bfloat16: the mean curves, over consecutive windows.
      steps, window, starts.
    """
    config = ConfigDict(config.to_dict())
    config.init_from = ""
    check_config(config)
    parallel = all_devices(config.parallel)
    num_ids_per_batch = global_num_ids(config.data.num_ids_per_batch, parallel.num_devices, config.batch_scale)
    split = load_split(config, "train")
    feed = make_feed(config, split, parallel, num_ids_per_batch)
    num_steps = min(num_steps, config.train.num_epochs * feed.steps_per_epoch)
    window = min(window, num_steps)
    first_batch = feed.batches.get_state()
    curves = {}
    try:
        for dtype in DTYPES:
            config.dtype = dtype
            variables = jax.device_get(initial_variables(config, split.num_ids))
            run_steps = make_train_steps(config, split.num_ids, feed.steps_per_epoch, parallel)
            of_starts = []
            for start in range(num_starts):
                feed.batches.set_state(first_batch)
                losses = _losses(config, parallel, feed, _start(variables, start), run_steps, num_steps)
                of_starts.append(np.convolve(losses, np.full(window, 1 / window), mode="valid"))
            curves[dtype] = np.array(of_starts)
    finally:
        feed.batches.close()
    means = {dtype: curve.mean(0) for dtype, curve in curves.items()}
    difference = np.abs(means["bfloat16"] / means["float32"] - 1)
    return {
        "largest_difference": float(difference.max()),
        "final_difference": float(difference[-1]),
        **{f"spread_{name}": float(np.abs(curves[name] / means[name] - 1).max()) for name in DTYPES if num_starts > 1},
        **{f"loss_{dtype}": means[dtype][::window].tolist() for dtype in DTYPES},
        "steps": num_steps,
        "window": window,
        "starts": num_starts,
    }


def _start(variables: dict[str, Any], number: int) -> dict[str, Any]:
    """The variables as they are (0), or with parameters off by one in a million."""
    if number == 0:
        return variables
    rng = np.random.default_rng(number)
    params = jax.tree.map(
        lambda a: (a * (1 + 1e-6 * rng.standard_normal(a.shape))).astype(a.dtype), variables["params"]
    )
    return {**variables, "params": params}


def _losses(
    config: ConfigDict, parallel: Parallel, feed: TrainFeed, variables: dict[str, Any], run_steps: Any, num_steps: int
) -> list[float]:
    """The total loss of every step."""
    state = parallel.replicate(initial_state(config, variables, feed.steps_per_epoch))
    losses = []
    for before, after in calls(0, num_steps, 1 if feed.images is None else config.train.steps_per_call, ()):
        state, metrics = run_steps(state, stack_batches(feed.batches, after - before), feed.images)
        losses.extend(jax.device_get(metrics["loss"]).tolist())
    return losses
