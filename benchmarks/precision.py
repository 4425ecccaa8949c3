"""Measures how closely training in bfloat16 follows training in float32, on the same batches, from several starts."""

from typing import Any

import jax
import numpy as np

from mpanet_jax import datasets
from mpanet_jax.call_plan import cut_into_calls, most_steps_of_a_call, stack_batches
from mpanet_jax.data.pipeline import TrainFeed
from mpanet_jax.device_resize import DeviceResize
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method
from mpanet_jax.parallel import Parallel, all_devices
from mpanet_jax.run_setup import initial_state, make_feed, make_train_steps
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.weights.convert import initial_variables

DTYPES = ("float32", "bfloat16")


def benchmark_precision(
    settings: Settings, *, num_steps: int = 200, num_starts: int = 4, window: int = 20
) -> dict[str, Any]:
    """Train in float32 and in bfloat16 with the same batches and random draws, and compare the loss curves.

    The first steps from a random network amplify every rounding, so two runs in float32 diverge too. Therefore each
    type is trained from the same `num_starts` starts, a random network and copies of it with relative changes of 1e-6
    in the parameters, and the means over the starts are compared.

    Args:
      settings: the run; its data set must be prepared, or config.dataset.source given. dtype is not read.
      num_steps: steps of each run; at most those of train.num_epochs.
      num_starts: runs of each type.
      window: loss curves are smoothed by a moving mean over this many steps.

    Returns:
      largest_difference: the largest difference of the mean curves, relative to that of float32.
      final_difference: their relative difference over the last `window` steps.
      spread_float32, spread_bfloat16: the largest relative difference of a single curve from its type's mean; absent
        with a single start. The means are uncertain by about spread/√num_starts.
      loss_float32, loss_bfloat16: the mean curves, one value for each window of steps.
      steps, window, starts: as used.
    """
    settings = replace(settings, {"init_from": ""})
    parallel = all_devices(settings.parallel)
    split = datasets.open_split(settings.dataset, "train")
    feed = make_feed(make_method(settings), split, parallel)
    num_steps = min(num_steps, settings.train.num_epochs * feed.steps_per_epoch)
    window = min(window, num_steps)
    first_batch = feed.batches.get_state()
    curves = {}
    try:
        for dtype in DTYPES:
            method = make_method(replace(settings, {"dtype": dtype}))
            variables = jax.device_get(initial_variables(method, split.num_ids))
            run_steps = make_train_steps(method, split.num_ids, feed.steps_per_epoch, parallel)
            of_starts = []
            for start in range(num_starts):
                feed.batches.set_state(first_batch)
                losses = _losses(method, parallel, feed, _start(variables, start), run_steps, num_steps)
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
    """The variables as they are (number 0), or with relative changes of 1e-6 in the parameters."""
    if number == 0:
        return variables
    rng = np.random.default_rng(number)
    params = jax.tree.map(
        lambda a: (a * (1 + 1e-6 * rng.standard_normal(a.shape))).astype(a.dtype), variables["params"]
    )
    return {**variables, "params": params}


def _losses(
    method: Method, parallel: Parallel, feed: TrainFeed, variables: dict[str, Any], run_steps: Any, num_steps: int
) -> list[float]:
    """The total loss of every step."""
    state = parallel.replicate(initial_state(method, variables, feed.steps_per_epoch))
    losses, resize = [], DeviceResize.of(method.settings.data, parallel)
    steps_per_call = most_steps_of_a_call(method.settings.train.steps_per_call, feed.sent_bytes)
    for before, after in cut_into_calls(0, num_steps, steps_per_call, ()):
        state, metrics = run_steps(state, resize(stack_batches(feed.batches, after - before)), feed.images)
        losses.extend(jax.device_get(metrics["loss"]).tolist())
    return losses
