"""How much a figure depends on which people are in the test set: a bootstrap over query identities.

The interval is the percentile interval of Efron & Tibshirani, "An Introduction to the Bootstrap", 1993. Queries of one
identity are alike, so identities are drawn, each with all its queries: drawing single queries would give far too narrow
an interval.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mpanet_jax.evaluation.metrics import FIGURES, QueryScores, query_figures

LEVEL = 95  # percent of the resamples that an interval covers
RESAMPLES = 2000
SEED = 0
_BLOCK = 2**21  # draws held in memory at once


def bootstrap_intervals(
    pids: Int[np.ndarray, " q"],
    trials: Sequence[QueryScores],
    cmc: str,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, tuple[float, float]]:
    """Confidence intervals of LEVEL percent for the FIGURES.

    A figure is the mean over trials of its mean over queries. A resample draws as many identities as there are, with
    replacement, and the same ones for all trials; an identity that is drawn twice counts twice. A trial in which no
    query of a resample has a match is left out of that resample's mean.

    Args:
      pids: the identity of each of the q queries.
      trials: for each trial, the scores of the same q queries in its gallery.
      cmc: 'identity' or 'image', as in `query_figures`.
      resamples: the number of resamples.
      seed: seeds the draws.

    Returns:
      {'rank1': (low, high), …} in percent; empty if fewer than two identities have a query with a match.
    """
    scored = np.any([scores.matches > 0 for scores in trials], axis=0)
    order = np.flatnonzero(scored)[np.argsort(pids[scored], kind="stable")]
    starts = np.flatnonzero(np.diff(pids[order], prepend=pids[order[:1]] - 1))
    number = len(starts)
    if number < 2:
        return {}
    sums = np.stack([np.add.reduceat(_sums_and_count(scores, cmc)[:, order], starts, axis=1) for scores in trials])

    generator = np.random.default_rng(seed)
    means = []
    for first in range(0, resamples, block := max(1, _BLOCK // number)):
        rows = min(block, resamples - first)
        draws = generator.integers(number, size=(rows, number)) + number * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * number).reshape(rows, number)
        totals = (times.astype(np.float64) @ sums.reshape(-1, number).T).reshape(rows, len(trials), -1)
        values, count = totals[..., :-1], totals[..., -1:]
        means.append((values / np.maximum(count, 1)).sum(axis=1) / np.count_nonzero(count, axis=1))
    tail = (100 - LEVEL) / 2
    low, high = 100 * np.percentile(np.concatenate(means), (tail, 100 - tail), axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(FIGURES, low, high, strict=True)}


def _sums_and_count(scores: QueryScores, cmc: str) -> np.ndarray:
    """float64[7, q]: the FIGURES of each query, then 1; all 0 for a query without a match."""
    matched = scores.matches > 0
    return np.concatenate([query_figures(scores, cmc) * matched, matched[None]])
