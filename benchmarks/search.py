"""Measures time and memory of finding the k nearest rows of a memory-mapped gallery."""

import time
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.evaluation import anonymous_memory_gib
from mpanet_jax.cpus import available_cpus
from mpanet_jax.evaluation.top_k import top_k, upload

_ROWS = 4096  # drawn at once


def benchmark_search(
    folder: Path,
    *,
    num_gallery: int = 1_000_000,
    num_query: int = 100,
    dimension: int = 2048,
    k: int = 10,
    on_device: bool = False,
) -> dict:
    """Time the search for the exact `k` nearest rows by cosine, in a gallery of random unit rows in a file.

    Queries are rows of the gallery plus noise, so that each has a near row.

    Args:
      folder: where the gallery's file is written; it is removed afterwards.
      num_gallery, num_query: how many rows.
      dimension: D, the length of a row.
      k: how many rows to find.
      on_device: compute products with JAX on its default device.

    Returns:
      {'seconds', 'cpu_seconds' (user and system time of the process, reading the file's pages included), 'added_gib'
      (peak memory without mapped files above that before, sampled every 20 ms), 'gallery_gib', …}. With `on_device`
      also 'upload_seconds' and 'first_seconds' (with compilation); 'seconds' is then that of a second search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmark_gallery.npy"
    try:
        query = _write_gallery(path, num_gallery, num_query, dimension)
        gallery = np.load(path, mmap_mode="r")
        values: dict[str, float] = {}
        uploaded = None
        if on_device:
            start = time.perf_counter()
            uploaded = upload(gallery)
            values["upload_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            top_k(query, gallery, k, uploaded=uploaded)
            values["first_seconds"] = time.perf_counter() - start
        before = anonymous_memory_gib()
        with measure.peak_anonymous_memory_gib() as peak:
            cpu, start = measure.cpu_seconds(), time.perf_counter()
            rows, _ = top_k(query, gallery, k, uploaded=uploaded)
            values |= {"seconds": time.perf_counter() - start, "cpu_seconds": measure.cpu_seconds() - cpu}
        found = float(np.mean(rows[:, 0] == _sources(num_gallery, num_query)))
    finally:
        path.unlink(missing_ok=True)
    return {
        **values,
        "added_gib": peak[0] - before,
        "gallery_gib": num_gallery * dimension * 4 / 2**30,
        "num_gallery": num_gallery,
        "num_query": num_query,
        "dimension": dimension,
        "k": k,
        "threads": available_cpus(),
        "source_is_nearest": found,
    }


def _sources(num_gallery: int, num_query: int) -> np.ndarray:
    return np.linspace(0, num_gallery - 1, num_query).astype(int)


def _write_gallery(path: Path, num_gallery: int, num_query: int, dimension: int) -> np.ndarray:
    """Writes random unit rows, and returns the queries."""
    generator = np.random.default_rng(0)
    gallery = np.lib.format.open_memmap(path, "w+", np.float32, (num_gallery, dimension))
    for start in range(0, num_gallery, _ROWS):
        rows = generator.standard_normal((min(_ROWS, num_gallery - start), dimension), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        gallery[start : start + len(rows)] = rows
    gallery.flush()
    noise = generator.standard_normal((num_query, dimension), np.float32) / np.float32(dimension**0.5)
    return gallery[_sources(num_gallery, num_query)] + noise
