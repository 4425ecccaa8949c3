"""Scalars to TensorBoard, a progress bar with the time left to the terminal."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def _summary_writer() -> Any:
    """tensorboardX's SummaryWriter, imported without PyTorch.

    Where PyTorch is installed tensorboardX imports it, for the graphs of PyTorch models; that takes seconds in which
    the accelerator waits.
    """
    absent = {"torch": None} if "torch" not in sys.modules else {}
    sys.modules.update(absent)
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in absent:
            del sys.modules[name]
    return SummaryWriter


class MetricLog:
    """Writes scalars under `workdir/logs` and draws the bar; a context manager. Silent where `active` is False."""

    def __init__(self, workdir: Path, total_steps: int, first_step: int, *, active: bool = True):
        self._active = active
        if not active:
            return
        # Points after the checkpoint that a killed run left behind are dropped, so that curves have no double parts:
        # from the step on that is named here.
        self._writer = _summary_writer()(str(workdir / "logs"), purge_step=first_step + 1)
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, status="compiling")

    def __enter__(self) -> "MetricLog":
        if self._active:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.stop()
            self._writer.close()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` done steps."""
        if self._active:
            self._bar.update(self._task, completed=step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values` under their names at `step`."""
        if self._active:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def status(self, text: str) -> None:
        """Shows `text` on the bar, or prints it as a line where the output is no terminal."""
        if not self._active:
            return
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, status=text)
