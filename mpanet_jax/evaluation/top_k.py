"""Finds the k nearest gallery images of each query in a gallery too large for a distance matrix."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.metrics import METRICS
from mpanet_jax.progress import Bar
from mpanet_jax.row_norms import l2_normalize

_ROUNDING = 2.0**-24  # unit roundoff of float32
_BLOCK_BYTES, _BLOCK_ROWS = 2**28, 2**16  # the largest block of the gallery
_EXACT_ROWS = 4096  # candidates whose distance is recomputed at once
_SPARE = 64  # candidates beyond k that an accelerator returns at once


def top_k(
    query: np.ndarray,
    gallery: np.ndarray,
    k: int,
    metric: str = "cosine",
    block: int | None = None,
    *,
    uploaded: Sequence[Any] | None = None,
) -> tuple[Int[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
    """Find exactly the `k` nearest gallery rows of each query.

    The gallery is read once, block by block, and may be memory-mapped (`np.load(path, mmap_mode="r")`). In each block a
    float32 product picks the candidates, with a margin of its largest possible rounding error. Their distances are then
    computed in float64, so the result depends neither on the blocks nor on what computes the product.

    Args:
      query: float[q, d], finite, rows of any length.
      gallery: float[n, d], likewise.
      k: how many rows to find.
      metric: 'cosine' or 'euclidean'.
      block: rows of the gallery at once; None: 256 MiB of them, 65,536 rows at most.
      uploaded: what `upload(gallery, block)` gives: JAX computes the products on its default device, under 'cosine'
        only. None: numpy computes them.

    Returns:
      Gallery rows int[q, min(k, n)] by ascending distance, equal distances in gallery order, and their distances in
      float64: 1 − cosine similarity (a zero vector has similarity 0), or Euclidean.

    Raises:
      UserError: a feature is NaN or infinite.
      ValueError: an unknown metric, 'euclidean' with `uploaded`, or k < 1.
    """
    if metric not in METRICS or k < 1 or (uploaded is not None and metric != "cosine"):
        raise ValueError(f"expected a metric of {METRICS} (uploaded: cosine) and k >= 1, got {metric!r} and {k}")
    number, dimension = gallery.shape
    block = block or _default_block(dimension)
    query = np.asarray(query, np.float32)
    _refuse_non_finite(query, "query", 0)
    exact_query = query.astype(np.float64)
    query_norms = np.sqrt(np.sum(exact_query**2, axis=1))
    nearest = [(np.empty(0, np.int64), np.empty(0))] * len(query)
    coarse_query = l2_normalize(query) if metric == "cosine" else exact_query

    with Bar("searching", number) as bar:
        for place, start in enumerate(range(0, number, block)):
            if uploaded is None:
                rows = np.ascontiguousarray(gallery[start : start + block], np.float32)
                _refuse_non_finite(rows, "gallery", start)
                coarse, error = _coarse(coarse_query, query_norms, rows, metric)
                length, below = coarse.shape[1], _below_of_matrix(coarse)
            else:
                rows, length = gallery[start : start + block], min(block, number - start)
                below, error = _on_device(coarse_query, uploaded[place], length, k, start)
            # The block's true k nearest lie within two rounding errors of its k-th smallest coarse distance.
            limit = below(None, k) + 2 * error if length > k else np.full(len(query), np.inf)
            for i in range(len(query)):
                indices, distances = nearest[i]
                if len(indices) == k:
                    limit[i] = min(limit[i], _coarse_value(distances[-1], query_norms[i], metric) + error[i])
                candidates = below(i, limit[i])
                for first in range(0, len(candidates), _EXACT_ROWS):
                    some = candidates[first : first + _EXACT_ROWS]
                    indices = np.concatenate([indices, start + some])
                    exact = _exact(exact_query[i], query_norms[i], rows[some], metric)
                    distances = np.concatenate([distances, exact])
                    best = np.lexsort((indices, distances))[:k]
                    indices, distances = indices[best], distances[best]
                nearest[i] = indices, distances
            bar.advance(length)
    shape = (len(query), min(k, number))
    return (
        np.array([indices for indices, _ in nearest], np.int64).reshape(shape),
        np.array([distances for _, distances in nearest], np.float64).reshape(shape),
    )


def upload(gallery: np.ndarray, block: int | None = None) -> list[Any]:
    """Copy the gallery to JAX's default device, where it must fit, in blocks for `top_k` with the same `block`."""
    import jax

    block = block or _default_block(gallery.shape[1])
    blocks = [jax.device_put(np.asarray(gallery[i : i + block], np.float32)) for i in range(0, len(gallery), block)]
    return jax.block_until_ready(blocks)


def _default_block(dimension: int) -> int:
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * dimension)))


# (None, k) → the k-th smallest coarse distance of each query; (i, limit) → the rows at which query i's are ≤ limit
_Below = Callable[[int | None, Any], np.ndarray]


def _below_of_matrix(coarse: np.ndarray) -> _Below:
    def below(i: int | None, number: Any) -> np.ndarray:
        if i is None:
            return np.partition(coarse, number - 1, axis=1)[:, number - 1]
        return np.flatnonzero(coarse[i] <= number)

    return below


def _on_device(
    query: np.ndarray, rows: Any, length: int, k: int, start: int
) -> tuple[_Below, Float64[np.ndarray, " q"]]:
    """`_coarse` and `_below_of_matrix` on the device; as a rule only the smallest coarse distances leave it."""
    count = min(length, k + _SPARE)
    coarse, values, places, finite = _device_coarse()(query, rows, count)
    if not finite.all():
        _refuse_non_finite(np.asarray(rows), "gallery", start)
    values, places = np.asarray(values, np.float64), np.asarray(places)

    def below(i: int | None, number: Any) -> np.ndarray:
        if i is None:
            return values[:, number - 1]
        if count < length and values[i, -1] <= number:  # there may be more than were returned
            return np.flatnonzero(np.asarray(coarse[i]) <= number)
        return np.sort(places[i, : np.searchsorted(values[i], number, side="right")])

    # The bound holds for any order in which the device adds up the d terms of the product and of the norm.
    return below, np.full(len(query), (2 * rows.shape[1] + 32) * _ROUNDING)


@functools.cache
def _device_coarse() -> Callable[..., tuple[Any, Any, Any, Any]]:
    import jax
    import jax.numpy as jnp

    def coarse(query: Any, rows: Any, count: int) -> tuple[Any, Any, Any, Any]:
        largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
        scaled = rows / jnp.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
        norms = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=1))
        products = jnp.matmul(query, scaled.T, precision=jax.lax.Precision.HIGHEST)
        distances = 1 - products / jnp.where(norms > 0, norms, 1)
        values, places = jax.lax.top_k(-distances, count)
        return distances, -values, places, jnp.isfinite(largest)

    # Without this, XLA tries out variants of the product for longer than the product takes.
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    return jax.jit(coarse, static_argnums=2, compiler_options=options)


def _coarse(query: np.ndarray, query_norms: np.ndarray, rows: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Distances [q, b] computed in float32, and the largest possible error of each query's, [q]."""
    if metric == "cosine":
        # |error of a dot product of d terms| <= (d + few)·u·|q|·|g|, and the two norms are 1.
        return 1 - query @ l2_normalize(rows).T, np.full(len(query), (rows.shape[1] + 16) * _ROUNDING)
    # Powers of two scale the features so that nothing overflows; the bound is scaled back with the values.
    scale_rows = 2.0 ** -int(np.frexp(np.max(np.abs(rows), initial=0))[1])
    scale_query = 2.0 ** -int(np.frexp(np.max(np.abs(query), initial=0))[1])
    scaled = rows * np.float32(scale_rows)
    products = (query * scale_query).astype(np.float32) @ scaled.T
    norms = np.sqrt(np.einsum("nd,nd->n", scaled, scaled, dtype=np.float64)) / scale_rows
    squared = norms[None] ** 2 - 2 * (products.astype(np.float64) / (scale_rows * scale_query))
    largest = np.max(norms, initial=0)
    return squared, 2 * (rows.shape[1] + 16) * _ROUNDING * query_norms * largest + 1e-12 * largest**2


def _coarse_value(distance: float, query_norm: float, metric: str) -> float:
    """An exact distance on the scale of `_coarse`, which omits ‖q‖²."""
    return distance if metric == "cosine" else distance**2 - query_norm**2 + 1e-12 * (distance**2 + query_norm**2)


def _exact(query: np.ndarray, query_norm: float, rows: np.ndarray, metric: str) -> np.ndarray:
    """Distances in float64, summed along each row, so that equal rows get equal distances at any position."""
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
