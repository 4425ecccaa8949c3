"""Turns a similarity into the probability that two images show the same person, for each kind of pair.

log-odds = slope · similarity + intercept + log(prior / (1 − prior)), fitted by logistic regression. In the fit, the
pairs of the same person and those of different people weigh ½ each (a prior of ½); any other prior can be put in later.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import ArgumentError, UserError, first_line
from mpanet_jax.evaluation.verification import (
    FALSE_POSITIVE_RATES,
    FEWEST_FALSE,
    KINDS,
    Pairs,
    area_under,
    equal_error_rate,
    make_curve,
    make_pairs,
    split_identities,
    true_positive_rate_at,
)
from mpanet_jax.files import write_whole
from mpanet_jax.protocol import Protocol

FORMAT = {"format": "mpanet_jax calibration", "version": 1}
NUM_BINS = 10  # of the reliability diagram
CURVE_POINTS = 100  # of the ROC curve that calibration.json keeps, at most


@dataclass(frozen=True)
class Logistic:
    """The line of log-odds: log-odds of 'same person' at prior ½ = slope · similarity + intercept."""

    slope: float
    intercept: float

    def probability(self, similarity: Any, prior: float) -> Any:
        """The probability of 'same person' for similarities of any shape.

        `prior` is the share of pairs of the same person among all pairs that are asked about.
        """
        return expit(self.slope * np.asarray(similarity, np.float64) + self.intercept + logit(prior))


def fit_logistic(pairs: Pairs) -> Logistic:
    """Fit the line of log-odds with the smallest cross-entropy, by Newton's method.

    The pairs of the same person and those of different people weigh ½ each. The targets are Platt's (1999):
    (n + 1)/(n + 2) for n pairs of the same person and 1/(m + 2) for m others, instead of 1 and 0. So there is a finite
    solution even if a threshold separates the two without an error.
    """
    count = {sort: int(np.count_nonzero(pairs.same == sort)) for sort in (True, False)}
    target = np.where(pairs.same, (count[True] + 1) / (count[True] + 2), 1 / (count[False] + 2))
    weight = 0.5 / np.where(pairs.same, count[True], count[False])
    similarity = pairs.similarity.astype(np.float64)
    centre, scale = similarity.mean(), similarity.std() or 1.0
    x = (similarity - centre) / scale

    def loss(line: np.ndarray) -> float:
        z = line[0] * x + line[1]
        return float(weight @ (np.logaddexp(0, z) - target * z))

    line = np.zeros(2)
    for _ in range(100):
        p = expit(line[0] * x + line[1])
        slope, curvature = weight * (p - target), weight * p * (1 - p)
        gradient = np.array([slope @ x, slope.sum()])
        mixed = curvature @ x
        hessian = np.array([[curvature @ x**2, mixed], [mixed, curvature.sum()]]) + 1e-12 * np.eye(2)
        step, before, length = np.linalg.solve(hessian, gradient), loss(line), 1.0
        while loss(line - length * step) > before and length > 1e-6:
            length /= 2
        line = line - length * step
        if np.abs(length * step).max() < 1e-10:
            break
    return Logistic(float(line[0] / scale), float(line[1] - line[0] * centre / scale))


def measure_calibration(pairs: Pairs, line: Logistic, prior: float) -> dict[str, Any]:
    """Measure how well similarity and probability tell apart pairs that the calibration was not fitted to.

    Args:
      pairs: of one kind, with some of the same person and some of different people.
      line: the fitted calibration.
      prior: the share of pairs of the same person that probabilities assume.

    Returns:
      A dict as calibration.json stores it (docs/search.md): 'pairs', the numbers of pairs; 'auc'; 'eer'; 'tpr_at_fpr',
      {rate: value, or None where there are too few pairs to tell}; 'roc', points of the curve; 'reliability', for each
      range of probabilities the mean probability and the share of pairs of the same person, at `prior`; and
      'calibration_error', the mean absolute difference of these two, weighted by the frequency of the ranges.
    """
    curve = make_curve(pairs)
    number = len(curve.thresholds)
    ends = np.geomspace(1 / curve.false_positives[-1], 1, CURVE_POINTS)
    points = np.unique(np.searchsorted(curve.false_positive_rate, ends, side="right").clip(1, number) - 1)
    bins, error = _reliability(pairs, line, prior)
    return {
        "pairs": _counts(pairs),
        "auc": area_under(curve),
        "eer": equal_error_rate(curve),
        "tpr_at_fpr": {f"{rate:g}": true_positive_rate_at(curve, rate) for rate in FALSE_POSITIVE_RATES},
        "roc": [
            {"threshold": float(curve.thresholds[i]) if i else None, "fpr": float(fpr), "tpr": float(tpr)}
            for i, fpr, tpr in zip(
                points, curve.false_positive_rate[points], curve.true_positive_rate[points], strict=True
            )
        ],
        "reliability": bins,
        "calibration_error": error,
    }


def _counts(pairs: Pairs) -> dict[str, Any]:
    same = int(np.count_nonzero(pairs.same))
    return {"same": same, "different": len(pairs.same) - same, "share_of_different": pairs.share}


def _reliability(pairs: Pairs, line: Logistic, prior: float) -> tuple[list[dict[str, Any]], float]:
    """The bins of the reliability diagram, and the calibration error.

    Pairs of the same person weigh `prior` in all and the others 1 − `prior`, however many there are of each.
    """
    probability = line.probability(pairs.similarity, prior)
    same = pairs.same
    weight = np.where(same, prior / np.count_nonzero(same), (1 - prior) / np.count_nonzero(~same))
    place = np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1)
    total, mean, share = (
        np.bincount(place, weight * value, NUM_BINS) for value in (np.ones(len(same)), probability, same)
    )
    bins = [
        {
            "from": i / NUM_BINS,
            "to": (i + 1) / NUM_BINS,
            "weight": float(total[i]),
            "probability": float(mean[i] / total[i]),
            "same": float(share[i] / total[i]),
            "pairs": int(np.count_nonzero(place == i)),
        }
        for i in np.flatnonzero(total).tolist()
    ]
    return bins, float(np.abs(mean - share).sum())


@dataclass(frozen=True)
class Calibration:
    """A fitted calibration, as calibration.json holds it.

    Attributes:
      model, fingerprint: where the model was read from, and its `Model.fingerprint`.
      data: the name of the images that it was fitted and tested on.
      prior: the share of pairs of the same person that is assumed by default.
      seed: the seed that split the identities into halves.
      identities: {'calibration': number, 'test': number}.
      kinds: {kind: {'slope', 'intercept', 'pairs', 'test': what `measure_calibration` gives}}, for each kind of pair
        that the data has.
    """

    model: str
    fingerprint: str
    data: str
    prior: float
    seed: int
    identities: Mapping[str, int]
    kinds: Mapping[str, Any]

    def logistic(self, kind: str) -> Logistic | None:
        """The fitted line of a kind of pair; None where the data had no such pairs."""
        values = self.kinds.get(kind)
        return None if values is None else Logistic(values["slope"], values["intercept"])

    def write(self, path: str | os.PathLike) -> None:
        """Write calibration.json; the file appears whole or not at all."""
        with write_whole(path) as file:
            file.write(json.dumps({**FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Calibration":
        """Read what `write` wrote.

        Raises:
          UserError: the file is missing, or is not a calibration.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            if {name: tree.pop(name, None) for name in FORMAT} != FORMAT:
                raise ValueError(f"it does not say {FORMAT}")
            calibration = cls(**tree)
            check_prior(calibration.prior)
            for kind in calibration.kinds:
                line = calibration.logistic(kind)
                if line is None or not np.isfinite([line.slope, line.intercept]).all():
                    raise ValueError(f"{kind} has no finite slope and intercept")
            return calibration
        except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise UserError(f"{path}: not a calibration ({reason}); make one with scripts/calibrate.py") from error


def check_prior(prior: float) -> None:
    """Check that `prior` is a number strictly between 0 and 1.

    Raises:
      ArgumentError: it is not.
    """
    if isinstance(prior, bool) or not isinstance(prior, int | float) or not 0 < prior < 1:
        raise ArgumentError("prior", f"= {prior!r}: expected a number between 0 and 1, such as 0.5")


def calibrate(
    embeddings: Embeddings,
    *,
    model: str,
    fingerprint: str,
    data: str,
    protocol: Protocol | None = None,
    prior: float = 0.5,
    seed: int = 0,
) -> Calibration:
    """Fit a calibration on the pairs of one half of the identities, and test it on those of the other half.

    Args:
      embeddings: images of known identity and modality.
      model, fingerprint: where the model that made them was read from, and its `Model.fingerprint`.
      data: the name of the images, for reports and errors.
      protocol: the data set's protocol, which says which images show one place. None: images of one camera do.
      prior: the share of pairs of the same person that is assumed by default, between 0 and 1.
      seed: seeds the split of the identities.

    Raises:
      UserError: for no kind of pair do both halves have pairs of the same person and pairs of different people.
      ArgumentError: `prior` is not between 0 and 1.
    """
    check_prior(prior)
    places = np.asarray((protocol or Protocol()).places(embeddings))
    halves = split_identities(embeddings.pids, seed)
    parts = [(embeddings.take(half), places[half]) for half in halves]
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        fitted, tested = (make_pairs(*part, kind, seed=seed) if len(part[0]) else None for part in parts)
        if fitted is None or tested is None or any(not p.same.any() or p.same.all() for p in (fitted, tested)):
            continue
        line = fit_logistic(fitted)
        kinds[kind] = {**asdict(line), "pairs": _counts(fitted), "test": measure_calibration(tested, line, prior)}
    counts = [len(np.unique(part.pids)) for part, _ in parts]
    if not kinds:
        raise UserError(
            f"{data}: has too few {' and '.join(KINDS)} pairs: expected some of the same person and some of different "
            f"people, from different cameras, in both halves of its {sum(counts)} identities; add images of more people"
        )
    identities = {"calibration": counts[0], "test": counts[1]}
    return Calibration(model, fingerprint, data, float(prior), seed, identities, kinds)


def format_calibration(calibration: Calibration) -> str:
    """A table of the test figures for the terminal, one line for each kind of pair."""
    head = ("pairs", "same", "different", "AUC", "EER", *(f"TPR at FPR {rate:g}" for rate in FALSE_POSITIVE_RATES))
    lines: list[tuple[str, ...]] = [(*head, "calibration error")]
    for kind, values in calibration.kinds.items():
        test = values["test"]
        rates = ["cannot be told" if r is None else f"{100 * r:.2f}" for r in test["tpr_at_fpr"].values()]
        counts = [f"{test['pairs'][sort]:,}" for sort in ("same", "different")]
        shares = [f"{100 * test[name]:.2f}" for name in ("auc", "eer")]
        lines.append((kind, *counts, *shares, *rates, f"{100 * test['calibration_error']:.2f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    identities = calibration.identities
    return "\n".join(
        [
            f"{calibration.data} · fitted on pairs of {identities['calibration']} identities, tested on those of "
            f"{identities['test']} others (seed {calibration.seed}) · prior {calibration.prior:g} · percent",
            *table,
            f"cannot be told: fewer than {FEWEST_FALSE} of the pairs of different people may be accepted at that rate",
        ]
    )
