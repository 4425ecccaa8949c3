"""The files of a saved model: its weights with their settings, its card, and its calibration."""

from collections.abc import Mapping
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

from mpanet_jax.evaluation.calibration import Calibration
from mpanet_jax.files import write_whole
from mpanet_jax.model_card import model_card
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace, to_dict
from mpanet_jax.weights.files import StateDict, write_state_dict
from mpanet_jax.weights.hub import CALIBRATION_FILE, MODEL_FILE


def write_model(
    folder: Path,
    name: str,
    *,
    settings: Settings,
    state_dict: StateDict,
    calibration: Path,
    metrics: Mapping[str, Mapping[str, Any]] | None,
    fingerprint: str,
    **about: Any,
) -> None:
    """Writes model.safetensors, README.md and, if there is one of these very weights, calibration.json.

    Args:
      folder: an empty folder.
      name: of the model.
      settings: of its run; written without this machine's paths.
      state_dict: its arrays.
      calibration: a file that may be there.
      metrics: its figures.
      fingerprint: its fingerprint.
      **about: the other arguments of `model_card`.

    Raises:
      UserError: the calibration cannot be read.
    """
    settings = _without_paths(settings)
    write_state_dict(folder / MODEL_FILE, state_dict, to_dict(settings), metrics)
    card = model_card(name, settings, metrics=metrics, fingerprint=fingerprint, **about)
    with write_whole(folder / "README.md") as file:
        file.write(card)
    if calibration.is_file():
        stored = Calibration.read(calibration)
        if stored.fingerprint == fingerprint:  # it may be of the run's weights from before
            with_fields(stored, model=name).write(folder / CALIBRATION_FILE)


def _without_paths(settings: Settings) -> Settings:
    """The settings without this machine's paths; `init_from` keeps the name of a file or folder."""
    changes = {"dataset.source": "", "dataset.data_dir": type(settings)().dataset.data_dir}
    if not settings.init_from.startswith("hf:"):
        changes["init_from"] = Path(settings.init_from).name
    return replace(settings, changes)
