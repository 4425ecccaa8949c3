"""The best evaluation of a run so far: its checkpoint and its record."""

import json
import math
from pathlib import Path
from typing import Any

from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.errors import UserError, first_line
from mpanet_jax.evaluation.metrics_output import write_metrics
from mpanet_jax.evaluation.workdir import with_checkpoint
from mpanet_jax.processes import gather, is_first_process
from mpanet_jax.run_files import METRICS_FILES, VALIDATION_FILE
from mpanet_jax.state import TrainState


def keep_best(
    workdir: Path, figure: str, step: int, results: Any, state: TrainState, batches: Any, *, validation: bool
) -> None:
    """Save `state` as the best checkpoint if its results beat those of every evaluation before.

    The best results so far are recorded in the workdir, where a resumed run finds them: in metrics_best.json, or with
    `validation` in metrics_best_validation.json.

    Args:
      workdir: the run's folder.
      figure: the figure to compare, 'rank1', 'mAP' …, in the protocol's first setting; '': nothing is saved.
      step: training steps done.
      results: what `evaluate_set` gives for `state`.
      state: the training state to save.
      batches: the training batches' iterator, whose position is saved too.
      validation: whether `results` are of the validation identities instead of the test set.
    """
    if not figure:
        return
    record = _record(workdir, validation)
    setting = next(iter(results))
    better = _best_so_far(record, figure).get(setting, -math.inf) < results[setting][figure]
    # Process 0 decides for all, since the others may still see an older record.
    if not gather(int(better), "the choice of the best checkpoint")[0]:
        return
    with Checkpoints(workdir, keep=1, which="best") as checkpoints:
        # It is there already if the run was killed before it wrote the record, or evaluates the same step again.
        if not gather(int(checkpoints.latest_step == step), "the best checkpoint")[0]:
            checkpoints.save(step, state, batches)
            checkpoints.wait()
    if is_first_process():
        write_metrics(record, with_checkpoint(results, "best", step))


def check_best(workdir: Path, figure: str, *, validation: bool) -> None:
    """Refuses a record that `keep_best` could not read after an evaluation; the arguments are as there.

    Raises:
      UserError: the record is damaged.
    """
    if figure:
        _best_so_far(_record(workdir, validation), figure)


def _record(workdir: Path, validation: bool) -> Path:
    return workdir / (VALIDATION_FILE if validation else METRICS_FILES["best"])


def _best_so_far(record: Path, figure: str) -> dict[str, float]:
    """{setting of the protocol: the figure in the record}."""
    try:
        return {setting: float(values[figure]) for setting, values in json.loads(record.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{record}: not the record of a best evaluation ({first_line(error)}); restore it, or move it away and "
            "the next evaluation counts as the best"
        ) from error
