"""Reads metrics while the device works on, and writes them to TensorBoard and to the terminal."""

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpanet_jax.nonfinite import FiniteCheck
from mpanet_jax.progress import Bar


def _summary_writer() -> Any:
    """tensorboardX's class SummaryWriter, imported without PyTorch.

    tensorboardX imports PyTorch if it is installed, for the graphs of PyTorch models. That takes seconds, in which the
    accelerator waits.
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
    """Writes scalars and pictures for TensorBoard, and shows the bar; a context manager.

    Args:
      workdir: of the run; the files go into its folder logs.
      total_steps: the steps of the whole run.
      first_step: the steps that are done already.
      active: False writes and shows nothing, as in all processes but the first.
    """

    def __init__(self, workdir: Path, total_steps: int, first_step: int, *, active: bool = True):
        self._active = active
        self._bar = Bar("training", total_steps, unit="steps", done=first_step, active=active)
        self._done = first_step
        if not active:
            return
        # A run that was killed may have written points after its last checkpoint. TensorBoard drops them, from
        # `purge_step` on, so that no part of a curve is there twice.
        self._folder = workdir / "logs"
        self._writer = _summary_writer()(str(self._folder), purge_step=first_step + 1)
        self._events = self._writer.file_writer.event_writer

    def __enter__(self) -> "MetricLog":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
        if not self._active:
            return
        if self._events._worker.is_alive():
            self._writer.close()
        else:  # the thread has ended and reads no more events: nothing may wait for the queue to be empty
            self._events._event_queue.cancel_join_thread()
            self._events._closed = True  # tensorboardX closes it again at exit, which would wait too

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        self._done = step
        self._bar.update(step)

    def _require_writer(self) -> None:
        """Waits until the next event can be written.

        tensorboardX writes in a thread, which ends silently if the disk is full. Once its queue of ten events is full
        too, adding another one would wait for ever.

        Raises:
          OSError: the thread has ended.
        """
        while self._events._worker.is_alive():
            if not self._events._event_queue.full():
                return
            time.sleep(0.01)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values under their names, at `step`."""
        if self._active:
            for name, value in values.items():
                self._require_writer()
                self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Writes an image uint8[h, w, 3] at `step`."""
        if self._active:
            self._require_writer()
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Writes a histogram of the finite values, in 64 bins, at `step`; nothing if there are none."""
        values = values[np.isfinite(values)]
        if self._active and len(values):
            self._require_writer()
            self._writer.add_histogram(name, values, step, bins=64)  # pyright: ignore[reportArgumentType]: an int may be

    def status(self, text: str) -> None:
        """Shows `text` beside the bar, or in the next line where there is no bar."""
        self._bar.update(self._done, note=text)

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the figures of an evaluation, {setting: {figure: value}}, and prints those of the first setting."""
        for setting, values in results.items():
            self.scalars(step, {f"eval/{setting}/{name}": values[name] for name in ("rank1", "mAP", "mINP")})
        setting, values = next(iter(results.items()))
        if self._active:
            text = f"step {step} {setting}: Rank-1 {values['rank1']:.1f} % mAP {values['mAP']:.1f} %"
            print(text, file=sys.stderr, flush=True)  # above the bar, if there is one


def wait_until_ready(array: Any) -> float:
    """Waits until the array has been computed; returns the time then, by `time.perf_counter`."""
    jax.block_until_ready(array)
    return time.perf_counter()


class MetricReader:
    """Reads the metrics of a call of the compiled steps while the next call is under way, and logs some of them.

    Args:
      log: where they are written to.
      every: every so many steps one is logged.
      steps_per_epoch: for the epoch in the log.
      batch_size: for the images a second in the log.
      on_steps: called with the steps done, and the time by `time.perf_counter` when the device had done them.
      finite: checks the metrics of every step.
      last_step: is logged too, so that a run of fewer than `every` steps leaves something to look at.
    """

    def __init__(
        self,
        log: MetricLog,
        every: int,
        steps_per_epoch: int,
        batch_size: int,
        on_steps: Callable[[int, float], None] | None = None,
        finite: FiniteCheck | None = None,
        last_step: int | None = None,
    ):
        self._log, self._every, self._on_steps, self._finite = log, every, on_steps, finite
        self._last_step = last_step
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._unread = None
        self._timed = None  # (step, when the device had finished it) of the last reading
        # A thread notes when a call is finished. The loop itself may be sending the next call off then, which can take
        # nearly as long as the call.
        self._clock = ThreadPoolExecutor(1)

    def read_previous(self, before: int, after: int, metrics: Any) -> None:
        """Reads the metrics of the previous call, and keeps those of this one.

        Args:
          before, after: the steps done before this call and after it.
          metrics: {name: array of after − before values} on the device.

        Raises:
          UserError: the run has to stop; see `FiniteCheck.check`.
        """
        moment = self._clock.submit(wait_until_ready, metrics["loss"])
        self.read_last()
        self._unread = (before, after, metrics, moment)

    def read_last(self) -> None:
        """Reads the metrics of the last call, if they have not been read; see `read_previous`."""
        if self._unread is None:
            return
        before, after, metrics, moment = self._unread
        self._unread, finished_at = None, moment.result()
        if self._finite is not None:
            self._finite.check(before, metrics)
        self._log.advance(after)
        if self._on_steps is not None:
            self._on_steps(after, finished_at)
        logged = [step for step in range(before + 1, after + 1) if step % self._every == 0 or step == self._last_step]
        if logged:
            metrics, rate = jax.device_get(metrics), self._images_per_second(after, finished_at)
        for step in logged:
            self._write(step, {name: float(value[step - before - 1]) for name, value in metrics.items()}, rate)

    def restart_timer(self, step: int) -> None:
        """Leaves the time since the last reading out of the images a second; call this after `read_last`."""
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
            f"epoch {epoch:.1f} loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}{speed}{skipped}"
        )
