"""k-reciprocal re-ranking: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.

Two images are k-reciprocal neighbours if each is among the other's k nearest. Every image becomes a vector over all
images, with weights exp(−distance) on its (expanded) reciprocal neighbours. The new distance is a mean of the original
distance and the Jaccard distance of two such vectors.

Neighbourhoods and vectors are sparse matrices, and distances are requested in blocks of rows. So memory grows with the
number of images n and not with n².
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from mpanet_jax.cpus import available_cpus
from mpanet_jax.evaluation.metrics import first_equal_row, product_function, rank_gallery, scale_to_one
from mpanet_jax.progress import Bar, track
from mpanet_jax.row_norms import l2_normalize, squared_norms

Sparse = Any  # a csr_array or csc_array; type checkers cannot infer the type of their products

_KEPT = 2**28  # n² distances are kept in memory up to this number: 1 GiB
_CHUNK = 2**25  # distances computed at once: 128 MiB
_BLOCK = 2**20  # distances ranked by one thread at once
_SET_ROWS = 4096  # images whose neighbours are expanded by one thread at once
_PAIR_VALUES = 2**22  # feature values subtracted at once
_QUERY_ROWS = 64  # queries whose vectors are compared by one thread at once


class KeptDistances:
    """Distances between n images, kept as a matrix float32[n, n]."""

    def __init__(self, matrix: Float32[np.ndarray, "n n"]):
        self._matrix = matrix

    def __len__(self) -> int:
        return len(self._matrix)

    def block(self, rows: Int[np.ndarray, " r"]) -> Float32[np.ndarray, "r n"]:
        """From the images `rows` to all."""
        return self._matrix[rows]

    def pairs(self, rows: Int[np.ndarray, " m"], columns: Int[np.ndarray, " m"]) -> Float32[np.ndarray, " m"]:
        """From image rows[i] to image columns[i]."""
        return self._matrix[rows, columns]

    def take(self, images: Int[np.ndarray, " k"]) -> "KeptDistances":
        """Those between the `images` alone, in that order."""
        return KeptDistances(self._matrix[np.ix_(images, images)])


class ComputedDistances:
    """Squared Euclidean distances between the rows of `features` float32[n, d], computed on request."""

    def __init__(self, features: Float32[np.ndarray, "n d"], on_device: bool = False):
        self._features, self._on_device = features, on_device
        self._squares = squared_norms(features)
        self._first = first_equal_row(features)
        self._duplicates = np.flatnonzero(self._first != np.arange(len(features)))
        self._product = product_function(features, on_device)

    def __len__(self) -> int:
        return len(self._features)

    def block(self, rows: Int[np.ndarray, " r"]) -> Float32[np.ndarray, "r n"]:
        """From the images `rows` to all images.

        Equal images are at distance 0 from each other, and at equal distances from any third image.
        """
        distance = self._product(self._features[rows])
        distance *= -2
        distance += self._squares[rows][:, None]
        distance += self._squares[None, :]
        np.maximum(distance, 0, out=distance)
        distance[np.arange(len(rows)), self._first[rows]] = 0
        distance[:, self._duplicates] = distance[:, self._first[self._duplicates]]
        return distance

    def pairs(self, rows: Int[np.ndarray, " m"], columns: Int[np.ndarray, " m"]) -> Float32[np.ndarray, " m"]:
        """From image rows[i] to image columns[i]."""
        distance = np.empty(len(rows), np.float32)
        step = max(1, _PAIR_VALUES // self._features.shape[1])
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            distance[some] = squared_norms(self._features[rows[some]] - self._features[columns[some]])
        return distance

    def take(self, images: Int[np.ndarray, " k"]) -> "KeptDistances | ComputedDistances":
        """Those between the `images` alone, in that order."""
        if np.array_equal(images, np.arange(len(self))):
            return self
        return _kept_if_small(ComputedDistances(self._features[images], self._on_device))


Distances = KeptDistances | ComputedDistances


def squared_distances(features: np.ndarray, metric: str, *, on_device: bool = False) -> Distances:
    """Squared Euclidean distances between all images, as re-ranking needs them.

    Args:
      features: float32[n, d]; L2-normalised first under 'cosine'. Under 'euclidean' they are scaled by a power of two
        against overflow; the result of re-ranking stays the same, as it divides by the largest distance of a row.
      metric: 'cosine' or 'euclidean'.
      on_device: compute products with JAX (`product_function`).
    """
    if metric == "cosine":
        features = l2_normalize(features)
    else:
        scale = scale_to_one(features)
        features = features * scale if scale != 1 else features
    return _kept_if_small(ComputedDistances(features, on_device))


def _kept_if_small(distances: ComputedDistances) -> Distances:
    number = len(distances)
    return KeptDistances(distances.block(np.arange(number))) if number**2 <= _KEPT else distances


def k_reciprocal(
    distances: Distances, num_query: int, *, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> Callable[[Int[np.ndarray, " r"]], Float32[np.ndarray, "r g"]]:
    """Prepare re-ranked distances between q queries and g gallery images.

    Args:
      distances: squared distances between all n = q + g images, the queries first.
      num_query: q.
      k1: size of the reciprocal neighbourhood.
      k2: size of the neighbourhood over which vectors are averaged.
      weight: λ, the share of the original distance in the result.

    Returns:
      A function of r queries, int[r] from 0 to q − 1, that gives their re-ranked distances to the g gallery images.
    """
    nearest, largest = _nearest(distances, k1 + 1)
    vectors = _vectors(distances, nearest, largest, k1)
    if k2 > 1:
        neighbours = nearest[:, :k2]
        vectors = (_adjacency(neighbours).astype(np.float64) @ vectors).tocsr() / neighbours.shape[1]
    query_vectors, columns = vectors[:num_query], vectors[num_query:].tocsc()
    del vectors
    block_rows = min(_QUERY_ROWS, max(1, _BLOCK // max(1, columns.shape[0])))

    def reranked(queries: np.ndarray) -> np.ndarray:
        original = distances.block(queries)[:, num_query:]

        def rerank_block(block: slice) -> np.ndarray:
            minimum = _sums_of_minima(query_vectors[queries[block]], columns)
            jaccard = 1 - minimum / (2 - minimum)
            return ((1 - weight) * jaccard + weight * _divided(original[block], largest[queries[block]])).astype(
                np.float32
            )

        blocks = [slice(start, start + block_rows) for start in range(0, len(queries), block_rows)]
        with ThreadPoolExecutor(available_cpus()) as pool:
            return np.concatenate(list(pool.map(rerank_block, blocks)))

    return reranked


def _divided(distance: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return distance / largest[:, None]


def _nearest(distances: Distances, number: int) -> tuple[Int[np.ndarray, "n k"], Float32[np.ndarray, " n"]]:
    """Each image's `number` nearest images, itself included, and its largest distance (1 where that is 0)."""
    total = len(distances)
    largest = np.empty(total, np.float32)
    nearest = np.empty((total, min(number, total)), np.int32)
    chunk, block_rows = max(1, _CHUNK // total), min(256, max(1, _BLOCK // total))
    with ThreadPoolExecutor(available_cpus()) as pool, Bar("nearest neighbours", total) as bar:
        for start in range(0, total, chunk):
            rows = np.arange(start, min(start + chunk, total))
            distance = distances.block(rows)

            def rank(block: slice, rows: np.ndarray = rows, distance: np.ndarray = distance) -> None:
                furthest = distance[block].max(axis=1)
                largest[rows[block]] = np.where(furthest > 0, furthest, 1)
                nearest[rows[block]] = rank_gallery(_divided(distance[block], largest[rows[block]]), number)

            list(pool.map(rank, [slice(first, first + block_rows) for first in range(0, len(rows), block_rows)]))
            bar.advance(len(rows))
    return nearest, largest


def _vectors(distances: Distances, nearest: np.ndarray, largest: np.ndarray, k1: int) -> Sparse:
    """Sparse float64[n, n]: row i has exp(−distance) at i's expanded reciprocal neighbours, scaled to sum 1."""
    from scipy import sparse  # here: it takes a tenth of a second, and a run that does not re-rank starts without it

    reciprocal = _reciprocal(nearest)
    half = _reciprocal(nearest[:, : round(k1 / 2) + 1])
    half_columns = half.T.tocsr()
    size = np.asarray(half.sum(axis=1)).ravel()

    def expand(rows: np.ndarray) -> Sparse:
        own = reciprocal[rows]
        # A neighbour c adds its own half-size set R(c) if more than two thirds of R(c) are in R(i) already.
        overlap = (own @ half_columns).multiply(own).tocsr()
        overlap.data = (3 * overlap.data > 2 * size[overlap.indices]).astype(np.float32)
        expanded = (own + overlap @ half).tocsr()
        expanded.eliminate_zeros()
        expanded.sort_indices()

        owner = np.repeat(np.arange(len(rows)), np.diff(expanded.indptr))
        distance = distances.pairs(rows[owner], expanded.indices) / largest[rows[owner]]
        vectors = expanded.astype(np.float64)
        vectors.data = np.exp(-distance.astype(np.float64))
        vectors.data /= np.bincount(owner, weights=vectors.data, minlength=len(rows))[owner]
        return vectors

    blocks = [np.arange(s, min(s + _SET_ROWS, len(nearest))) for s in range(0, len(nearest), _SET_ROWS)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        expanded = track(
            pool.map(expand, blocks), "reciprocal neighbours", len(nearest), size=lambda rows: rows.shape[0]
        )
        return sparse.vstack(list(expanded), format="csr")


def _sums_of_minima(own: Sparse, columns: Sparse) -> np.ndarray:
    """float64[r, g]: Σ_k min(own[i, k], columns[j, k]); only nonzero entries are read."""
    num_gallery = columns.shape[0]
    lengths = np.diff(columns.indptr)[own.indices]
    owner = np.repeat(np.repeat(np.arange(own.shape[0]), np.diff(own.indptr)), lengths)
    ends = np.cumsum(lengths)
    entry = np.arange(ends[-1] if len(ends) else 0)
    entry += np.repeat(columns.indptr[own.indices] - (ends - lengths), lengths)
    shared = np.minimum(np.repeat(own.data, lengths), columns.data[entry])
    flat = owner * num_gallery + columns.indices[entry]
    return np.bincount(flat, weights=shared, minlength=own.shape[0] * num_gallery).reshape(-1, num_gallery)


def _adjacency(neighbours: np.ndarray) -> Sparse:
    """Sparse float32[n, n] of 0 and 1: row i has ones at `neighbours[i]`."""
    from scipy import sparse

    total, k = neighbours.shape
    return sparse.csr_array(
        (np.ones(total * k, np.float32), neighbours.ravel(), np.arange(0, total * k + 1, k)), shape=(total, total)
    )


def _reciprocal(neighbours: np.ndarray) -> Sparse:
    adjacency = _adjacency(neighbours)
    return adjacency.multiply(adjacency.T).tocsr()
