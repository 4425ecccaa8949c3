"""Whether training in bfloat16 follows training in float32: two runs of the same batches from the same start."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mpanet_jax.data.pipeline import TrainFeed
from mpanet_jax.experiment import check_config, initial_variables, load_split
from mpanet_jax.parallel import Parallel, all_devices, global_num_ids
from mpanet_jax.train import calls, initial_state, make_feed, make_train_steps, stack_batches

DTYPES = ("float32", "bfloat16")


def benchmark_precision(config: ConfigDict, *, num_steps: int = 200, window: int = 20) -> dict[str, Any]:
    """Train `num_steps` steps in float32 and in bfloat16 from the same random network, with the same batches and draws.

    Args:
      config: the run; its data set has to be prepared, or config.dataset.source named. config.dtype is not read.
      num_steps: of each run; at most those of config.train.num_epochs.
      window: the loss curves are smoothed by the mean over so many steps.

    Returns:
      largest_difference: of the smoothed curves, relative to that of float32.
      final_difference: that of the last `window` steps.
      loss_float32, loss_bfloat16: the means over consecutive windows.
      steps, window.
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
    start = feed.batches.get_state()
    try:
        curves = {}
        for dtype in DTYPES:
            config.dtype = dtype
            feed.batches.set_state(start)
            losses = _losses(config, parallel, feed, split.num_ids, num_steps)
            curves[dtype] = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    finally:
        feed.batches.close()
    difference = np.abs(curves["bfloat16"] / curves["float32"] - 1)
    return {
        "largest_difference": float(difference.max()),
        "final_difference": float(difference[-1]),
        **{f"loss_{dtype}": curves[dtype][::window].tolist() for dtype in DTYPES},
        "steps": num_steps,
        "window": window,
    }


def _losses(config: ConfigDict, parallel: Parallel, feed: TrainFeed, num_ids: int, num_steps: int) -> list[float]:
    """The total loss of every step from the start."""
    state = parallel.replicate(initial_state(config, initial_variables(config, num_ids), feed.steps_per_epoch))
    run_steps = make_train_steps(config, num_ids, feed.steps_per_epoch, parallel)
    losses = []
    for before, after in calls(0, num_steps, 1 if feed.images is None else config.train.steps_per_call, ()):
        state, metrics = run_steps(state, stack_batches(feed.batches, after - before), feed.images)
        losses.extend(jax.device_get(metrics["loss"]).tolist())
    return losses
