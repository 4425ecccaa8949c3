"""How seconds and memory grow with the size of what is asked for: one table a command, with the exponents that fit it.

Every size is measured in processes of its own, so that its peak memory is its own and one that does not fit ends alone.
"""

import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.evaluation import anonymous_memory_gib
from benchmarks.gallery import benchmark_gallery
from benchmarks.search import benchmark_search
from benchmarks.step import benchmark_step
from mpanet_jax import datasets
from mpanet_jax.compilation import set_compilation_cache
from mpanet_jax.data.cache import CACHE_MODES, open_images
from mpanet_jax.data.pipeline import train_feed
from mpanet_jax.datasets.own import CSV_FILE
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import UserError
from mpanet_jax.methods import make_method
from mpanet_jax.modality import MODALITY_NAMES
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace

SIZES = {
    "batch": (32, 64, 128, 256, 512),  # a device
    "devices": (1, 2),
    "images": (2_000, 6_000, 20_000, 60_000, 200_000),  # of training
    "ids": (395, 1_000, 3_000, 10_000),
    "gallery": (1_000, 3_000, 10_000, 30_000, 100_000),
}
NUM_IDS = 100  # of the training images, however many
IMAGES_OF_AN_ID = 20  # of the identities, however many
_BATCHES = 20  # timed, out of each cache
_FOLDER_IMAGES = 1000  # in a folder of drawn images


@dataclass(frozen=True)
class Asked:
    """What all sizes of a table share.

    Attributes:
      settings: the run whose step, images or batches are measured.
      folder: for temporary files, removed afterwards.
      num_steps: timed steps; None: as many as `benchmark_step` times.
      num_query, dimension, rerank: of the gallery.
      compiler_options: of XLA, for the step's program alone.
    """

    settings: Settings
    folder: Path
    num_steps: int | None = None
    num_query: int = 1000
    dimension: int = 2048
    rerank: bool = False
    compiler_options: dict[str, str | bool] | None = None


def benchmark_growth(
    over: str,
    asked: Asked,
    sizes: Sequence[int] = (),
    on_row: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Measure every size of a table, and fit an exponent to each of its columns.

    Args:
      over: 'batch': the whole step, by images a device; 'devices': by devices, config.data.num_ids_per_batch on each;
        'images': preparing training images of config.data.height × width, caching them, starting out of each cache,
        a batch out of it; 'ids': planning an epoch, and on an accelerator the step, by training identities with 20
        images each;
        'gallery': evaluation and search, or with `rerank` evaluation re-ranked, by gallery images.
      asked: what is the same for all sizes.
      sizes: two or more; those of SIZES by default.
      on_row: told the results so far whenever a size is done, so that a run that is cut off leaves them.

    Returns:
      over; rows: for each size a dict with it and its figures, of which …seconds are by the clock, …cpu_seconds those
      that this process's CPUs worked, …gib memory that the part added; exponents: b of the least-squares fit
      log y = a + b·log size, for columns of positive numbers; last_exponents: that of the two largest sizes alone,
      where what does not grow weighs least.

    Raises:
      UserError: fewer than two sizes, or one that cannot be.
    """
    sizes = sorted(set(sizes or SIZES[over]))
    if len(sizes) < 2:
        raise UserError(f"--sizes={','.join(map(str, sizes))}: expected two or more, to see how cost grows")
    results: dict[str, Any] = {"over": over, "rows": []}
    for size in sizes:
        results["rows"].append({over: size, **_PARTS[over](size, asked)})
        if len(results["rows"]) > 1:
            results |= {"exponents": exponents(results["rows"]), "last_exponents": exponents(results["rows"][-2:])}
        on_row(results)
    return results


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """b of log y = a + b·log x by least squares, x the rows' first value, for every other one that is always > 0."""
    size, *columns = rows[0]
    return {
        name: float(np.polyfit(np.log([row[size] for row in rows]), np.log([row[name] for row in rows]), 1)[0])
        for name in columns
        if all(isinstance(row[name], int | float) and row[name] > 0 for row in rows)
    }


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, a module's function, in a process that ends with it. It has our compilation cache."""
    spawn, cache = multiprocessing.get_context("spawn"), jax.config.jax_compilation_cache_dir
    with ProcessPoolExecutor(1, spawn, initializer=set_compilation_cache, initargs=(cache,)) as pool:
        return pool.submit(function, *arguments).result()


# ---- the step ----


def _batch(size: int, asked: Asked) -> dict[str, Any]:
    num_ids, rest = divmod(size, asked.settings.data.images_per_id)
    if rest or not num_ids:
        raise UserError(
            f"--sizes: a batch of {size} is no whole number of identities with config.data.images_per_id = "
            f"{asked.settings.data.images_per_id} images"
        )
    changes = {"data.num_ids_per_batch": num_ids, "batch_scale": "per_device"}
    return in_new_process(_step, dataclasses.replace(asked, settings=replace(asked.settings, changes)), {})


def _devices(size: int, asked: Asked) -> dict[str, Any]:
    per_device = replace(asked.settings, {"batch_scale": "per_device"})
    return in_new_process(_step, dataclasses.replace(asked, settings=per_device), {"num_devices": size})


def _step(asked: Asked, options: dict[str, int]) -> dict[str, Any]:
    steps = {"num_steps": asked.num_steps} if asked.num_steps else {}
    results = benchmark_step(asked.settings, **steps, **options, compiler_options=asked.compiler_options)
    names = ("images_per_second", "median_ms", "host_cpu_ms", "compile_seconds")
    return {name: results[name] for name in names} | {"step_gib": results["peak_gib"] - results["image_set_gib"]}


# ---- identities ----


def _ids(size: int, asked: Asked) -> dict[str, Any]:
    row = in_new_process(_plan, size, asked.settings)
    # A CPU would compile the step of each size for longer than all the rest takes.
    if in_new_process(measure.has_accelerator):
        step = in_new_process(_step, asked, {"num_ids": size})
        row |= {name: step[name] for name in ("median_ms", "host_cpu_ms", "step_gib")}
    return row


def _plan(num_ids: int, settings: Settings) -> dict[str, Any]:
    images = np.arange(num_ids * IMAGES_OF_AN_ID, dtype=np.int32)
    pids, modality, data = images % num_ids, images // num_ids % 2, settings.data
    method = make_method(settings)

    def plan() -> int:
        plan = method.batch_plan(pids, modality, data.num_ids_per_batch)
        plan.epoch(0)
        return plan.steps_per_epoch

    values, steps = _measured("plan", plan)
    return values | {"plan_batch_ms": values["plan_cpu_seconds"] / steps * 1e3}


# ---- training images ----


def _images(size: int, asked: Asked) -> dict[str, Any]:
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=asked.folder) as folder:
        in_new_process(_draw, Path(folder, "raw"), size, asked.settings.data.height, asked.settings.data.width)
        dataset = datasets.settings_of({"name": "own", "source": f"{folder}/raw", "data_dir": f"{folder}/prepared"})
        settings = replace(asked.settings, {"dataset": dataset})
        row = in_new_process(_prepare, settings) | in_new_process(_build_cache, settings, f"{folder}/cache")
        for cache in CACHE_MODES:
            row |= in_new_process(_start, replace(settings, {"data.cache": cache}), f"{folder}/cache")
        return row


def _draw(source: Path, number: int, height: int, width: int) -> None:
    """A data set of one's own: `number` training images, as many of each modality, and a few for the test."""
    rng = np.random.default_rng(0)
    lines = ["path,pid,camid,modality,split"]
    for image in range(number + 8):
        folder, part = f"{image // _FOLDER_IMAGES:04d}", "train" if image < number else "test"
        pid = image % NUM_IDS if part == "train" else NUM_IDS + image % 2
        modality = image // NUM_IDS % 2 if part == "train" else image // 2 % 2
        (source / folder).mkdir(parents=True, exist_ok=True)
        path = f"{folder}/{image % _FOLDER_IMAGES:03d}.jpg"
        coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(source / path)
        lines.append(f"{path},{pid},{modality},{MODALITY_NAMES[modality]},{part}")
    (source / CSV_FILE).write_text("\n".join(lines) + "\n")


def _prepare(settings: Settings) -> dict[str, Any]:
    return _measured("prepare", lambda: datasets.open_split(settings.dataset, "train"))[0]


def _build_cache(settings: Settings, cache_dir: str) -> dict[str, Any]:
    split = datasets.open_split(settings.dataset, "train")
    data = dataclasses.replace(settings.data, cache="host")
    return _measured("cache", lambda: open_images(split, data, cache_dir))[0]


def _start(settings: Settings, cache_dir: str) -> dict[str, Any]:
    """From the prepared data to the first batch, the check of the cache among it; and the batches after it."""
    method, cache = make_method(settings), settings.data.cache
    data = dataclasses.replace(settings.data, num_workers=0)
    measure.has_accelerator()  # takes it, which is no part of the start

    def start() -> tuple[Split, Any]:
        split = datasets.open_split(settings.dataset, "train")
        plan = method.batch_plan(split.pids, split.modality, data.num_ids_per_batch)
        feed = train_feed(split, plan, data, num_epochs=1000, cache_dir=cache_dir)
        next(feed.batches)
        feed.require_sound_images()
        jax.block_until_ready(feed.images)
        return split, feed

    row, (_, feed) = _measured(f"{cache}_start", start)
    started = measure.cpu_seconds()
    for _ in range(_BATCHES):
        next(feed.batches)
    row[f"{cache}_batch_cpu_ms"] = (measure.cpu_seconds() - started) / _BATCHES * 1e3
    if cache == "device" and measure.has_accelerator():
        row["device_memory_gib"] = measure.peak_device_memory_gib()
    feed.batches.close()
    return row


# ---- gallery ----


def _gallery(size: int, asked: Asked) -> dict[str, Any]:
    asked.folder.mkdir(parents=True, exist_ok=True)
    part = "rerank" if asked.rerank else "evaluate"
    found = in_new_process(_evaluate, size, asked)
    row = {f"{part}_{name}": found[name] for name in ("seconds", "cpu_seconds", "added_gib")}
    if not asked.rerank:
        found = in_new_process(_search, size, asked)
        row |= {f"search_{name}": found[name] for name in ("seconds", "cpu_seconds", "added_gib")}
    return row


def _evaluate(size: int, asked: Asked) -> dict[str, Any]:
    options = {"rerank": asked.rerank, "on_device": measure.has_accelerator()}
    return benchmark_gallery(size, asked.num_query, asked.dimension, **options)


def _search(size: int, asked: Asked) -> dict[str, Any]:
    options = {"num_query": asked.num_query, "dimension": asked.dimension, "on_device": measure.has_accelerator()}
    return benchmark_search(asked.folder, num_gallery=size, **options)


_PARTS = {"batch": _batch, "devices": _devices, "images": _images, "ids": _ids, "gallery": _gallery}


def _measured(name: str, function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds, CPU seconds and peak memory (without mapped files) that a call adds, and what it returns."""
    before = anonymous_memory_gib()
    with measure.peak_anonymous_memory_gib() as peak:
        cpu, clock = measure.cpu_seconds(), time.perf_counter()
        value = function()
        seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": measure.cpu_seconds() - cpu}
    return {f"{name}_{key}": figure for key, figure in (seconds | {"gib": peak[0] - before}).items()}, value
