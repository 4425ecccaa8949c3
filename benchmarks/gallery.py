"""Measures time and memory of evaluation on a large gallery, with and without re-ranking."""

import time

import numpy as np

from benchmarks import measure
from benchmarks.evaluation import peak_memory_gib
from mpanet_jax.cpus import available_cpus
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.evaluation.evaluate import evaluate_comparison
from mpanet_jax.protocol import Comparison, Setting

IMAGES_OF_AN_ID = 10  # of each identity in the gallery
_ROWS = 4096  # features drawn at once


def clustered_embeddings(number: int, num_ids: int, dimension: int, *, noise: float, seed: int) -> Embeddings:
    """Random embeddings: image i is the centre of identity i mod `num_ids` plus `noise` times N(0, 1).

    Args:
      number: N, how many images.
      num_ids: identities; their centres are the same for every `seed`.
      dimension: D, the length of an embedding.
      noise: the standard deviation of the noise.
      seed: seeds the noise.
    """
    centres = np.random.default_rng(0).standard_normal((num_ids, dimension), np.float32)
    pids, generator = np.arange(number) % num_ids, np.random.default_rng([1, seed])
    features = np.empty((number, dimension), np.float32)
    for start in range(0, number, _ROWS):
        rows = features[start : start + _ROWS]
        generator.standard_normal(out=rows, dtype=np.float32)
        rows *= np.float32(noise)
        rows += centres[pids[start : start + _ROWS]]
    return Embeddings(features, pids, np.zeros(number, int), np.full(number, ""))


def benchmark_gallery(
    num_gallery: int = 100_000,
    num_query: int = 1000,
    dimension: int = 2048,
    *,
    rerank: bool = False,
    metric: str = "cosine",
    noise: float = 4.0,
    on_device: bool = False,
) -> dict:
    """Evaluate random queries against one gallery of random embeddings, ten of each identity.

    Args:
      num_gallery, num_query: how many images.
      dimension: D, the length of an embedding.
      rerank, metric, on_device: as for `evaluate_comparison`.
      noise: as for `clustered_embeddings`.

    Returns:
      {'seconds', 'cpu_seconds', 'peak_gib' (this process's peak resident memory), 'before_gib' (that peak before the
      evaluation: features and libraries), 'added_gib' (their difference), 'features_gib', 'rank1', 'mAP', 'mINP', …}
    """
    num_ids = max(1, num_gallery // IMAGES_OF_AN_ID)
    query = clustered_embeddings(num_query, num_ids, dimension, noise=noise, seed=0)
    gallery = clustered_embeddings(num_gallery, num_ids, dimension, noise=noise, seed=1)
    groups = np.zeros(num_query, int), np.ones(num_gallery, int)
    comparison = Comparison(query, gallery, [Setting("gallery", [np.arange(num_gallery)])], *groups)
    before = peak_memory_gib()
    cpu, start = measure.cpu_seconds(), time.perf_counter()
    values = evaluate_comparison(comparison, metric, "image", rerank=rerank, on_device=on_device)["gallery"]
    seconds, cpu = time.perf_counter() - start, measure.cpu_seconds() - cpu
    peak = peak_memory_gib()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gib": peak,
        "before_gib": before,
        "added_gib": peak - before,
        "features_gib": (query.features.nbytes + gallery.features.nbytes) / 2**30,
        "rerank": rerank,
        "num_query": num_query,
        "num_gallery": num_gallery,
        "num_ids": num_ids,
        "dimension": dimension,
        "metric": metric,
        "threads": available_cpus(),
        **{name: values[name] for name in ("rank1", "mAP", "mINP")},
    }
