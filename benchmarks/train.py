"""How fast training is from end to end: feed, steps, logging and checkpoints, as `scripts/train.py` runs them."""

import contextlib
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.step import benchmark_step
from mpanet_jax import datasets
from mpanet_jax.errors import UserError
from mpanet_jax.loop import train
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import compute_dtype
from mpanet_jax.parallel import all_devices
from mpanet_jax.run_setup import make_feed
from mpanet_jax.settings import Settings, replace

RECIPE_IMAGES = 140 * 183 * 128  # SYSU-MM01: epochs, steps, images a step


class _EnoughError(Exception):
    """Ends a training run from within."""


def benchmark_train(settings: Settings, folder: Path, *, num_steps: int | None = None) -> dict[str, Any]:
    """Run `train` for some steps in a temporary workdir below `folder`, then `benchmark_step` in the same process.

    The first call and all in which a program was compiled are left out (seconds_compiling says for how long one was);
    everything else that the loop does counts, checkpoints and logs among it. Nothing is evaluated.

    Args:
      settings: the run; its data set has to be prepared, or config.dataset.source named.
      folder: where the temporary workdir is made: a place on the disk that runs are written to.
      num_steps: steps to train; by default a tenth of the config's epochs.

    Returns:
      images_per_second: of all timed steps together; median_ms, p10_ms, p90_ms: of a step, by calls.
      share_of_step: over step_images_per_second, which `benchmark_step` has measured.
      seconds_to_first_step: from the start of this process until the first call's metrics were there.
      recipe_minutes: SYSU-MM01's 140 epochs x 183 steps x 128 images at this rate.
      timed_steps, timed_seconds, seconds_compiling, checkpoints: what the rate is made of.
      cache: where the images were; programs_from_cache: compiled programs that the compilation cache held.
    """
    settings = replace(settings, {"init_from": "", "train.eval_every_epochs": 0})
    split = datasets.open_split(settings.dataset, "train")
    feed = make_feed(make_method(settings), split, all_devices(settings.parallel))
    batch_size, steps_per_epoch, cache = feed.batch_size, feed.steps_per_epoch, feed.cache
    if num_steps is None:
        num_steps = -(-settings.train.num_epochs // 10) * steps_per_epoch
    num_steps = min(num_steps, settings.train.num_epochs * steps_per_epoch)
    num_bytes = len(split) * settings.data.height * settings.data.width * 3

    compiled = measure.CompileLog()
    finished: list[tuple[int, float]] = []
    to_first_step = None

    def on_steps(step: int, finished_at: float) -> None:
        nonlocal to_first_step
        finished.append((step, finished_at))
        since = time.perf_counter() - finished_at
        to_first_step = to_first_step or measure.seconds_since_process_start() - since
        if step >= num_steps:
            raise _EnoughError

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="train-", dir=folder) as workdir, contextlib.suppress(_EnoughError):
        train(settings, Path(workdir), feed=feed, on_steps=on_steps)
    peak = measure.peak_device_memory_gib()
    feed.batches.close()
    del feed  # and with it the images: the step alone has its own

    timed, compiling = _timed_calls(finished, compiled.times)
    steps, seconds = timed.sum(axis=0)
    rate = float(steps * batch_size / seconds)
    checkpoint_every = settings.train.checkpoint_every_epochs * steps_per_epoch
    step_results = benchmark_step(settings, num_steps=min(num_steps, 240))
    return {
        **measure.rates(timed[:, 1] / timed[:, 0], batch_size),
        "images_per_second": rate,
        "step_images_per_second": step_results["images_per_second"],
        "share_of_step": rate / step_results["images_per_second"],
        "recipe_minutes": RECIPE_IMAGES / rate / 60,
        "seconds_to_first_step": to_first_step,
        "programs_from_cache": compiled.from_cache,
        "timed_steps": int(steps),
        "timed_seconds": float(seconds),
        "seconds_compiling": compiling,
        "checkpoints": num_steps // checkpoint_every if checkpoint_every else 0,
        "steps_per_epoch": steps_per_epoch,
        "batch_size": batch_size,
        "dtype": compute_dtype(settings.dtype).name,
        "cache": cache,
        "images": len(split),
        "peak_gib": peak,
        "image_set_gib": num_bytes / 2**30,
    }


def _timed_calls(finished: list[tuple[int, float]], compiled: list[float]) -> tuple[np.ndarray, float]:
    """(steps, seconds) of the calls in which nothing was compiled, and the seconds of those in which something was.

    Without the first, which compiles the step.
    """
    timed, compiling = [], 0.0
    for (before, start), (after, end) in itertools.pairwise(finished):
        if any(start < moment <= end for moment in compiled):
            compiling += end - start
        else:
            timed.append((after - before, end - start))
    if not timed:
        raise UserError(
            "--steps: too few, there is no call behind the first in which nothing was compiled; train for more steps "
            "(config.train.steps_per_call are one call where images are in device memory)"
        )
    return np.array(timed), compiling
