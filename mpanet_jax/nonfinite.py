"""What a run does when its loss is not finite any more: it stops and writes a report, or skips the step."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpanet_jax.errors import UserError
from mpanet_jax.files import write_whole

REPORT_FILE = "nonfinite.json"
MOST_IN_A_ROW = 10  # so many skipped steps in a row stop the run


class FiniteCheck:
    """Checks the metrics of every step, once the host has them.

    Args:
      mode: settings.train.on_nonfinite: 'stop' or 'skip'.
      workdir: of the run; the report goes there.
      paths: step (from 1) → str[b], the paths of the images in its batch.
      writes: whether this process writes the report.

    Attributes:
      skipped: how many steps have been skipped since this process started.
    """

    def __init__(self, mode: str, workdir: Path, paths: Callable[[int], np.ndarray], *, writes: bool = True):
        self._mode, self._workdir, self._paths, self._writes = mode, workdir, paths, writes
        self.skipped = self._in_a_row = 0

    def check(self, before: int, metrics: Mapping[str, Any]) -> None:
        """Checks the metrics of some steps.

        Args:
          before: the steps done before them.
          metrics: {name: array with a value for each of the steps before+1, before+2, …}.

        Raises:
          UserError: the run has to stop; the report is written.
        """
        if self._mode == "skip":
            for number, skipped in enumerate(jax.device_get(metrics["skipped"])):
                self.skipped += int(skipped)
                self._in_a_row = self._in_a_row + 1 if skipped else 0
                if self._in_a_row == MOST_IN_A_ROW:
                    raise self._error(
                        before + 1 + number, f"the {MOST_IN_A_ROW}th step in a row was skipped", metrics, number
                    )
            return
        finite = np.isfinite(losses := jax.device_get(metrics["loss"]))
        if not finite.all():
            number = int(finite.argmin())
            raise self._error(before + 1 + number, f"the loss is {losses[number]}", metrics, number)

    def _error(self, step: int, what: str, metrics: Mapping[str, Any], number: int) -> UserError:
        terms = {name: float(values[number]) for name, values in jax.device_get(dict(metrics)).items()}
        return self.error(step, what, terms)

    def error(self, step: int, what: str, terms: Mapping[str, float]) -> UserError:
        """Writes the report of a step after which the run cannot go on; returns the exception to raise.

        Args:
          step: which one, from 1.
          what: what is wrong, in words.
          terms: the step's metrics.
        """
        report = self._workdir / REPORT_FILE
        if self._writes:
            shown = {name: value if math.isfinite(value) else str(value) for name, value in terms.items()}
            content = {"step": step, "what": what, "terms": shown, "images": self._paths(step).tolist()}
            with write_whole(report) as file:
                file.write(json.dumps(content, indent=2) + "\n")
        return UserError(
            f"step {step}: {what}; lower optim.learning_rate, or check the weights of init_from and the "
            f"images that {report} names; the run stops, and its last checkpoint is from before this step"
        )
