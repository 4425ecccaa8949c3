"""The ranked galleries behind a results table: for each query its first images, and where the first right one is."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from mpanet_jax.embeddings import Embeddings, check_embeddings
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.evaluate import evaluate_comparison, reranked_distances
from mpanet_jax.evaluation.metrics import (
    QueryScores,
    distance_function,
    rank_gallery,
    relative_identities,
    score_rankings,
)
from mpanet_jax.progress import track
from mpanet_jax.protocol import Comparison, Protocol, check_pair
from mpanet_jax.row_norms import l2_normalize

TOP = 10  # images shown of each ranking
NOBODY = -1  # in place of a gallery row, where a ranking has no more images

_CHUNK = 2**22  # distances ranked at once


class UnknownSetting(ArgumentError):
    """A setting that the protocol does not have; `known` are those that it has."""

    def __init__(self, setting: str | None, known: list[str]):
        super().__init__("setting", f"= {setting!r}: expected one of {', '.join(known)}")
        self.known = known


@dataclass(frozen=True)
class Ranking:
    """All queries of one trial of a setting, ranked by the protocol: images that a query may not meet are left out.

    Attributes:
      query, gallery: the images; rows of `gallery` that are not in the trial's gallery appear in no ranking.
      top: int[Q, 10], the first gallery rows of each query, the nearest first; `NOBODY` where there are fewer.
      distances: float32[Q, 10], to these: 1 − cosine, or Euclidean; under re-ranking the order may differ from theirs.
      first: int[Q], the gallery row of the first right image; `NOBODY` where a query has none.
      first_distance: float32[Q], to it.
      scores: of each query, by the project's own metrics.
      setting, trial, num_trials: 'sysu/all/single', from 1, and of how many.
      num_gallery: images in the trial's gallery.
      metric, cmc, rerank: how the ranking was made, and what a rank counts ('identity' or 'image').
      metrics: of the setting over all its trials, as in metrics.json.
    """

    query: Embeddings
    gallery: Embeddings
    top: Int[np.ndarray, "q k"]
    distances: Float32[np.ndarray, "q k"]
    first: Int[np.ndarray, " q"]
    first_distance: Float32[np.ndarray, " q"]
    scores: QueryScores
    setting: str
    trial: int
    num_trials: int
    num_gallery: int
    metric: str
    cmc: str
    rerank: bool
    metrics: Mapping[str, Any]

    @property
    def rank(self) -> Int[np.ndarray, " q"]:
        """Of the first right image, from 1, counted as the CMC counts; 0 where there is none."""
        return self.scores.identity_rank if self.cmc == "identity" else self.scores.image_rank


def rank_queries(
    query: Embeddings,
    gallery: Embeddings,
    *,
    protocol: Protocol,
    setting: str | None = None,
    trial: int = 1,
    metric: str | None = None,
    cmc: str | None = None,
    rerank: bool = False,
    top: int = TOP,
) -> Ranking:
    """Rank every query of one trial of a setting, by the protocol's rules.

    Args:
      query, gallery, protocol, metric, cmc, rerank: as of `evaluate_embeddings`.
      setting: 'sysu/all/single'; None: the protocol's first.
      trial: which of the setting's galleries, from 1.
      top: how many images are kept of each ranking.

    Raises:
      ArgumentError: no such setting or trial.
      UserError: embeddings that do not fit the protocol, or no query with a match.
    """
    query, gallery = check_embeddings(query), check_embeddings(gallery)
    check_pair(query, gallery)
    comparison = _with_setting(protocol.comparisons(query, gallery), setting)
    chosen = comparison.settings[0]
    if not 1 <= trial <= len(chosen.galleries):
        number = len(chosen.galleries)
        raise ArgumentError("trial", f"= {trial}: expected 1 to {number}, the trials of {chosen.name}")
    metric, cmc = metric or protocol.metric, cmc or protocol.cmc
    metrics = evaluate_comparison(comparison, metric, cmc, rerank=rerank)[chosen.name]
    images = chosen.galleries[trial - 1]
    order = _rank(comparison, images, metric, rerank, top)
    return Ranking(
        query=comparison.query,
        gallery=comparison.gallery,
        top=order.top,
        distances=_distances(comparison, order.top, metric),
        first=order.first,
        first_distance=_distances(comparison, order.first[:, None], metric)[:, 0],
        scores=order.scores,
        setting=chosen.name,
        trial=trial,
        num_trials=len(chosen.galleries),
        num_gallery=len(images),
        metric=metric,
        cmc=cmc,
        rerank=rerank,
        metrics=metrics | {"protocol": protocol.name},
    )


def _with_setting(comparisons: list[Comparison], name: str | None) -> Comparison:
    """The comparison that `name` is a setting of, with that one alone."""
    names = [setting.name for comparison in comparisons for setting in comparison.settings]
    if not names:
        raise UserError("the protocol has no settings; expected at least one")
    name = name or names[0]
    if name not in names:
        raise UnknownSetting(name, names)
    for comparison in comparisons:
        settings = [setting for setting in comparison.settings if setting.name == name]
        if settings:
            return dataclasses.replace(comparison, settings=settings)
    raise AssertionError


@dataclass(frozen=True)
class _Order:
    top: np.ndarray
    first: np.ndarray
    scores: QueryScores


def _rank(comparison: Comparison, images: np.ndarray, metric: str, rerank: bool, top: int) -> _Order:
    query, gallery = comparison.query, comparison.gallery
    reranked = reranked_distances(comparison, metric)(images) if rerank else None
    plain = distance_function(gallery.features, metric)
    relative, num_identities = relative_identities(query.pids, gallery.pids)
    in_trial = np.zeros(len(gallery), bool)
    in_trial[images] = True

    def rank(rows: np.ndarray) -> _Order:
        order = rank_gallery(plain(query.features[rows]) if reranked is None else reranked(rows))
        order = order[in_trial[order]].reshape(len(rows), -1)
        keep = comparison.gallery_groups[order] != comparison.query_groups[rows][:, None]
        identities = relative(rows, order)
        scores = score_rankings(identities, keep, num_identities)
        right = keep & (identities == 0)
        first = np.where(right.any(1), order[np.arange(len(rows)), right.argmax(1)], NOBODY)
        # The kept images in front, in their order.
        kept_first = np.argsort(~keep, axis=1, kind="stable")[:, :top]
        shown = np.where(np.take_along_axis(keep, kept_first, 1), np.take_along_axis(order, kept_first, 1), NOBODY)
        if shown.shape[1] < top:
            shown = np.pad(shown, ((0, 0), (0, top - shown.shape[1])), constant_values=NOBODY)
        return _Order(shown, first, scores)

    step = max(1, _CHUNK // len(gallery))
    chunks = [np.arange(start, min(start + step, len(query))) for start in range(0, len(query), step)]
    parts = list(map(rank, track(chunks, "ranking", len(query), unit="queries", size=len)))
    scores = QueryScores(*map(np.concatenate, zip(*(part.scores for part in parts), strict=True)))
    return _Order(np.concatenate([p.top for p in parts]), np.concatenate([p.first for p in parts]), scores)


def _distances(comparison: Comparison, rows: np.ndarray, metric: str) -> np.ndarray:
    """float32[q, k]: from each query to its k gallery rows, 1 − cosine or Euclidean; NaN to `NOBODY`."""
    query, gallery = comparison.query.features, comparison.gallery.features
    if metric == "cosine":
        query, gallery = l2_normalize(query), l2_normalize(gallery)
    result = np.full(rows.shape, np.nan, np.float32)
    for place, columns in enumerate(rows.T):
        there = np.flatnonzero(columns != NOBODY)
        difference = query[there] - gallery[columns[there]]
        squares = np.einsum("nd,nd->n", difference, difference)
        # ‖a − b‖² = 2 − 2 cos of unit vectors
        result[there, place] = squares / 2 if metric == "cosine" else np.sqrt(squares)
    return result
