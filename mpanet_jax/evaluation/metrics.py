"""Distances, rankings and the three figures of person re-identification: CMC, mAP and mINP.

Everything here works on plain numpy arrays and knows no data set: a `Protocol` says which images are query and gallery,
and `evaluate.py` joins the two. Rankings are stable: ascending distance, equal distances in gallery order.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from mpanet_jax.row_norms import in_safe_range, l2_normalize, squared_norms

METRICS = ("cosine", "euclidean")
CMC_DEFINITIONS = ("identity", "image")
RANKS = (1, 5, 10, 20)
FIGURES = (*(f"rank{k}" for k in RANKS), "mAP", "mINP")


def _direction(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, factor of each row), whose product is the L2-normalised features; zero rows have factor 1.

    The features are copied only if some norm is too large or too small to multiply by its inverse.
    """
    squares = squared_norms(features)
    safe = in_safe_range(squares)
    if not safe.all() and features[~safe].any():
        return l2_normalize(features), np.ones(len(features), np.float32)
    return features, 1 / np.sqrt(np.where(safe, squares, np.float32(1)))


def first_equal_row(features: np.ndarray) -> Int[np.ndarray, " n"]:
    """For each row, the index of the first row with the same bytes (its own index if no earlier row is equal).

    On some CPUs the last bits of a matrix product depend on a row's position, which would break ties between equal
    images at random. So the distances of the first of them are used for all.
    """
    first = np.arange(len(features))
    # A sample of the columns tells most rows apart; only rows that agree in it are read whole.
    sample = features[:, :: -(-features.shape[1] // 256)]
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(sample):
        groups.setdefault(hash(row.tobytes()), []).append(index)
    for rows in groups.values():
        if len(rows) > 1:
            seen: dict[bytes, int] = {}
            for index in rows:
                first[index] = seen.setdefault(hashlib.sha256(features[index].tobytes()).digest(), index)
    return first


def distance_function(
    gallery: np.ndarray, metric: str, *, on_device: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes distances to a fixed gallery, for ranking only.

    Under 'cosine' a value is minus the cosine similarity times ‖q‖; a zero vector has similarity 0 to everything. Under
    'euclidean' it is half the squared Euclidean distance without the query's own term ‖q‖²/2. Both rank a query's
    gallery like the distance itself, with less rounding; values of different queries cannot be compared.

    Args:
      gallery: float32[n, d].
      metric: 'cosine' or 'euclidean'.
      on_device: compute products with JAX (`product_function`).

    Returns:
      query float32[q, d] → float32[q, n].

    Raises:
      ValueError: an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    first = first_equal_row(gallery)
    duplicates = np.flatnonzero(first != np.arange(len(first)))
    if metric == "cosine":
        # The query's norm is the same for its whole row, and the gallery's norms are divided out after the product.
        gallery, factor = _direction(gallery)
        half_squares = np.float32(0)
        scale = None
    else:
        scale = scale_to_one(gallery)
        gallery = gallery * scale if scale != 1 else gallery
        half_squares, factor = squared_norms(gallery) / 2, np.float32(1)
    product = product_function(gallery, on_device)

    def distances(query: np.ndarray) -> np.ndarray:
        result = product(_direction(query)[0] if scale is None else query * scale)
        result *= factor
        np.subtract(half_squares, result, out=result)  # never −0, which would not tie with 0
        result[:, duplicates] = result[:, first[duplicates]]
        return result

    return distances


def scale_to_one(features: np.ndarray) -> np.float32:
    """The power of two that scales the largest |value| to near 1, so that no square overflows; exact in float32."""
    largest = max(np.max(features, initial=0), -np.min(features, initial=0))
    return np.ldexp(np.float32(1), -int(np.frexp(largest)[1]))


def product_function(gallery: np.ndarray, on_device: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return `query float32[q, d] → query @ gallery.T`, computed by numpy, or with `on_device` by JAX.

    JAX computes on its default device, to which the gallery float32[n, d] is copied once, in full float32 precision.
    """
    if not on_device:
        return lambda query: query @ gallery.T
    import jax

    gallery_on_device = jax.device_put(gallery)
    return lambda query: np.array(_device_product()(query, gallery_on_device))


@functools.cache
def _device_product() -> Callable:
    import jax

    # Without this, XLA tries out variants of the product for longer than the product takes.
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    return jax.jit(
        lambda query, gallery: jax.numpy.matmul(query, gallery.T, precision=jax.lax.Precision.HIGHEST),
        compiler_options=options,
    )


def rank_gallery(distance: Float32[np.ndarray, "q n"], number: int | None = None) -> Int[np.ndarray, "q m"]:
    """Rank the gallery for each query: ascending distance, equal distances in gallery order.

    Each int64 key holds the distance's bits above the gallery index. So a plain sort, which numpy vectorises, is stable
    too, at several times the speed of a stable argsort.

    Args:
      distance: without NaN.
      number: how many of the nearest to return; None: all.

    Returns:
      Gallery indices, the nearest first; m is the smaller of n and `number`.
    """
    bits = np.ascontiguousarray(distance, np.float32).view(np.int32)
    bits = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # negative floats: now ordered as integers too
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= np.arange(distance.shape[1], dtype=np.int64)
    if number is not None and number < keys.shape[1]:
        keys.partition(number - 1, axis=1)
        keys = keys[:, :number].copy()
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys


def relative_identities(
    query_pids: Int[np.ndarray, " q"], gallery_pids: Int[np.ndarray, " n"]
) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], int]:
    """Renumber identities for each query, so that 0 is the query's own.

    Returns:
      `relative(rows, order) → int[r, m]`, for queries `rows` int[r] and ranked gallery images `order` int[r, m]: 0
      where an image shows the query's identity, and one other number for each other identity; and how many different
      numbers it gives.
    """
    pids, codes = np.unique(gallery_pids, return_inverse=True)
    found = np.searchsorted(pids, query_pids).clip(max=len(pids) - 1)
    own = np.where(pids[found] == query_pids, found, len(pids))  # the last: an identity that the gallery lacks
    number = len(pids) + 1
    small = np.int16 if number < 2**14 else np.int64
    codes, own = codes.reshape(-1).astype(small), own.astype(small)

    def relative(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        difference = codes.take(order) - own[rows][:, None]
        difference += (difference < 0) * small(number)
        return difference

    return relative, number


class QueryScores(NamedTuple):
    """The scores of q queries; a query without a match has `matches` 0 and must not be averaged.

    Attributes:
      matches: the number of gallery images that show the query's identity.
      identity_rank: the position of the query's identity, from 1, when each identity counts once, at its first image.
      image_rank: the position of the first matching image, from 1.
      average_precision: the mean over the matches of (matches so far / position), from 0 to 1.
      inverse_penalty: matches / position of the last match, from 0 to 1; mINP is its mean.
    """

    matches: Int[np.ndarray, " q"]
    identity_rank: Int[np.ndarray, " q"]
    image_rank: Int[np.ndarray, " q"]
    average_precision: Float64[np.ndarray, " q"]
    inverse_penalty: Float64[np.ndarray, " q"]


def score_rankings(
    ranked_identities: Int[np.ndarray, "q n"], keep: Bool[np.ndarray, "q n"], num_identities: int
) -> QueryScores:
    """Score q rankings of n gallery images each; only the images to `keep` count.

    Args:
      ranked_identities: the images' identities in ranked order, from 0 to num_identities − 1, renumbered for each query
        so that 0 is its own (`relative_identities`).
      keep: whether the image is in this query's gallery at all, by the rules on trials and cameras.
      num_identities: the number of different numbers that `ranked_identities` may hold.
    """
    num_queries = len(keep)
    ends = np.cumsum(np.count_nonzero(keep, axis=1))
    starts = np.concatenate([[0], ends[:-1]])
    # The kept images of all queries, concatenated; those of query i are [starts[i], ends[i]).
    identities = np.compress(keep.ravel(), ranked_identities.ravel())
    hits = np.flatnonzero(identities == 0)

    row = np.searchsorted(ends, hits, side="right")
    position = hits - starts[row] + 1
    matches = np.bincount(row, minlength=num_queries)
    last_hit = np.cumsum(matches) - 1
    first_hit = last_hit - matches + 1
    ordinal = np.arange(len(hits)) - first_hit[row] + 1

    matched = matches > 0
    image_rank = np.zeros(num_queries, np.int64)
    image_rank[matched] = position[first_hit[matched]]
    last_position = np.ones(num_queries, np.int64)
    last_position[matched] = position[last_hit[matched]]
    precision = np.bincount(row, weights=ordinal / position, minlength=num_queries)

    # Identities that come before the first match: only these prefixes are looked at.
    ahead = np.maximum(image_rank - 1, 0)
    owner = np.repeat(np.arange(num_queries), ahead)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(ahead) - ahead, ahead)
    met = np.zeros((num_queries, num_identities), bool)
    met[owner, identities[starts[owner] + offset]] = True
    identity_rank = np.where(matched, np.count_nonzero(met, axis=1) + 1, 0)

    return QueryScores(matches, identity_rank, image_rank, precision / np.maximum(matches, 1), matches / last_position)


def query_figures(scores: QueryScores, cmc: str) -> Float64[np.ndarray, "6 q"]:
    """Each query's own FIGURES as fractions, one row a figure; columns without a match must not be averaged.

    Args:
      scores: of q queries.
      cmc: what a rank counts: 'identity' counts each identity once, at its first image; 'image' counts images.

    Raises:
      ValueError: an unknown `cmc`.
    """
    if cmc not in CMC_DEFINITIONS:
        raise ValueError(f"cmc must be one of {CMC_DEFINITIONS}, got {cmc!r}")
    position = scores.identity_rank if cmc == "identity" else scores.image_rank
    return np.stack([*(position <= k for k in RANKS), scores.average_precision, scores.inverse_penalty])


def summarize(scores: QueryScores, cmc: str) -> dict[str, float]:
    """The FIGURES in percent, averaged over the queries that have a match; `cmc` as in `query_figures`.

    Raises:
      ValueError: no query has a match, or an unknown `cmc`.
    """
    matched = scores.matches > 0
    if not matched.any():
        raise ValueError("no query has a match in its gallery")
    means = query_figures(scores, cmc)[:, matched].mean(axis=1)
    return {name: 100.0 * float(mean) for name, mean in zip(FIGURES, means, strict=True)}
