"""From embeddings to the figures of a results table: `evaluate_embeddings`, the project's only evaluator."""

import os
from collections import deque
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

# Distances computed at once. On the CPU 2²⁵ are faster than fewer; on an accelerator the threads should get some soon.
_CHUNK, _CHUNK_ON_DEVICE = 2**25, 2**23
_BLOCK = 2**20  # distances one thread ranks at once; with smaller blocks the threads wait for Python's lock


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
    """Evaluate embeddings from any framework by a protocol (docs/protocols.md).

    Args:
      query, gallery: the two sets, or the `.npz` files that hold them (`embeddings.load_embeddings`). For regdb, llcm
        and own they are the visible and the infrared images.
      protocol: 'sysu_mm01', 'sysu_mm01_random', 'regdb', 'llcm', 'own' or 'query_gallery'; or a `Protocol`.
      permutation: the path of SYSU-MM01's rand_perm_cam.mat, which protocol 'sysu_mm01' needs.
      metric: 'cosine' or 'euclidean'; by default the protocol's.
      cmc: 'identity' (first appearance of each identity) or 'image'; by default the protocol's.
      rerank: k-reciprocal re-ranking, within each trial's gallery.

    Returns:
      {'sysu/all/single': {'rank1': percent, …, 'mAP', 'mINP', 'std', 'interval', …}, …}, as `evaluate_embeddings`
      gives it; `metrics_output.format_table` makes a table of it.

    Raises:
      ArgumentError: an argument has an unknown value, or one that the protocol needs is missing.
      UserError: a file cannot be read, or the embeddings do not fit the protocol.
    """
    if isinstance(protocol, str):
        protocol = make_protocol(protocol, permutation=permutation)
    elif not isinstance(protocol, Protocol):
        raise ArgumentError("protocol", f"= {protocol!r}: expected a protocol or its name")
    elif permutation is not None:
        raise ArgumentError(
            "permutation", "goes with a protocol's name; the protocol object given has its own: omit it"
        )
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
      query, gallery: the two sets of embeddings that the protocol compares.
      protocol: who is compared with whom; `datasets.make_protocol` makes one from its name.
      metric: 'cosine' or 'euclidean'; by default the protocol's.
      cmc: 'identity' (first appearance of each identity) or 'image'; by default the protocol's.
      rerank: k-reciprocal re-ranking, within each trial's gallery.
      trial: the RegDB split that the model was trained and tested on; it is only stored in the result.
      on_device: compute the matrix products of the distances with JAX on its default device, instead of with numpy.

    Returns:
      {setting: metrics}, such as {'sysu/all/single': {'rank1': …, …}, …}: what `evaluate_comparison` gives, and
      'protocol' and, if given, 'trial'.

    Raises:
      ArgumentError: `metric` or `cmc` is unknown.
      UserError: the embeddings do not fit the protocol.
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
    """Evaluate every setting of a comparison; the other arguments are those of `evaluate_embeddings`.

    Returns:
      {setting: metrics}, where metrics are 'rank1', 'rank5', 'rank10', 'rank20', 'mAP' and 'mINP' (percent, mean over
      the trials); 'std' (the same keys; population standard deviation over the trials); 'interval' (the same keys;
      [low, high] of `bootstrap_intervals`; absent if only one identity has a match); 'rerank', 'metric' and 'cmc';
      'trials' (their number); 'num_query'; 'num_query_without_match' and 'num_gallery' (means over the trials).

    Raises:
      UserError: there is a trial in which no query has a match.
    """
    query, results = comparison.query, {}
    scores = (_score_reranked if rerank else _score_plain)(comparison, metric, on_device)
    for setting, trials in zip(comparison.settings, scores, strict=True):
        if not all((trial_scores.matches > 0).any() for trial_scores in trials):
            raise UserError(
                f"{setting.name}: no query of {query.source} has a match in {comparison.gallery.source}; "
                "expected images of the same test identities in both"
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


Galleries = list[list[np.ndarray]]  # int[g], the gallery rows of each [setting][trial]


def _score_plain(comparison: Comparison, metric: str, on_device: bool) -> list[list[QueryScores]]:
    """Score every setting and trial, result[setting][trial]; each distance is computed and each query ranked once."""
    distances = distance_function(comparison.gallery.features, metric, on_device=on_device)
    galleries = [setting.galleries for setting in comparison.settings]
    return _score(comparison, lambda rows: distances(comparison.query.features[rows]), galleries, on_device=on_device)


def _score_reranked(comparison: Comparison, metric: str, on_device: bool) -> list[list[QueryScores]]:
    """Like `_score_plain`, but every trial is re-ranked by itself, among its gallery's images and all queries."""
    distances = reranked_distances(comparison, metric, on_device=on_device)

    def score_trial(images: np.ndarray) -> QueryScores:
        return _score(comparison, distances(images), [[images]])[0][0]

    galleries = [images for setting in comparison.settings for images in setting.galleries]
    scores = track(map(score_trial, galleries), "re-ranking", len(galleries), unit="galleries")
    return [[next(scores) for _ in setting.galleries] for setting in comparison.settings]


def reranked_distances(
    comparison: Comparison, metric: str, *, on_device: bool = False
) -> Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """Prepare the re-ranked distances of a comparison; the arguments are those of `evaluate_embeddings`.

    Returns:
      A function of a trial's gallery rows int[g]. It returns a function of query rows int[r] that gives their re-ranked
      distances float32[r, n] to all n gallery images, infinite to images outside the trial's gallery.
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
    comparison: Comparison,
    distances: Callable[[np.ndarray], np.ndarray],
    galleries: Galleries,
    *,
    on_device: bool = False,
) -> list[list[QueryScores]]:
    """Score all queries against galleries[setting][trial], in blocks.

    `distances` takes query rows int[r] and gives their distances float32[r, n] to all n gallery images, by an
    accelerator if `on_device`.
    """
    score = _scorer(comparison)
    num_query, num_gallery = len(comparison.query), len(comparison.gallery)
    chunk = max(1, (_CHUNK_ON_DEVICE if on_device else _CHUNK) // num_gallery)
    block_rows = max(1, _BLOCK // num_gallery)
    # An accelerator computes distances while threads rank those before; on the CPU they would be in each other's way.
    most_waiting = 2 * available_cpus() if on_device else 0
    parts, waiting = [], deque()
    with ThreadPoolExecutor(available_cpus()) as pool, Bar("ranking", num_query, unit="queries") as bar:

        def collect(until: int) -> None:
            while len(waiting) > until:
                scoring, number = waiting.popleft()
                parts.append(scoring.result())
                bar.advance(number)

        for start in range(0, num_query, chunk):
            # The last chunk begins earlier, so that all have one shape and an accelerator compiles one program.
            first = max(0, min(start, num_query - chunk))
            rows = np.arange(first, min(first + chunk, num_query))
            rows, distance = rows[start - first :], distances(rows)[start - first :]
            for begin in range(0, len(rows), block_rows):
                block = slice(begin, begin + block_rows)
                waiting.append((pool.submit(score, rows[block], distance[block], galleries), len(rows[block])))
            collect(until=most_waiting)
        collect(until=0)
    return [
        [_concatenate([part[setting][trial] for part in parts]) for trial in range(len(trials))]
        for setting, trials in enumerate(galleries)
    ]


def _scorer(comparison: Comparison) -> Callable[[np.ndarray, np.ndarray, Galleries], list[list[QueryScores]]]:
    """Return `score(rows, distance, galleries)`, which ranks query rows and scores them for each [setting][trial]."""
    gallery_size = len(comparison.gallery)
    relative, num_identities = relative_identities(comparison.query.pids, comparison.gallery.pids)

    def score(rows: np.ndarray, distance: np.ndarray, galleries: Galleries) -> list[list[QueryScores]]:
        order = rank_gallery(distance)
        results = []
        for trials in galleries:
            # Keep only the images that some trial of this setting uses; single-shot settings use few.
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
