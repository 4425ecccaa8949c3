"""From embeddings to the figures of a results table: `evaluate_embeddings`, the one evaluator of this project."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mpanet_jax.cpus import available_cpus
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.metrics import (
    CMC_DEFINITIONS,
    METRICS,
    QueryScores,
    distance_function,
    rank_gallery,
    relative_identities,
    score_rankings,
    summarize,
)
from mpanet_jax.evaluation.protocols import DEFAULTS, Comparison, Embeddings, check_embeddings, comparisons
from mpanet_jax.evaluation.rerank import k_reciprocal, squared_distances

FIGURES = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
_CHUNK = 2**25  # distances held at once: 128 MiB of float32
_BLOCK = 2**20  # distances ranked by one thread at once; smaller blocks spend their time waiting for Python's lock


def evaluate_embeddings(
    query: Embeddings,
    gallery: Embeddings,
    *,
    protocol: str,
    permutation: str | os.PathLike | None = None,
    metric: str | None = None,
    cmc: str | None = None,
    rerank: bool = False,
    trial: int | None = None,
) -> dict[str, dict]:
    """Evaluate `query` against `gallery` by a named protocol (docs/method.md).

    Args:
      query, gallery: SYSU-MM01: every test image of cameras 3 and 6, and of cameras 1, 2, 4 and 5. RegDB and LLCM: the
        visible and the infrared test images, for both directions.
      protocol: 'sysu_mm01' (ten galleries from the data set's permutation file), 'sysu_mm01_random' (ten seeded random
        galleries), 'regdb' or 'llcm'.
      permutation: path of rand_perm_cam.mat, for 'sysu_mm01' alone.
      metric: 'cosine' or 'euclidean'; by default the protocol's.
      cmc: 'identity' (first appearance of each identity) or 'image'; by default the protocol's.
      rerank: k-reciprocal re-ranking, within each trial's gallery.
      trial: RegDB's split that the model was trained and tested on; stored in the result.

    Returns:
      {'sysu/all/single': {'rank1', 'rank5', 'rank10', 'rank20', 'mAP', 'mINP' (percent, mean over trials), 'std' (the
      same keys; population standard deviation over trials), 'rerank', 'protocol', 'metric', 'cmc', 'trials',
      'num_query', 'num_query_without_match', 'num_gallery' (, 'trial')}, …}

    Raises:
      UserError: an unknown name, or embeddings that do not fit the protocol.
    """
    pairs = comparisons(protocol, check_embeddings(query), check_embeddings(gallery), permutation)
    metric, cmc = metric or DEFAULTS[protocol][0], cmc or DEFAULTS[protocol][1]
    for flag, value, known in (("--metric", metric, METRICS), ("--cmc", cmc, CMC_DEFINITIONS)):
        if value not in known:
            raise UserError(f"{flag}: unknown value {value!r}; expected one of {', '.join(known)}")
    results = {}
    for comparison in pairs:
        scores = _score_reranked(comparison, metric) if rerank else _score(comparison, metric)
        for setting, trials in zip(comparison.settings, scores, strict=True):
            if not all((trial_scores.matches > 0).any() for trial_scores in trials):
                raise UserError(
                    f"{setting.name}: no query of {comparison.query.source} has a match in "
                    f"{comparison.gallery.source}; are both of the same test identities?"
                )
            summaries = [summarize(trial_scores, cmc) for trial_scores in trials]
            results[setting.name] = {
                **{name: float(np.mean([s[name] for s in summaries])) for name in FIGURES},
                "std": {name: float(np.std([s[name] for s in summaries])) for name in FIGURES},
                "rerank": bool(rerank),
                "protocol": protocol,
                "metric": metric,
                "cmc": cmc,
                "trials": len(trials),
                "num_query": len(comparison.query),
                "num_query_without_match": int(np.mean([np.sum(t.matches == 0) for t in trials])),
                "num_gallery": int(np.mean([len(rows) for rows in setting.galleries])),
                **({} if trial is None else {"trial": int(trial)}),
            }
    return results


def _score(comparison: Comparison, metric: str) -> list[list[QueryScores]]:
    """Score every setting and trial: result[setting][trial]. Each distance is computed, and each query ranked, once."""
    query, gallery = comparison.query, comparison.gallery
    distances = distance_function(gallery.features, metric)
    galleries = [setting.galleries for setting in comparison.settings]
    score = _scorer(comparison)
    chunk = max(1, _CHUNK // len(gallery))
    parts = []
    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(query), chunk):
            rows = np.arange(start, min(start + chunk, len(query)))
            distance = distances(query.features[rows])
            blocks = np.array_split(np.arange(len(rows)), min(len(rows), -(-distance.size // _BLOCK)))
            parts.extend(pool.map(lambda block: score(rows[block], distance[block], galleries), blocks))  # noqa: B023
    return [
        [_concatenate([part[setting][trial] for part in parts]) for trial in range(len(trials))]
        for setting, trials in enumerate(galleries)
    ]


def _score_reranked(comparison: Comparison, metric: str) -> list[list[QueryScores]]:
    """As `_score`, with each trial's gallery re-ranked by itself: neighbours outside it are unknown to the method."""
    query, gallery = comparison.query, comparison.gallery
    distance = squared_distances(np.concatenate([query.features, gallery.features]), metric)
    score = _scorer(comparison)
    every_query = np.arange(len(query))
    results = []
    for setting in comparison.settings:
        trials = []
        for rows in setting.galleries:
            images = np.concatenate([every_query, len(query) + rows])
            everywhere = np.full((len(query), len(gallery)), np.inf, np.float32)
            everywhere[:, rows] = k_reciprocal(distance[np.ix_(images, images)], len(query))
            trials.append(score(every_query, everywhere, [[rows]])[0][0])
        results.append(trials)
    return results


def _scorer(comparison: Comparison) -> Callable[[np.ndarray, np.ndarray, list], list[list[QueryScores]]]:
    """Return `score(rows, distance, galleries)`: rank queries `rows`, score them against galleries[setting][trial]."""
    gallery_size = len(comparison.gallery)
    relative, num_identities = relative_identities(comparison.query.pids, comparison.gallery.pids)

    def score(rows: np.ndarray, distance: np.ndarray, galleries: list[list[np.ndarray]]) -> list[list[QueryScores]]:
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


def format_table(metrics: Mapping[str, Mapping]) -> str:
    """Lay out metrics for the terminal: how they were measured above, one line for each setting below."""
    titles = ("Rank-1", "Rank-5", "Rank-10", "Rank-20", "mAP", "mINP")
    width = max([len("setting"), *map(len, metrics)])
    lines, described = [], None  # "queries" counts those with a match, which alone are averaged
    for name, values in metrics.items():
        description = describe(values)
        if description != described:
            described = description
            lines += ["", description] if lines else [description]
            lines.append(
                f"{'setting':<{width}}" + "".join(f"{title:>15}" for title in titles) + f"{'queries':>9}{'gallery':>9}"
            )
        cells = [f"{values[key]:.2f} ± {values['std'][key]:.2f}" for key in FIGURES]
        scored = values["num_query"] - values["num_query_without_match"]
        lines.append(f"{name:<{width}}" + "".join(f"{c:>15}" for c in cells) + f"{scored:>9}{values['num_gallery']:>9}")
    left_out = [
        f"{name} {values['num_query_without_match']} of {values['num_query']}"
        for name, values in metrics.items()
        if values["num_query_without_match"]
    ]
    if left_out:
        lines.append(f"left out, for lack of a match in the gallery: queries of {', '.join(left_out)}")
    return "\n".join(lines)


def describe(values: Mapping) -> str:
    """One line that says how figures were measured."""
    trials = "1 trial" if values["trials"] == 1 else f"mean ± standard deviation of {values['trials']} trials"
    split = f" · trial {values['trial']}" if "trial" in values else ""
    checkpoint = f" · {values['checkpoint']} checkpoint" if "checkpoint" in values else ""
    return (
        f"protocol {values['protocol']}{split}{checkpoint} · metric {values['metric']} · CMC by {values['cmc']} · "
        f"re-ranking {'ON (k-reciprocal)' if values['rerank'] else 'off'} · {trials} · percent"
    )


def write_metrics(path: str | os.PathLike, metrics: Mapping[str, Mapping]) -> None:
    """Write metrics as JSON; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(metrics, file, indent=2)
            file.write("\n")
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
