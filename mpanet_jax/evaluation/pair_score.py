"""What is said of two images: their similarity, and with a calibration the probability that they show one person."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.calibration import Calibration, check_prior
from mpanet_jax.evaluation.verification import kind_of
from mpanet_jax.weights.hub import CALIBRATION_FILE, MODEL_FILE, resolve


def calibration_path(source: str | os.PathLike) -> Path:
    """Where the calibration of a model lies: in its folder, beside its file, or in Hugging Face's cache."""
    path = resolve(str(source)) if str(source).startswith("hf:") else Path(os.path.abspath(source))
    if path.is_dir():
        return path / CALIBRATION_FILE
    return path.with_name(CALIBRATION_FILE if path.name == MODEL_FILE else f"{path.name}.{CALIBRATION_FILE}")


@dataclass(frozen=True)
class PairScore:
    """What is said of two images.

    Attributes:
      similarity: the cosine of their embeddings, −1 to 1.
      probability: that they show the same person, at `prior`; None without a calibration for such a pair.
      prior: the share of pairs of the same person that was assumed; None without a probability.
      kind: 'cross_modality' or 'same_modality'; None where a modality is not known.
      note: why there is no probability; '' where there is one.
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
    """What two embeddings say.

    Args:
      rows: float[2, D].
      modality: int[2].
      fingerprint, source: of their model.
      path: where its calibration lies, if there is one.
      calibration: another one, or its file; None: that at `path`.
      prior: None: the calibration's.

    Raises:
      UserError: a calibration that cannot be read, or of another model.
      ArgumentError: `prior` is no probability.
    """
    if prior is not None:
        check_prior(prior)
    first, second = (row / (np.linalg.norm(row) or 1) for row in np.asarray(rows, np.float64))
    similarity, kind = float(np.clip(first @ second, -1, 1)), kind_of(*map(int, modality))
    if calibration is None and path.is_file():
        calibration = path
    if calibration is None:
        note = f"no calibration, {path} is not there: only the similarity; scripts/calibrate.py makes one"
        return PairScore(similarity, None, None, kind, note)
    name = "calibration" if isinstance(calibration, Calibration) else os.fspath(calibration)
    found = calibration if isinstance(calibration, Calibration) else Calibration.read(calibration)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{name}: is the calibration of another model, {found.model}, not of {source}; make one with "
            "scripts/calibrate.py, or name another"
        )
    if kind is None:
        note = f"say the modality of both images: the calibration differs between pairs, {' and '.join(found.kinds)}"
        return PairScore(similarity, None, None, kind, note)
    line = found.logistic(kind)
    if line is None:
        note = f"the calibration has no {kind} pairs, only {', '.join(found.kinds)}: only the similarity"
        return PairScore(similarity, None, None, kind, note)
    prior = found.prior if prior is None else prior
    return PairScore(similarity, float(line.probability(similarity, prior)), prior, kind, "")
