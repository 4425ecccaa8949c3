"""The best of a run's evaluations: its checkpoint and its record."""

import json
from pathlib import Path
from typing import Any

from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.evaluation.metrics_output import write_metrics
from mpanet_jax.evaluation.workdir import with_checkpoint
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
    record = workdir / (VALIDATION_FILE if validation else METRICS_FILES["best"])
    setting = next(iter(results))
    better = not record.exists() or json.loads(record.read_text())[setting][figure] < results[setting][figure]
    # All save, or none: process 0 decides, as the others may see an older record.
    if not gather(int(better), "the choice of the best checkpoint")[0]:
        return
    with Checkpoints(workdir, keep=1, which="best") as checkpoints:
        # It is there where the run was killed before it wrote the record, or evaluates the same step again.
        if not gather(int(checkpoints.latest_step == step), "the best checkpoint")[0]:
            checkpoints.save(step, state, batches)
            checkpoints.wait()
    if is_first_process():
        write_metrics(record, with_checkpoint(results, "best", step))
