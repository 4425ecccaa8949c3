"""How fast training is from end to end: feed, steps, logging and checkpoints, as `scripts/train.py` runs them."""

import contextlib
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mpanet_jax.benchmarks import measure
from mpanet_jax.benchmarks.step import benchmark_step
from mpanet_jax.data.cache import choose_cache, open_cache
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.errors import UserError
from mpanet_jax.experiment import cache_dir, check_config, compute_dtype, load_split
from mpanet_jax.parallel import all_devices, global_num_ids
from mpanet_jax.train import train

RECIPE_IMAGES = 140 * 183 * 128  # SYSU-MM01: epochs, steps, images a step


class _EnoughError(Exception):
    """Ends a training run from within."""


def benchmark_train(config: ConfigDict, folder: Path, *, num_steps: int | None = None) -> dict[str, Any]:
    """Run `train` for some steps in a temporary workdir below `folder`, then `benchmark_step` in the same process.

    The first call and all in which a program was compiled are left out (seconds_compiling says for how long one was);
    everything else that the loop does counts, checkpoints and logs among it. Nothing is evaluated.

    Args:
      config: the run; its data set has to be prepared, or config.dataset.source named.
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
    config = ConfigDict(config.to_dict())
    config.init_from, config.train.eval_every_epochs = "", 0
    check_config(config)
    num_ids = global_num_ids(
        config.data.num_ids_per_batch, all_devices(config.parallel).num_devices, config.batch_scale
    )
    batch_size = num_ids * config.data.images_per_id
    split = load_split(config, "train")
    steps_per_epoch = BatchPlan(
        split.pids, split.modality, num_ids, config.data.images_per_id, config.seed
    ).steps_per_epoch
    if num_steps is None:
        num_steps = -(-config.train.num_epochs // 10) * steps_per_epoch
    num_steps = min(num_steps, config.train.num_epochs * steps_per_epoch)
    num_bytes = len(split) * config.data.height * config.data.width * 3
    built = open_cache(split, config.data.height, config.data.width, cache_dir(config)) is not None
    config.data.cache = choose_cache(config.data.cache, num_bytes, cache_dir(config), built=built)

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
        train(config, Path(workdir), on_steps=on_steps)
    peak = measure.peak_device_memory_gib()

    timed, compiling = _timed_calls(finished, compiled.times)
    steps, seconds = timed.sum(axis=0)
    rate = float(steps * batch_size / seconds)
    checkpoint_every = config.train.checkpoint_every_epochs * steps_per_epoch
    step_results = benchmark_step(config, num_steps=min(num_steps, 240))
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
        "dtype": compute_dtype(config.dtype).name,
        "cache": config.data.cache,
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
