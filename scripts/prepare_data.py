"""Checks a raw data set and builds it for training.

    python scripts/prepare_data.py --dataset sysu_mm01 --source /data/SYSU-MM01
    python scripts/prepare_data.py --dataset regdb --source /data/RegDB --trial all
    python scripts/prepare_data.py --dataset llcm --source /data/LLCM --check
    python scripts/prepare_data.py --dataset own --source /data/my_cameras     (a folder with images.csv: docs/data.md)

Everything is checked before anything is written, and every image is decoded; `--check` stops after that. All faults are
listed, one a line, and the exit code is then 2. Counts that differ from the published ones are a warning. It is safe to
kill this script and start it again.
"""

import sys

from absl import flags

from mpanet_jax import datasets
from mpanet_jax.datasets import DATASETS, is_prepared, make_dataset, prepare, prepared_dir
from mpanet_jax.datasets.verify import format_counts, verify
from mpanet_jax.errors import ArgumentError, SettingsError, UserError, run_script
from mpanet_jax.progress import track
from mpanet_jax.settings import DatasetSettings

_DATASET = flags.DEFINE_enum("dataset", None, list(DATASETS), "Which data set.", required=True)
_SOURCE = flags.DEFINE_string("source", None, "The folder that holds the raw data set.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared data sets go (tfds's data_dir).")
_TRIAL = flags.DEFINE_string("trial", None, "RegDB's split, 1 to 10, or 'all'; default: 1.")
_DROP_UNPAIRED = flags.DEFINE_bool(
    "drop_unpaired", False, "own: leave out training identities that have images of one modality only."
)
_CHECK = flags.DEFINE_bool("check", False, "Check only, build nothing.")


def main(arguments):
    if arguments:
        raise UserError(f"{arguments[0]}: not a flag; see --help")
    try:
        return _prepare_all()
    except SettingsError as error:  # this script's flags are the fields of the settings' group `dataset`
        raise UserError(f"--{str(error).removeprefix('dataset.')}") from error


def _prepare_all() -> int:
    asked_for = _variants()
    variants = [v for v in asked_for if _CHECK.value or not is_prepared(v)]
    for variant in asked_for:
        if variant not in variants:
            prepare(variant)  # warns if it was prepared from another folder, or from lists that have changed
            print(f"already prepared: {prepared_dir(variant)} (delete it to build it again)")
    if not variants:
        return 0
    found = verify([make_dataset(variant) for variant in variants], _SOURCE.value, track=track)
    for title, images in found.images.items():
        print(f"\n{title}\n{format_counts(images)}")
    print()
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for fault in found.faults:
        print(f"error: {fault}", file=sys.stderr)
    if found.faults:
        print(f"{len(found.faults)} fault(s); nothing was built", file=sys.stderr)
        return 2
    print(f"{_SOURCE.value}: no faults")
    for variant in [] if _CHECK.value else variants:
        print("prepared:", prepare(variant, verify=False, track=track))
    return 0


def _variants() -> list[DatasetSettings]:
    """The settings of each variant of the data set that the flags ask for."""
    places = {"name": _DATASET.value, "source": _SOURCE.value, "data_dir": _DATA_DIR.value}
    own = {}
    for flag, value in (("trial", _TRIAL.value), ("drop_unpaired", _DROP_UNPAIRED.value or None)):
        owner = datasets.own_fields()[flag].name
        if value is not None and owner != _DATASET.value:
            raise ArgumentError(flag, f"= {value}: goes with --dataset {owner}")
        if value is not None:
            own[flag] = value
    if own.get("trial") == "all":
        everything = DATASETS[_DATASET.value].variants().values()
        return [datasets.settings_of(places | {"trial": variant.trial}) for variant in everything]
    if "trial" in own:
        trials = [str(v.trial) for v in DATASETS[_DATASET.value].variants().values()]
        if own["trial"] not in trials:
            raise ArgumentError("trial", f"{own['trial']}: expected {trials[0]} to {trials[-1]} or 'all'")
        own["trial"] = int(own["trial"])
    return [datasets.settings_of(places | own)]


if __name__ == "__main__":
    run_script(main)
