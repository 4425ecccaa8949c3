"""k-reciprocal re-ranking: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.

Two images are k-reciprocal neighbours if each is among the other's k nearest. An image becomes a vector over all
images, weighted exp(−distance) on its (expanded) reciprocal neighbours; the Jaccard distance of two such vectors is
mixed with the original distance. The sets are sparse matrices here, so that every loop of the paper is one product.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32

from mpanet_jax.cpus import available_cpus
from mpanet_jax.evaluation.metrics import l2_normalize, rank_gallery, squared_norms


def squared_distances(features: np.ndarray, metric: str) -> Float32[np.ndarray, "n n"]:
    """Squared Euclidean distances between all rows of `features` float32[n, d], L2-normalised first under 'cosine'."""
    if metric == "cosine":
        features = l2_normalize(features)
    else:  # re-ranking divides by the largest distance of a row, so a power of two changes nothing but overflow
        features = features * np.ldexp(np.float32(1), -int(np.frexp(np.max(np.abs(features)))[1]))
    squares = squared_norms(features)
    distance = features @ features.T
    distance *= -2
    distance += squares[:, None]
    distance += squares[None, :]
    np.maximum(distance, 0, out=distance)
    np.fill_diagonal(distance, 0)
    return distance


def k_reciprocal(
    distance: Float32[np.ndarray, "n n"], num_query: int, *, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> Float32[np.ndarray, "q g"]:
    """Re-ranked distances of n = q + g images, the `num_query` queries first.

    Args:
      distance: squared distances between all images, symmetric; overwritten.
      num_query: q.
      k1: size of the reciprocal neighbourhood (20).
      k2: size of the neighbourhood over which vectors are averaged (6).
      weight: λ, the original distance's share (0.3).
    """
    total = len(distance)
    k2 = min(k2, total)
    largest = distance.max(axis=1, keepdims=True)
    distance /= np.where(largest > 0, largest, 1)
    blocks = [slice(start, start + 256) for start in range(0, total, 256)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        nearest = np.concatenate(list(pool.map(lambda rows: rank_gallery(distance[rows])[:, : k1 + 1], blocks)))

        reciprocal = _reciprocal(nearest)
        half = _reciprocal(nearest[:, : round(k1 / 2) + 1])
        # A neighbour c lends its own half-size set R(c) if more than two thirds of it are in R(i) already.
        overlap = (reciprocal @ half.T).multiply(reciprocal).tocsr()
        size = np.asarray(half.sum(axis=1)).ravel()
        overlap.data = (3 * overlap.data > 2 * size[overlap.indices]).astype(np.float32)
        expanded = (reciprocal + overlap @ half).tocsr()
        expanded.eliminate_zeros()
        expanded.sort_indices()

        rows = np.repeat(np.arange(total), np.diff(expanded.indptr))
        vectors = expanded.astype(np.float64)
        vectors.data = np.exp(-distance[rows, expanded.indices].astype(np.float64))
        vectors.data /= np.bincount(rows, weights=vectors.data, minlength=total)[rows]
        if k2 > 1:
            vectors = (_adjacency(nearest[:, :k2]).astype(np.float64) @ vectors).tocsr() / k2

        # Σ_k min(V_ik, V_jk) for queries i and gallery images j, from the columns' entries alone.
        columns = vectors[num_query:].tocsc()
        num_gallery = total - num_query

        def rerank_block(block: slice) -> np.ndarray:
            own = vectors[block]
            lengths = np.diff(columns.indptr)[own.indices]
            owner = np.repeat(np.repeat(np.arange(own.shape[0]), np.diff(own.indptr)), lengths)
            ends = np.cumsum(lengths)
            entry = np.arange(ends[-1] if len(ends) else 0)
            entry += np.repeat(columns.indptr[own.indices] - (ends - lengths), lengths)
            shared = np.minimum(np.repeat(own.data, lengths), columns.data[entry])
            flat = owner * num_gallery + columns.indices[entry]
            minimum = np.bincount(flat, weights=shared, minlength=own.shape[0] * num_gallery).reshape(-1, num_gallery)
            jaccard = 1 - minimum / (2 - minimum)
            return ((1 - weight) * jaccard + weight * distance[block, num_query:]).astype(np.float32)

        queries = [slice(start, min(start + 64, num_query)) for start in range(0, num_query, 64)]
        return np.concatenate(list(pool.map(rerank_block, queries)))


def _adjacency(neighbours: np.ndarray) -> sparse.csr_array:
    """0/1 matrix: row i has ones at `neighbours[i]`."""
    total, k = neighbours.shape
    return sparse.csr_array(
        (np.ones(total * k, np.float32), neighbours.ravel(), np.arange(0, total * k + 1, k)), shape=(total, total)
    )


def _reciprocal(neighbours: np.ndarray) -> sparse.csr_array:
    adjacency = _adjacency(neighbours)
    return adjacency.multiply(adjacency.T).tocsr()
