"""Measures how fast images are embedded: from device memory, and from the files of a data set."""

import itertools
import time
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.step import NUM_IDS, forward_work, random_images
from mpanet_jax import datasets
from mpanet_jax.data.pipeline import split_batches
from mpanet_jax.evaluation.extract import extract_embeddings, make_embed
from mpanet_jax.evaluation.workdir import embed_rows
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import compute_dtype
from mpanet_jax.settings import Settings
from mpanet_jax.state import init_variables


def benchmark_extract(
    settings: Settings,
    *,
    num_steps: int = 60,
    num_images: int = 2048,
    from_files: bool = False,
    num_files: int | None = None,
) -> dict[str, Any]:
    """Measure the embedding of batches of settings.eval.batch_size images by a random network, as evaluation runs it.

    Args:
      settings: the run whose network is measured.
      num_steps: timed batches from device memory.
      num_images: random images in device memory; at least one batch.
      from_files: also embed the training images of config.dataset, the most that it has, through the host's pipeline.
      num_files: how many images that is, the training images again and again; None: each once.

    Returns:
      images_per_second, median_ms, p10_ms, p90_ms: of a batch in device memory, whose embeddings stay there.
      fetched_images_per_second: the same with every embedding fetched to the host, in wall-clock time.
      files_images_per_second: with `from_files`, read, decoded, resized, embedded and fetched, in wall-clock time;
        read_images_per_second: read and decoded alone, and resized if the host does that; files: how many.
      compile_seconds, programs_from_cache, peak_gib: as for `benchmark_step`; peak_gib is read before the files.
      tflops: TFLOP/s of convolutions and matrix products; share_of_arithmetic: the same over the measured ceiling.
    """
    compiled = measure.CompileLog()
    num_devices = jax.local_device_count()
    batch_size = -(-settings.eval.batch_size // num_devices) * num_devices
    num_images = max(num_images, batch_size) // batch_size * batch_size
    method, data = make_method(settings), settings.data
    variables = init_variables(method.network(NUM_IDS), jax.random.key(settings.seed), data.height, data.width)
    embed = make_embed(method, NUM_IDS)(variables)
    images = jax.device_put(random_images(settings, num_images))
    modality = np.arange(batch_size, dtype=np.int32) % 2
    starts = itertools.cycle(range(0, num_images, batch_size))

    def call() -> jax.Array:
        start = next(starts)
        return embed(images[start : start + batch_size], modality)

    jax.block_until_ready(images[:batch_size])
    from_cache, started = compiled.from_cache, time.perf_counter()
    dimension = jax.block_until_ready(call()).shape[-1]
    first_call = time.perf_counter() - started
    from_cache = compiled.from_cache - from_cache
    seconds = measure.seconds_per_call(call, num_steps)
    results = {
        **measure.rates(seconds, batch_size),
        "fetched_images_per_second": _fetched_rate(call, batch_size, num_steps),
        "timed_batches": num_steps,
        "batch_size": batch_size,
        "dimension": dimension,
        "dtype": compute_dtype(settings.dtype).name,
        "compile_seconds": float(first_call - np.median(seconds)),
        "programs_from_cache": from_cache,
        "peak_gib": measure.peak_device_memory_gib(),
        "image_set_gib": images.nbytes / 2**30,
    }
    if from_files:
        split = datasets.open_split(settings.dataset, "train")
        rows = np.resize(np.arange(len(split)), num_files or len(split))
        started = time.perf_counter()
        embed_rows(split, rows, embed, settings.data, settings.eval.batch_size)
        results["files_images_per_second"] = len(rows) / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in split_batches(split, rows, settings.data, settings.eval.batch_size):
            pass
        results["read_images_per_second"] = len(rows) / (time.perf_counter() - started)
        results["files"] = len(rows)
    ceilings = measure.ceilings(compute_dtype(settings.dtype))
    tflops = forward_work(settings)[0] * results["images_per_second"] / 1e12
    share = tflops / ceilings["matmul_ceiling_tflops"] / num_devices
    return results | {"tflops": tflops, **ceilings, "share_of_arithmetic": share}


def _fetched_rate(call: Any, batch_size: int, num_batches: int) -> float:
    """Images/s of `extract_embeddings` on batches whose images are in device memory."""
    rows = np.arange(batch_size)
    batch = {
        "images": None,
        "pids": rows,
        "camids": rows,
        "modality": rows % 2,
        "index": rows,
        "mask": np.ones(batch_size, bool),
    }
    started = time.perf_counter()
    num_images = batch_size * num_batches
    extract_embeddings(lambda *_: call(), itertools.repeat(batch, num_batches), np.full(batch_size, ""), num_images)
    return num_images / (time.perf_counter() - started)
