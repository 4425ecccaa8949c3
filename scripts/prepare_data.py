"""Check a raw data set and build it for training.

    python scripts/prepare_data.py --dataset sysu_mm01 --source /data/SYSU-MM01
    python scripts/prepare_data.py --dataset regdb --source /data/RegDB --trial all
    python scripts/prepare_data.py --dataset llcm --source /data/LLCM --check

Everything is checked before anything is written, every image decoded. `--check` stops there. Faults are listed all,
one a line, and end in exit code 2; counts that differ from the published ones are a warning. Safe to kill and rerun.
"""

import sys

from absl import flags

from mpanet_jax.datasets import BUILDERS, is_prepared, prepare, prepared_dir, progress_bar
from mpanet_jax.datasets.verify import format_counts, verify
from mpanet_jax.errors import UserError, run_script

_DATASET = flags.DEFINE_enum("dataset", None, list(BUILDERS), "Which data set.", required=True)
_SOURCE = flags.DEFINE_string("source", None, "The folder that holds the raw data set.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared data sets go (tfds's data_dir).")
_TRIAL = flags.DEFINE_string("trial", "1", "RegDB's split, 1 to 10, or 'all'.")
_CHECK = flags.DEFINE_bool("check", False, "Check only, build nothing.")


def main(arguments):
    if arguments:
        raise UserError(f"{arguments[0]}: not a flag; see --help")
    name, source, data_dir = _DATASET.value, _SOURCE.value, _DATA_DIR.value
    trials = [t for t in _trials() if _CHECK.value or not is_prepared(name, data_dir, trial=t)]
    for trial in sorted(set(_trials()) - set(trials)):
        print(f"already prepared: {prepared_dir(name, data_dir, trial=trial)} (delete it to build it again)")
    if not trials:
        return 0
    found = verify(name, source, trials=trials, track=progress_bar)
    for trial, images in found.images.items():
        print(f"\n{name}" + (f", trial {trial}" if name == "regdb" else "") + f"\n{format_counts(images)}")
    print()
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for fault in found.faults:
        print(f"error: {fault}", file=sys.stderr)
    if found.faults:
        print(f"{len(found.faults)} fault(s); nothing was built", file=sys.stderr)
        return 2
    print(f"{source}: no faults")
    for trial in [] if _CHECK.value else trials:
        print("prepared:", prepare(name, source, data_dir, trial=trial, verify=False, track=progress_bar))
    return 0


def _trials() -> list[int]:
    if _DATASET.value != "regdb":
        return [1]
    if _TRIAL.value == "all":
        return list(range(1, 11))
    if not (_TRIAL.value.isdigit() and 1 <= int(_TRIAL.value) <= 10):
        raise UserError(f"--trial {_TRIAL.value}: expected 1 to 10 or 'all'")
    return [int(_TRIAL.value)]


if __name__ == "__main__":
    run_script(main)
