"""Measures the evaluator on SYSU-MM01's real structure: 3,803 x 6,775 images, four settings, ten trials."""

import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import scipy.io

from mpanet_jax.cpus import available_cpus
from mpanet_jax.datasets import make_protocol
from mpanet_jax.datasets.sysu_mm01 import load_permutation
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import evaluate_embeddings
from mpanet_jax.evaluation.rerank import k_reciprocal, squared_distances

# {camera: (images of SYSU-MM01's 96 test identities, how many of these identities it saw)}.
CAMERA_IMAGES = {1: (1374, 56), 2: (1565, 56), 3: (1883, 93), 4: (1918, 94), 5: (1918, 95), 6: (1920, 96)}
NUM_TEST_IDS = 96


def test_set_counts(
    permutation: str | os.PathLike | None = None, test_ids: list[int] | None = None
) -> dict[tuple[int, int], int]:
    """{(camera, identity): number of images} of SYSU-MM01's test set.

    Args:
      permutation: the data set's own permutation file, which has the true numbers; None: the totals of each camera,
        spread evenly over its identities.
      test_ids: the test identities to read from the file; None: 1 to 96.
    """
    if permutation is not None:
        matrices = load_permutation(permutation)
        return {
            (camera, pid): matrices[camera, pid].shape[1] if (camera, pid) in matrices else 0
            for camera in CAMERA_IMAGES
            for pid in (test_ids or range(1, NUM_TEST_IDS + 1))
        }
    return {
        (camera, pid): images // ids + (pid <= images % ids) if pid <= ids else 0
        for camera, (images, ids) in CAMERA_IMAGES.items()
        for pid in range(1, NUM_TEST_IDS + 1)
    }


def random_embeddings(
    counts: dict[tuple[int, int], int], dimension: int, *, noise: float = 3.0, seed: int = 0
) -> tuple[Embeddings, Embeddings]:
    """Random query and gallery embeddings: each is its identity's random centre plus `noise` times N(0, 1).

    Args:
      counts: {(camera, identity): number of images}; cameras 3 and 6 are the query.
      dimension: D, the length of an embedding.
      noise: the standard deviation of the noise.
      seed: seeds centres and noise.
    """
    generator = np.random.default_rng(seed)
    centres = {pid: generator.standard_normal(dimension, np.float32) for pid in sorted({pid for _, pid in counts})}
    result = []
    for cameras in ((3, 6), (1, 2, 4, 5)):
        images = [(c, pid, n + 1) for (c, pid), number in sorted(counts.items()) if c in cameras for n in range(number)]
        features = generator.standard_normal((len(images), dimension), np.float32)
        features *= noise
        for row, (_, pid, _) in enumerate(images):
            features[row] += centres[pid]
        result.append(
            Embeddings(
                features=features,
                pids=np.array([pid for _, pid, _ in images]),
                camids=np.array([camera for camera, _, _ in images]),
                paths=np.array([f"cam{camera}/{pid:04d}/{n:04d}.jpg" for camera, pid, n in images]),
            )
        )
    return tuple(result)


def benchmark_evaluation(
    dimension: int = 256,
    *,
    permutation: str | os.PathLike | None = None,
    test_ids: list[int] | None = None,
    repeats: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    on_device: bool = False,
) -> dict:
    """Time all four SYSU-MM01 settings with ten trials each, on random features with the data set's real structure.

    Args:
      dimension: D, the length of an embedding.
      permutation: the data set's permutation file; None: protocol `sysu_mm01_random` draws the galleries, which is the
        same work.
      test_ids: as for `test_set_counts`.
      repeats: how often to evaluate.
      noise, seed: as for `random_embeddings`.
      on_device: compute products with JAX (`evaluate_embeddings`).

    Returns:
      {'seconds' (median), 'seconds_all', 'peak_gib' (this process's peak resident memory, features included),
      'num_query', 'num_gallery', 'dimension', 'threads', 'rank1' (all-search, single-shot, in percent)}.
    """
    query, gallery = random_embeddings(test_set_counts(permutation, test_ids), dimension, noise=noise, seed=seed)
    protocol = make_protocol("sysu_mm01_random" if permutation is None else "sysu_mm01", permutation=permutation)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        metrics = evaluate_embeddings(query, gallery, protocol=protocol, on_device=on_device)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": float(np.median(seconds)),
        "seconds_all": seconds,
        "peak_gib": peak_memory_gib(),
        "num_query": len(query),
        "num_gallery": len(gallery),
        "dimension": dimension,
        "threads": available_cpus(),
        "rank1": metrics["sysu/all/single"]["rank1"],
    }


def benchmark_all(
    dimensions: list[str] | list[int],
    permutation: str | os.PathLike | None = None,
    *,
    rerank: bool = False,
    repeats: int = 3,
    on_device: bool = False,
) -> dict:
    """Run `benchmark_evaluation` for each dimension and, with `rerank`, `benchmark_rerank`.

    Returns:
      Their results in one dict, under the dimension or 'rerank': {'256_seconds': …, 'rerank_seconds': …, …}.

    Raises:
      UserError: a dimension is not a whole number, or SYSU-MM01's list of test identities is not beside the permutation
        file.
    """
    if not all(str(d).isdigit() and int(d) for d in dimensions):
        raise UserError(f"--dimensions={','.join(map(str, dimensions))}: expected whole numbers, like 256,14336")
    test_ids = None if permutation is None else _test_ids(Path(permutation).parent)
    parts = {
        str(dimension): benchmark_evaluation(
            int(dimension), permutation=permutation, test_ids=test_ids, repeats=repeats, on_device=on_device
        )
        for dimension in dimensions
    }
    if rerank:
        parts["rerank"] = benchmark_rerank(repeats=repeats)
    return {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}


def _test_ids(folder: Path) -> list[int]:
    """SYSU-MM01's test identities, from the list beside its permutation file."""
    for path in (folder / "test_id.txt", folder / "test_id.mat"):
        if not path.exists():
            continue
        try:
            if path.suffix == ".txt":
                return [int(pid) for pid in path.read_text().split(",")]
            return scipy.io.loadmat(path)["id"].ravel().tolist()
        except (KeyError, ValueError, OSError) as error:
            raise UserError(f"{path}: not SYSU-MM01's list of test identities ({error})") from error
    raise UserError(f"--permutation: expected test_id.txt (or .mat) beside the file, in {folder}, as in SYSU-MM01/exp")


def benchmark_rerank(num_query: int = 2060, num_gallery: int = 2060, dimension: int = 256, *, repeats: int = 3) -> dict:
    """Time k-reciprocal re-ranking on random features with RegDB's structure.

    That is 206 identities with ten images in each modality.

    Returns:
      {'seconds' (median, without the distances), 'distance_seconds' (median), 'peak_gib' (this process's peak resident
      memory), 'num_query', 'num_gallery', 'dimension'}.
    """
    generator = np.random.default_rng(0)
    pids = np.concatenate([np.arange(num_query) // 10, np.arange(num_gallery) // 10])
    features = generator.standard_normal((pids.max() + 1, dimension), np.float32)[pids]
    features += generator.standard_normal(features.shape, np.float32)
    distance_seconds, seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        distance = squared_distances(features, "euclidean")
        middle = time.perf_counter()
        k_reciprocal(distance, num_query)(np.arange(num_query))
        distance_seconds.append(middle - start)
        seconds.append(time.perf_counter() - middle)
    return {
        "seconds": float(np.median(seconds)),
        "distance_seconds": float(np.median(distance_seconds)),
        "peak_gib": peak_memory_gib(),
        "num_query": num_query,
        "num_gallery": num_gallery,
        "dimension": dimension,
    }


def anonymous_memory_gib() -> float:
    """Resident memory of this process without mapped files, in GiB; 0 on systems other than Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
