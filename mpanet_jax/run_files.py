"""The names of a run's files, and config.json, which holds the run's settings."""

import json
from pathlib import Path
from typing import Any

from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.files import write_whole
from mpanet_jax.methods import settings_of
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import differences, to_dict

CONFIG_FILE = "config.json"
# Checkpoint that can be evaluated → the file of its metrics.
METRICS_FILES = {"last": "metrics.json", "best": "metrics_best.json", "untrained": "metrics_untrained.json"}
# The validation figures by which a run with dataset.validation has chosen its best checkpoint.
VALIDATION_FILE = "metrics_best_validation.json"
# Fields, and groups of them, that may change when a run is resumed: its length, its reports, and fields that do not
# change its numbers.
FREE_TO_CHANGE = (
    *("train.", "eval.", "parallel", "init_from", "model.fused"),
    *("data.cache", "data.resize_on", "data.num_workers", "dataset.source", "dataset.data_dir"),
)


def save_settings(settings: Settings, workdir: Path) -> None:
    """Writes config.json, whole or not at all."""
    with write_whole(workdir / CONFIG_FILE) as file:
        file.write(json.dumps(to_dict(settings), indent=2) + "\n")


def load_settings(workdir: str | Path) -> Settings:
    """Reads the settings of a run from its config.json.

    Raises:
      UserError: the folder has no readable config.json.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        tree = json.loads(path.read_text())
        if not isinstance(tree, dict) or not {"dataset", "model", "data"} <= set(tree):
            raise ValueError("the sections dataset, model and data are not in it")
        return settings_of(tree)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected a folder that training has written") from None
    except (ValueError, TypeError, AttributeError, UserError) as error:
        reason = " ".join(str(error).split())  # a field's name may hold anything
        raise UserError(f"{path}: not a run's settings ({reason}); restore it or train again") from None


def check_init_from(init_from: str, workdir: Path) -> None:
    """Checks that a run does not start from its own workdir.

    Raises:
      SettingsError: `init_from` is `workdir`.
    """
    if init_from and Path(init_from).resolve() == workdir.resolve():
        raise SettingsError(
            f"init_from: {init_from} is the workdir of this very run; give the new run another workdir, "
            "or leave init_from out to go on with the old one"
        )


def recipe_differences(settings: Settings, others: Settings) -> dict[str, tuple[Any, Any]]:
    """The `differences` of two runs' settings, without the fields of FREE_TO_CHANGE."""
    return {
        name: values for name, values in differences(settings, others).items() if not name.startswith(FREE_TO_CHANGE)
    }


def check_same_run(settings: Settings, workdir: Path) -> None:
    """Checks that the run in `workdir`, if there is one, can go on with these settings.

    Raises:
      UserError: names the fields that differ from the run's config.json and would change its numbers.
    """
    if not (workdir / CONFIG_FILE).exists():
        return
    differing = [
        f"{name} = {now!r} ({before!r} before)"
        for name, (now, before) in recipe_differences(settings, load_settings(workdir)).items()
    ]
    if differing:
        raise UserError(
            f"{workdir}: holds a run with other settings, {', '.join(differing)}; "
            "give another workdir, or set the fields back to go on with it"
        )
