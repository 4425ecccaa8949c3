"""From embeddings to the figures of a results table: `evaluate_embeddings`, the one evaluator of this project."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mpanet_jax.cpus import available_cpus
from mpanet_jax.datasets import make_protocol
from mpanet_jax.embeddings import Embeddings, check_embeddings, load_embeddings
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.bootstrap import bootstrap_intervals
from mpanet_jax.evaluation.metrics import (
    CMC_DEFINITIONS,
    FIGURES,
    METRICS,
    QueryScores,
    distance_function,
    rank_gallery,
    relative_identities,
    score_rankings,
    summarize,
)
from mpanet_jax.evaluation.rerank import k_reciprocal, squared_distances
from mpanet_jax.progress import Bar, track
from mpanet_jax.protocol import Comparison, Protocol, check_pair

_CHUNK = 2**25  # distances held at once: 128 MiB of float32
_BLOCK = 2**20  # distances ranked by one thread at once; smaller blocks spend their time waiting for Python's lock


def evaluate(
    query: Embeddings | str | os.PathLike,
    gallery: Embeddings | str | os.PathLike,
    *,
    protocol: Protocol | str,
    permutation: str | os.PathLike | None = None,
    metric: str | None = None,
    cmc: str | None = None,
    rerank: bool = False,
) -> dict[str, dict]:
    """Evaluate embeddings of any framework by a protocol (docs/protocols.md).

    Args:
      query, gallery: the two sets, or the `.npz` files that hold them (`embeddings.load_embeddings`). For regdb, llcm
        and own these are the visible and the infrared images.
      protocol: 'sysu_mm01', 'sysu_mm01_random', 'regdb', 'llcm', 'own' or 'query_gallery'; or a `Protocol`.
      permutation: SYSU-MM01's rand_perm_cam.mat, which protocol 'sysu_mm01' needs.
      metric: 'cosine' or 'euclidean'; by default the protocol's.
      cmc: 'identity' (first appearance of each identity) or 'image'; by default the protocol's.
      rerank: k-reciprocal re-ranking, within each trial's gallery.

    Returns:
      {'sysu/all/single': {'rank1': percent, …, 'mAP', 'mINP', 'std', 'interval', …}, …}, as `evaluate_embeddings`;
      `metrics_output.format_table` makes a table of it.

    Raises:
      ArgumentError: an argument has a value that there isn't, or the protocol needs one that is missing.
      UserError: a file that cannot be read, or embeddings that do not fit the protocol.
    """
    if isinstance(protocol, str):
        protocol = make_protocol(protocol, permutation=permutation)
    elif not isinstance(protocol, Protocol):
        raise ArgumentError("protocol", f"= {protocol!r}: expected a protocol or its name")
    elif permutation is not None:
        raise ArgumentError("permutation", "goes with the name of a protocol; the protocol that was given has its own")
    query, gallery = (x if isinstance(x, Embeddings) else load_embeddings(x) for x in (query, gallery))
    return evaluate_embeddings(query, gallery, protocol=protocol, metric=metric, cmc=cmc, rerank=rerank)


def evaluate_embeddings(
    query: Embeddings,
    gallery: Embeddings,
    *,
    protocol: Protocol,
    metric: str | None = None,
    cmc: str | None = None,
    rerank: bool = False,
    trial: int | None = None,
    on_device: bool = False,
) -> dict[str, dict]:
    """Evaluate `query` against `gallery` by a protocol (docs/protocols.md).

    Args:
      query: one of the two sets that the protocol wants.
      gallery: the other one.
      protocol: who is compared with whom; `datasets.make_protocol` makes one by its name.
      metric: 'cosine' or 'euclidean'; by default the protocol's.
      cmc: 'identity' (first appearance of each identity) or 'image'; by default the protocol's.
      rerank: k-reciprocal re-ranking, within each trial's gallery.
      trial: RegDB's split that the model was trained and tested on; stored in the result.
      on_device: compute the distances' products by JAX, on its default device, instead of by numpy.

    Returns:
      {'sysu/all/single': {what `evaluate_comparison` returns, 'protocol' (, 'trial')}, …}

    Raises:
      ArgumentError: an unknown `metric` or `cmc`.
      UserError: embeddings that do not fit the protocol.
    """
    metric, cmc = metric or protocol.metric, cmc or protocol.cmc
    for argument, value, known in (("metric", metric, METRICS), ("cmc", cmc, CMC_DEFINITIONS)):
        if value not in known:
            raise ArgumentError(argument, f"= {value!r}: expected one of {', '.join(known)}")
    query, gallery = check_embeddings(query), check_embeddings(gallery)
    check_pair(query, gallery)
    results = {}
    for comparison in protocol.comparisons(query, gallery):
        for name, values in evaluate_comparison(comparison, metric, cmc, rerank=rerank, on_device=on_device).items():
            results[name] = {**values, "protocol": protocol.name, **({} if trial is None else {"trial": int(trial)})}
    return results


def evaluate_comparison(
    comparison: Comparison, metric: str, cmc: str, *, rerank: bool = False, on_device: bool = False
) -> dict[str, dict]:
    """Evaluate every setting of a comparison; arguments as in `evaluate_embeddings`.

    Returns:
      {setting: {'rank1', 'rank5', 'rank10', 'rank20', 'mAP', 'mINP' (percent, mean over trials), 'std' (the same keys;
      population standard deviation over trials), 'interval' (the same keys; [low, high], see `bootstrap_intervals`; not
      where only one identity has a match), 'rerank', 'metric', 'cmc', 'trials', 'num_query', 'num_query_without_match',
      'num_gallery'}, …}

    Raises:
      UserError: a trial in which no query has a match.
    """
    query, results = comparison.query, {}
    scores = (_score_reranked if rerank else _score_plain)(comparison, metric, on_device)
    for setting, trials in zip(comparison.settings, scores, strict=True):
        if not all((trial_scores.matches > 0).any() for trial_scores in trials):
            raise UserError(
                f"{setting.name}: no query of {query.source} has a match in "
                f"{comparison.gallery.source}; are both of the same test identities?"
            )
        summaries = [summarize(trial_scores, cmc) for trial_scores in trials]
        intervals = bootstrap_intervals(query.pids, trials, cmc)
        results[setting.name] = {
            **{name: float(np.mean([s[name] for s in summaries])) for name in FIGURES},
            "std": {name: float(np.std([s[name] for s in summaries])) for name in FIGURES},
            **({"interval": {name: list(ends) for name, ends in intervals.items()}} if intervals else {}),
            "rerank": bool(rerank),
            "metric": metric,
            "cmc": cmc,
            "trials": len(trials),
            "num_query": len(query),
            "num_query_without_match": int(np.mean([np.sum(t.matches == 0) for t in trials])),
            "num_gallery": int(np.mean([len(rows) for rows in setting.galleries])),
        }
    return results


Galleries = list[list[np.ndarray]]  # rows of the gallery, [setting][trial]


def _score_plain(comparison: Comparison, metric: str, on_device: bool) -> list[list[QueryScores]]:
    """Score every setting and trial: result[setting][trial]. Each distance is computed, and each query ranked, once."""
    distances = distance_function(comparison.gallery.features, metric, on_device=on_device)
    galleries = [setting.galleries for setting in comparison.settings]
    return _score(comparison, lambda rows: distances(comparison.query.features[rows]), galleries)


def _score_reranked(comparison: Comparison, metric: str, on_device: bool) -> list[list[QueryScores]]:
    """As `_score_plain`, with each trial's gallery re-ranked by itself: neighbours are its images and all queries."""
    distances = reranked_distances(comparison, metric, on_device=on_device)

    def score_trial(images: np.ndarray) -> QueryScores:
        return _score(comparison, distances(images), [[images]])[0][0]

    galleries = [images for setting in comparison.settings for images in setting.galleries]
    scores = track(map(score_trial, galleries), "re-ranking", len(galleries), unit="galleries")
    return [[next(scores) for _ in setting.galleries] for setting in comparison.settings]


def reranked_distances(
    comparison: Comparison, metric: str, *, on_device: bool = False
) -> Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """Gallery rows int[g] of a trial → (query rows int[r] → re-ranked distances float32[r, gallery]).

    They are infinite to images that are not in the trial's gallery.
    """
    query, gallery = comparison.query, comparison.gallery
    everything = squared_distances(np.concatenate([query.features, gallery.features]), metric, on_device=on_device)

    def of_trial(images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        reranked = k_reciprocal(
            everything.take(np.concatenate([np.arange(len(query)), len(query) + images])), len(query)
        )

        def distances(rows: np.ndarray) -> np.ndarray:
            distance = np.full((len(rows), len(gallery)), np.inf, np.float32)
            distance[:, images] = reranked(rows)
            return distance

        return distances

    return of_trial


def _score(
    comparison: Comparison, distances: Callable[[np.ndarray], np.ndarray], galleries: Galleries
) -> list[list[QueryScores]]:
    """Score against galleries[setting][trial] by `distances`: query rows int[r] → float32[r, gallery], in blocks."""
    score = _scorer(comparison)
    num_query, num_gallery = len(comparison.query), len(comparison.gallery)
    chunk, block_rows = max(1, _CHUNK // num_gallery), max(1, _BLOCK // num_gallery)
    parts = []
    with ThreadPoolExecutor(available_cpus()) as pool, Bar("ranking", num_query, unit="queries") as bar:
        for start in range(0, num_query, chunk):
            rows = np.arange(start, min(start + chunk, num_query))
            distance = distances(rows)
            blocks = np.array_split(np.arange(len(rows)), -(-len(rows) // block_rows))
            for block, part in zip(
                blocks,
                pool.map(lambda block: score(rows[block], distance[block], galleries), blocks),  # noqa: B023
                strict=True,
            ):
                parts.append(part)
                bar.advance(len(block))
    return [
        [_concatenate([part[setting][trial] for part in parts]) for trial in range(len(trials))]
        for setting, trials in enumerate(galleries)
    ]


def _scorer(comparison: Comparison) -> Callable[[np.ndarray, np.ndarray, Galleries], list[list[QueryScores]]]:
    """Return `score(rows, distance, galleries)`: rank queries `rows`, score them against galleries[setting][trial]."""
    gallery_size = len(comparison.gallery)
    relative, num_identities = relative_identities(comparison.query.pids, comparison.gallery.pids)

    def score(rows: np.ndarray, distance: np.ndarray, galleries: Galleries) -> list[list[QueryScores]]:
        order = rank_gallery(distance)
        results = []
        for trials in galleries:
            # One pass leaves only the images that any trial of this setting uses: single-shot uses few.
            used = _mask(np.concatenate(trials), gallery_size)
            ranked = np.compress(used.take(order).ravel(), order.ravel()).reshape(len(rows), -1)
            identities = relative(rows, ranked)
            allowed = comparison.gallery_groups.take(ranked) != comparison.query_groups[rows][:, None]
            results.append(
                [
                    score_rankings(identities, _mask(gallery, gallery_size).take(ranked) & allowed, num_identities)
                    for gallery in trials
                ]
            )
        return results

    return score


def _concatenate(parts: list[QueryScores]) -> QueryScores:
    return QueryScores(*map(np.concatenate, zip(*parts, strict=True)))


def _mask(rows: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[rows] = True
    return mask
