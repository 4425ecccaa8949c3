"""Metrics: read while the device works on, to TensorBoard, and to the terminal with a bar and the time left."""

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mpanet_jax.nonfinite import FiniteCheck


def _summary_writer() -> Any:
    """tensorboardX's SummaryWriter, imported without PyTorch.

    Where PyTorch is installed tensorboardX imports it, for the graphs of PyTorch models; that takes seconds in which
    the accelerator waits.
    """
    absent: dict[str, Any] = {"torch": None} if "torch" not in sys.modules else {}
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

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes an evaluation's figures, and shows those of the protocol's first setting."""
        for setting, values in results.items():
            self.scalars(step, {f"eval/{setting}/{name}": values[name] for name in ("rank1", "mAP", "mINP")})
        setting, values = next(iter(results.items()))
        self.status(f"step {step} {setting}: Rank-1 {values['rank1']:.1f} % mAP {values['mAP']:.1f} %")


def time_when_ready(array: Any) -> float:
    """Waits for the array, and returns when it was there by `time.perf_counter`."""
    jax.block_until_ready(array)
    return time.perf_counter()


class MetricReader:
    """Reads a call's metrics while the next call is under way, and logs every `every`-th step of them."""

    def __init__(
        self,
        log: MetricLog,
        every: int,
        steps_per_epoch: int,
        batch_size: int,
        on_steps: Callable[[int, float], None] | None = None,
        finite: FiniteCheck | None = None,
    ):
        self._log, self._every, self._on_steps, self._finite = log, every, on_steps, finite
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._unread = None
        self._timed = None  # what was read last: the step, and when the device had finished it
        # Sending a call off may take until the device is nearly through with it, and the call before is read after
        # that: late by as long as this one takes, which may be of one step or of many.
        self._clock = ThreadPoolExecutor(1)

    def read_previous(self, before: int, after: int, metrics: Any) -> None:
        """Reads what was handed in last, and keeps the metrics of the steps before+1 … after for the next time."""
        moment = self._clock.submit(time_when_ready, metrics["loss"])
        self.finish()
        self._unread = (before, after, metrics, moment)

    def finish(self) -> None:
        """Reads what was handed in last."""
        if self._unread is None:
            return
        before, after, metrics, moment = self._unread
        self._unread, finished_at = None, moment.result()
        if self._finite is not None:
            self._finite.check(before, metrics)
        self._log.advance(after)
        if self._on_steps is not None:
            self._on_steps(after, finished_at)
        logged = [step for step in range(before + 1, after + 1) if step % self._every == 0]
        if logged:
            metrics, rate = jax.device_get(metrics), self._images_per_second(after, finished_at)
        for step in logged:
            self._write(step, {name: float(value[step - before - 1]) for name, value in metrics.items()}, rate)

    def restart_timer(self, step: int) -> None:
        """Leaves the time until now out of the images a second; after `finish`."""
        self._timed = (step, time.perf_counter())

    def _images_per_second(self, step: int, finished_at: float) -> float | None:
        rate = None
        if self._timed is not None:
            rate = (step - self._timed[0]) * self._batch_size / (finished_at - self._timed[1])
        self._timed = (step, finished_at)
        return rate

    def _write(self, step: int, values: dict[str, float], rate: float | None) -> None:
        if self._finite is not None and "skipped" in values:
            values["skipped"] = self._finite.skipped
        scalars = {f"train/{name}": value for name, value in values.items()}
        if rate is not None:
            scalars["train/images_per_second"] = rate
        epoch = step / self._steps_per_epoch
        self._log.scalars(step, {**scalars, "train/epoch": epoch})
        speed = "" if rate is None else f" {rate:.0f} images/s"
        skipped = f" skipped {values['skipped']:.0f}" if values.get("skipped") else ""
        self._log.status(
            f"step {step} epoch {epoch:.1f} loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}{speed}{skipped}"
        )
