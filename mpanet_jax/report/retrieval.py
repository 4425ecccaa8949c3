"""The rankings behind a results table: each query's first images, and the position of the first right one."""

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
NOBODY = -1  # stands for a gallery row where there is none

_CHUNK = 2**22  # distances ranked at once


class UnknownSetting(ArgumentError):
    """The protocol does not have this setting; `known` are those that it has."""

    def __init__(self, setting: str | None, known: list[str]):
        super().__init__("setting", f"= {setting!r}: expected one of {', '.join(known)}")
        self.known = known


@dataclass(frozen=True)
class Ranking:
    """The rankings of all q queries in one trial of a setting, without the images that the protocol excludes.

    Attributes:
      query, gallery: the images; a row of `gallery` outside the trial's gallery is in no ranking.
      top: the first k gallery rows of each query, the nearest first; `NOBODY` where there are fewer.
      distances: their distances from the query, 1 − cosine or Euclidean; re-ranking may order images differently.
      first: the gallery row of each query's first right image; `NOBODY` if it has none.
      first_distance: the distance of that image, NaN if there is none.
      scores: each query's scores, as the evaluator computes them.
      setting: the setting's name, such as 'sysu/all/single'.
      trial, num_trials: which trial, from 1, and how many the setting has.
      num_gallery: the number of images in the trial's gallery.
      metric, cmc, rerank: how images were ranked, and what a rank counts ('identity' or 'image').
      metrics: the metrics of the setting over all its trials, as in metrics.json.
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
        """The rank of the first right image, from 1, as the CMC counts it; 0 if there is none."""
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
    """Rank the gallery for every query in one trial of a setting, by the protocol's rules.

    Args:
      query, gallery, protocol, metric, cmc, rerank: as for `evaluate_embeddings`.
      setting: the setting's name, such as 'sysu/all/single'; None: the protocol's first.
      trial: which of the setting's galleries, from 1.
      top: how many images to keep of each ranking.

    Raises:
      ArgumentError: there is no such setting or trial.
      UserError: the embeddings do not fit the protocol, or no query has a match.
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
    """The comparison that has the setting `name` (None: the first), reduced to that setting."""
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
        # A stable sort moves the kept images to the front and leaves their order.
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
    """float32[q, k]: distances from each query to its k gallery rows, 1 − cosine or Euclidean; NaN for `NOBODY`."""
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
