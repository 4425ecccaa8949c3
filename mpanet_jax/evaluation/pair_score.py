"""Compares two images: their similarity and, with a calibration, the probability that they show the same person."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.calibration import Calibration, check_prior
from mpanet_jax.evaluation.verification import kind_of
from mpanet_jax.weights.hub import CALIBRATION_FILE, MODEL_FILE, resolve


def calibration_path(source: str | os.PathLike) -> Path:
    """The path of a model's calibration: in its folder, beside its file, or in Hugging Face's cache."""
    path = resolve(str(source)) if str(source).startswith("hf:") else Path(os.path.abspath(source))
    if path.is_dir():
        return path / CALIBRATION_FILE
    return path.with_name(CALIBRATION_FILE if path.name == MODEL_FILE else f"{path.name}.{CALIBRATION_FILE}")


@dataclass(frozen=True)
class PairScore:
    """How alike two images are.

    Attributes:
      similarity: the cosine of their embeddings, from −1 to 1.
      probability: the probability that they show the same person; None if no calibration covers such a pair.
      prior: the share of pairs of the same person that the probability assumes; None without a probability.
      kind: 'cross_modality' or 'same_modality'; None if a modality is unknown.
      note: why there is no probability; '' if there is one.
    """

    similarity: float
    probability: float | None
    prior: float | None
    kind: str | None
    note: str


def score_pair(
    rows: np.ndarray,
    modality: np.ndarray,
    *,
    fingerprint: str,
    source: str,
    path: Path,
    calibration: Calibration | str | os.PathLike | None,
    prior: float | None,
) -> PairScore:
    """Compare two embeddings.

    Args:
      rows: float[2, D], the two embeddings, of any length.
      modality: int[2], 0 visible, 1 infrared, -1 unknown.
      fingerprint, source: the model's `Model.fingerprint`, and where it was read from.
      path: the model's own calibration, if the file exists.
      calibration: a calibration to use instead, or its file; None: the one at `path`.
      prior: the share of pairs of the same person; None: the calibration's.

    Raises:
      UserError: the calibration cannot be read, or is of another model.
      ArgumentError: `prior` is not between 0 and 1.
    """
    if prior is not None:
        check_prior(prior)
    first, second = (row / (np.linalg.norm(row) or 1) for row in np.asarray(rows, np.float64))
    similarity, kind = float(np.clip(first @ second, -1, 1)), kind_of(*map(int, modality))
    if calibration is None and path.is_file():
        calibration = path
    if calibration is None:
        note = f"there is no calibration, {path}, so only the similarity is known; scripts/calibrate.py makes one"
        return PairScore(similarity, None, None, kind, note)
    name = "calibration" if isinstance(calibration, Calibration) else os.fspath(calibration)
    found = calibration if isinstance(calibration, Calibration) else Calibration.read(calibration)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{name}: is the calibration of another model, {found.model}, not of {source}; make one with "
            "scripts/calibrate.py, or give another"
        )
    if kind is None:
        note = f"give the modality of both images: pairs are calibrated by kind, {' and '.join(found.kinds)}"
        return PairScore(similarity, None, None, kind, note)
    line = found.logistic(kind)
    if line is None:
        note = (
            f"the calibration covers {', '.join(found.kinds)} pairs and not {kind} ones; only the similarity is known"
        )
        return PairScore(similarity, None, None, kind, note)
    prior = found.prior if prior is None else prior
    return PairScore(similarity, float(line.probability(similarity, prior)), prior, kind, "")
