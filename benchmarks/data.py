"""Measures how fast images reach the network: a plain Pillow loop, its parts, streaming, and the host cache."""

import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from mpanet_jax import datasets
from mpanet_jax.cpus import available_cpus
from mpanet_jax.data.cache import open_images
from mpanet_jax.data.decode import decode_rgb, pixels_of
from mpanet_jax.data.grain_batches import choose_num_workers
from mpanet_jax.data.pipeline import TrainFeed, train_feed
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.datasets.schema import Split
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.settings import DataSettings, Settings
from mpanet_jax.settings_base import replace


def benchmark_dataset(settings: Settings, *, num_images: int = 1000, num_batches: int = 12) -> dict[str, float | str]:
    """Run `benchmark_data` on the training split of the settings' data set, or on a small synthetic one.

    The synthetic one is used if the data set is not prepared and dataset.source is empty. If dataset.source names a raw
    folder, it is prepared anew in a temporary folder, and the result has 'preparation': images/s of wall-clock time on
    all cores, over both splits; every image is decoded for verification and then written.

    Args:
      settings: the run's settings; only data set, data settings and seed are read.
      num_images, num_batches: as for `benchmark_data`.

    Returns:
      'data_set', what was measured; 'preparation', see above; and what `benchmark_data` gives.

    Raises:
      UserError: dataset.source cannot be prepared.
    """
    dataset = settings.dataset
    with tempfile.TemporaryDirectory() as folder:
        prepared = datasets.is_prepared(dataset)
        drawn = not (dataset.source or prepared)
        if drawn:
            settings = replace(settings, {"dataset.source": f"{folder}/raw"})
            # Enough for some batches; the images have the size of the small synthetic set.
            write_dataset(dataset.name, f"{folder}/raw", num_train_ids=40, num_test_ids=2)
        preparation = {}
        if settings.dataset.source:
            settings = replace(settings, {"dataset.data_dir": f"{folder}/prepared"})
            started = time.perf_counter()
            num_prepared = sum(len(datasets.open_split(settings.dataset, split)) for split in ("train", "test"))
            preparation = {"preparation": num_prepared / (time.perf_counter() - started)}
        split = datasets.open_split(settings.dataset, "train")
        results = benchmark_data(
            split, settings.data, num_images=num_images, num_batches=num_batches, seed=settings.seed
        )
    return {"data_set": f"{dataset.name}, drawn" if drawn else split.name, **preparation, **results}


def benchmark_data(
    split: Split,
    data: DataSettings,
    *,
    num_images: int = 1000,
    num_batches: int = 12,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the data pipeline on `split`; nothing is left behind on the disk.

    Figures "per core" divide by the CPU time of this process, so other work on the machine does not enter; all others
    divide by wall-clock time. Every figure except 'cache_build' is the best of `repeats` rounds. A round covers the
    same `num_images` images, or at least `num_batches` batches after those that were ready before. The whole split is
    cached, so the temporary folder needs N·height·width·3 bytes.

    Args:
      split: the prepared training images.
      data: how they are read and resized, and the size of a batch.
      num_images: images in a round.
      num_batches: batches in a round, at least.
      repeats: rounds.
      seed: seeds the choice of images and the order of batches.

    Returns:
      cores: CPUs that this process may use.
      images, cache_gib: the number of images in the split, and the size of its cache.
      pillow_loop: images/s per core of a plain loop: read a record, decode and resize (data.resize) it with Pillow.
      project_loop: images/s per core of the same loop with the project's decoder, which gives the same pixels.
      read: records/s per core, without decoding.
      decode_pillow, decode_project: images/s per core of decoding alone.
      resize_bilinear, resize_lanczos: images/s per core of resizing alone.
      streaming, streaming_per_core: images/s with cache 'none' and threads, and the same per core.
      streaming_over_pillow: streaming_per_core / pillow_loop.
      workers, streaming_workers: if data.num_workers results in worker processes: their number, and images/s with them.
      cache_build: images/s of building the host cache, on all cores.
      host_cache, host_cache_batches: images/s and batches/s from the finished cache.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(split))[:num_images]
    chosen = chosen.tolist()
    files = [split.encoded[i] for i in chosen]
    decoded = [decode_rgb(file) for file in files]
    size, resize = (data.width, data.height), Image.Resampling[data.resize.upper()]
    loops = {
        "pillow_loop": (lambda i: np.asarray(_decode_pillow(split.encoded[i]).resize(size, resize)), chosen),
        "project_loop": (lambda i: pixels_of(split, i, data), chosen),
        "read": (split.encoded.__getitem__, chosen),
        "decode_pillow": (_decode_pillow, files),
        "decode_project": (decode_rgb, files),
        "resize_bilinear": (lambda image: image.resize(size, Image.Resampling.BILINEAR), decoded),
        "resize_lanczos": (lambda image: image.resize(size, Image.Resampling.LANCZOS), decoded),
    }
    cache_bytes = len(split) * data.height * data.width * 3
    results = {"cores": available_cpus(), "images": len(split), "cache_gib": cache_bytes / 2**30}
    results |= _best_rates(loops, repeats)

    plan = BatchPlan(split.pids, split.modality, data.num_ids_per_batch, data.images_per_id, seed)
    batch = data.num_ids_per_batch * data.images_per_id

    def feed_by(cache: str, num_workers: int = 0, cache_dir: str | None = None) -> TrainFeed:
        by = dataclasses.replace(data, cache=cache, num_workers=num_workers, resize_on="host")
        return train_feed(split, plan, by, num_epochs=10_000, cache_dir=cache_dir)

    feed = feed_by("none")
    by_clock, by_cpu = _batches_per_second(feed.batches, num_batches, repeats, skip=available_cpus() + 2)
    results |= {"streaming": by_clock * batch, "streaming_per_core": by_cpu * batch}
    results["streaming_over_pillow"] = results["streaming_per_core"] / results["pillow_loop"]
    if workers := choose_num_workers(data.num_workers, batch * data.height * data.width * 3):
        feed = feed_by("none", workers)
        by_clock, _ = _batches_per_second(feed.batches, num_batches, repeats, skip=3 * workers)
        results |= {"workers": workers, "streaming_workers": by_clock * batch}

    with tempfile.TemporaryDirectory() as cache_dir:
        started = time.perf_counter()
        open_images(split, dataclasses.replace(data, cache="host"), cache_dir)
        results["cache_build"] = len(split) / (time.perf_counter() - started)
        feed = feed_by("host", cache_dir=cache_dir)
        by_clock, _ = _batches_per_second(feed.batches, num_batches, repeats, skip=available_cpus() + 2)
    results |= {"host_cache": by_clock * batch, "host_cache_batches": by_clock}
    return results


def _best_rates(loops: dict[str, tuple[Callable, list]], repeats: int) -> dict[str, float]:
    seconds = {name: float("inf") for name in loops}
    for _ in range(repeats):
        for name, (function, inputs) in loops.items():
            started = time.process_time()
            for value in inputs:
                function(value)
            seconds[name] = min(seconds[name], time.process_time() - started)
    return {name: len(inputs) / seconds[name] for name, (_, inputs) in loops.items()}


def _batches_per_second(batches: Iterator, count: int, repeats: int, skip: int) -> tuple[float, float]:
    """The best rates of `repeats` rounds, in batches per second of wall-clock time and of this process's CPU time.

    The first `skip` batches were ready before and are dropped. A round has `count` batches or more, since parallel
    workers deliver in bursts and a round must hold several.
    """
    for _ in range(skip):
        next(batches)
    count = max(count, 4 * skip)
    rates = []
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(batches)
        rates.append((count / (time.perf_counter() - clock), count / (time.process_time() - cpu)))
    batches.close()
    return tuple(max(rate) for rate in zip(*rates, strict=True))


def _decode_pillow(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")
