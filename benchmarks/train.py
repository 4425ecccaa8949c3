"""Measures training from end to end: feed, steps, logging and checkpoints, as `scripts/train.py` runs them."""

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
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace

RECIPE_IMAGES = 140 * 183 * 128  # SYSU-MM01: epochs, steps, images a step


class _EnoughError(Exception):
    """Raised in a training run to end it."""


def benchmark_train(settings: Settings, folder: Path, *, num_steps: int | None = None) -> dict[str, Any]:
    """Run `train` for some steps in a temporary workdir below `folder`, then `benchmark_step` in the same process.

    The first call and every call during which a program was compiled are left out (seconds_compiling is their time).
    Everything else that the loop does counts, including checkpoints and logs. Nothing is evaluated.

    Args:
      settings: the run; its data set must be prepared, or config.dataset.source given.
      folder: the temporary workdir is made here; choose the disk that runs are written to.
      num_steps: steps to train; None: a tenth of the config's epochs.

    Returns:
      images_per_second: over all timed steps; median_ms, p10_ms, p90_ms: of a step, from the times of calls; tenths_ms:
        the medians of ten parts of the run, in their order.
      share_of_step: images_per_second / step_images_per_second, the latter measured by `benchmark_step`.
      seconds_to_first_step: from the start of this process until the first call's metrics are known.
      recipe_minutes: SYSU-MM01's 140 epochs x 183 steps x 128 images at this rate.
      timed_steps, timed_seconds: what the rate is computed from; seconds_compiling; checkpoints: how many were saved.
      cache: where the images were; programs_from_cache: how many compiled programs came from the compilation cache.

    Raises:
      UserError: in every call after the first a program was compiled; train for more steps.
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
    del feed  # and its images: `benchmark_step` has its own

    timed, compiling = _timed_calls(finished, compiled.times)
    steps, seconds = timed.sum(axis=0)
    rate = float(steps * batch_size / seconds)
    checkpoint_every = settings.train.checkpoint_every_epochs * steps_per_epoch
    step_results = benchmark_step(settings, num_steps=min(num_steps, 240))
    return {
        **measure.rates(timed[:, 1] / timed[:, 0], batch_size),
        "tenths_ms": measure.tenths_ms(timed[:, 1] / timed[:, 0]),
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
    """(steps, seconds) of each call during which nothing was compiled, and the total seconds of the others.

    The first call, which compiles the step, is in neither.
    """
    timed, compiling = [], 0.0
    for (before, start), (after, end) in itertools.pairwise(finished):
        if any(start < moment <= end for moment in compiled):
            compiling += end - start
        else:
            timed.append((after - before, end - start))
    if not timed:
        raise UserError(
            "--steps: too few, something was compiled in every call after the first; train for more steps (a call is "
            "config.train.steps_per_call steps, or fewer if the images are not in device memory)"
        )
    return np.array(timed), compiling
