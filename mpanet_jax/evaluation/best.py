"""The best of a run's evaluations: its checkpoint and its record."""

import json
import math
from pathlib import Path
from typing import Any

from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.errors import UserError, first_line
from mpanet_jax.evaluation.evaluate import write_metrics
from mpanet_jax.evaluation.workdir import of_checkpoint
from mpanet_jax.processes import gather, is_first_process
from mpanet_jax.run_files import METRICS_FILES, VALIDATION_FILE
from mpanet_jax.state import TrainState


def keep_best(
    workdir: Path, figure: str, step: int, results: Any, state: TrainState, batches: Any, *, validation: bool
) -> None:
    """Saves `state` as the best checkpoint if its `figure` ('rank1', 'mAP', …; '': never) beats the best before.

    The figure is that of the protocol's first setting. The record, which a resumed run reads, is metrics_best.json;
    with `validation`, where the results are not the test set's, metrics_best_validation.json.
    """
    if not figure:
        return
    record = _record(workdir, validation)
    setting = next(iter(results))
    best = _best_so_far(record, figure).get(setting, -math.inf)
    better = best < results[setting][figure]
    # All save, or none: process 0 decides, as the others may see an older record.
    if not gather(int(better), "the choice of the best checkpoint")[0]:
        return
    with Checkpoints(workdir, keep=1, which="best") as checkpoints:
        # It is there where the run was killed before it wrote the record, or evaluates the same step again.
        if not gather(int(checkpoints.latest_step == step), "the best checkpoint")[0]:
            checkpoints.save(step, state, batches)
            checkpoints.wait()
    if is_first_process():
        write_metrics(record, of_checkpoint(results, "best", step))


def check_best(workdir: Path, figure: str, *, validation: bool) -> None:
    """Refuses a record that `keep_best` could not read after an evaluation; arguments as there.

    Raises:
      UserError: it is damaged.
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
