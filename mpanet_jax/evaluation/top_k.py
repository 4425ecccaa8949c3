"""The k nearest gallery images of each query, in a gallery too large for a distance matrix."""

import numpy as np
from jaxtyping import Float64, Int

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.metrics import METRICS, l2_normalize

_ROUNDING = 2.0**-24  # unit roundoff of float32
_BLOCK_BYTES = 2**28
_EXACT_ROWS = 4096  # candidates whose distance is recomputed at once


def top_k(
    query: np.ndarray, gallery: np.ndarray, k: int, metric: str = "cosine", block: int | None = None
) -> tuple[Int[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
    """Find the exact `k` nearest of `gallery` float[n, d] for each of `query` float[q, d].

    The gallery is read once, in blocks of `block` rows (256 MiB each by default), and may be memory-mapped
    (`np.load(path, mmap_mode="r")`). A float32 product picks the candidates of a block, generously by its worst
    rounding error; their distances are then computed in float64, so the result does not depend on the block.

    Returns:
      gallery rows int[q, min(k, n)] by ascending distance, ties in gallery order, and their distances in float64:
      1 − cosine similarity (a zero vector has similarity 0), or Euclidean.

    Raises:
      UserError: NaN or infinite features.
      ValueError: an unknown metric, or k < 1.
    """
    if metric not in METRICS or k < 1:
        raise ValueError(f"expected a metric of {METRICS} and k >= 1, got {metric!r} and {k}")
    number, dimension = gallery.shape
    block = block or max(1, _BLOCK_BYTES // (4 * dimension))
    query = np.asarray(query, np.float32)
    _refuse_non_finite(query, "query", 0)
    exact_query = query.astype(np.float64)
    coarse_query = l2_normalize(query) if metric == "cosine" else exact_query
    query_norms = np.sqrt(np.sum(exact_query**2, axis=1))
    nearest = [(np.empty(0, np.int64), np.empty(0))] * len(query)

    for start in range(0, number, block):
        rows = np.ascontiguousarray(gallery[start : start + block], np.float32)
        _refuse_non_finite(rows, "gallery", start)
        coarse, error = _coarse(coarse_query, query_norms, rows, metric)
        limit = np.full(len(query), np.inf)
        if len(rows) > k:  # the block's own k nearest lie within two rounding errors of its k-th coarse one
            limit = np.partition(coarse, k - 1, axis=1)[:, k - 1] + 2 * error
        for i in range(len(query)):
            indices, distances = nearest[i]
            if len(indices) == k:
                limit[i] = min(limit[i], _coarse_value(distances[-1], query_norms[i], metric) + error[i])
            candidates = np.flatnonzero(coarse[i] <= limit[i])
            for first in range(0, len(candidates), _EXACT_ROWS):
                some = candidates[first : first + _EXACT_ROWS]
                indices = np.concatenate([indices, start + some])
                distances = np.concatenate([distances, _exact(exact_query[i], query_norms[i], rows[some], metric)])
                best = np.lexsort((indices, distances))[:k]
                indices, distances = indices[best], distances[best]
            nearest[i] = indices, distances
    shape = (len(query), min(k, number))
    return (
        np.array([indices for indices, _ in nearest], np.int64).reshape(shape),
        np.array([distances for _, distances in nearest], np.float64).reshape(shape),
    )


def _coarse(query: np.ndarray, query_norms: np.ndarray, rows: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Distances in float32 arithmetic, [q, b], and how far each query's may be from the truth, [q]."""
    if metric == "cosine":
        # |error of a dot product of d terms| <= (d + few)·u·|q|·|g|, and the two norms are 1.
        return 1 - query @ l2_normalize(rows).T, np.full(len(query), (rows.shape[1] + 16) * _ROUNDING)
    # Scaled by powers of two so that nothing overflows; the bound holds for the scaled values and is scaled back.
    scale_rows = 2.0 ** -int(np.frexp(np.max(np.abs(rows), initial=0))[1])
    scale_query = 2.0 ** -int(np.frexp(np.max(np.abs(query), initial=0))[1])
    scaled = rows * np.float32(scale_rows)
    products = (query * scale_query).astype(np.float32) @ scaled.T
    norms = np.sqrt(np.einsum("nd,nd->n", scaled, scaled, dtype=np.float64)) / scale_rows
    squared = norms[None] ** 2 - 2 * (products.astype(np.float64) / (scale_rows * scale_query))
    largest = np.max(norms, initial=0)
    return squared, 2 * (rows.shape[1] + 16) * _ROUNDING * query_norms * largest + 1e-12 * largest**2


def _coarse_value(distance: float, query_norm: float, metric: str) -> float:
    """An exact distance on the scale of `_coarse`, which leaves ‖q‖² out."""
    return distance if metric == "cosine" else distance**2 - query_norm**2 + 1e-12 * (distance**2 + query_norm**2)


def _exact(query: np.ndarray, query_norm: float, rows: np.ndarray, metric: str) -> np.ndarray:
    """Distances in float64, by sums along rows: equal rows get equal distances wherever they stand."""
    rows = rows.astype(np.float64)
    if metric == "euclidean":
        return np.sqrt(np.sum((rows - query) ** 2, axis=1))
    norms = np.sqrt(np.sum(rows**2, axis=1)) * query_norm
    return 1 - np.sum(rows * query, axis=1) / np.where(norms > 0, norms, 1)


def _refuse_non_finite(rows: np.ndarray, name: str, start: int) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{name} row {start + int(np.argmin(finite))} holds NaN or an infinity; expected finite features"
        )
