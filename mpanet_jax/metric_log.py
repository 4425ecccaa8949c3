"""Metrics: read while the device works on, to TensorBoard, and to the terminal beside the bar."""

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
    """Writes scalars and pictures under `workdir/logs` and shows the bar; a context manager.

    Silent where `active` is False.
    """

    def __init__(self, workdir: Path, total_steps: int, first_step: int, *, active: bool = True):
        self._active = active
        self._bar = Bar("training", total_steps, unit="steps", done=first_step, active=active)
        self._done = first_step
        if not active:
            return
        # Points after the checkpoint that a killed run left behind are dropped, so that curves have no double parts:
        # from the step on that is named here.
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
        else:  # nobody reads the queue any more: neither closing nor the end of the program may wait for that
            self._events._event_queue.cancel_join_thread()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` done steps."""
        self._done = step
        self._bar.update(step)

    def _require_writer(self) -> None:
        """Returns when the next event can be written.

        tensorboardX writes in a thread, which ends unseen where the disk is full. Once the thread's queue, of ten
        events, is full as well, adding another would wait for ever.

        Raises:
          OSError: the thread has ended.
        """
        while self._events._worker.is_alive():
            if not self._events._event_queue.full():
                return
            time.sleep(0.01)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values` under their names at `step`."""
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
        """Writes how often the finite values come, in 64 bins, at `step`; nothing where there are none."""
        values = values[np.isfinite(values)]
        if self._active and len(values):
            self._require_writer()
            self._writer.add_histogram(name, values, step, bins=64)  # pyright: ignore[reportArgumentType]: an int may be

    def status(self, text: str) -> None:
        """Shows `text` beside the bar, or in the next of its lines."""
        self._bar.update(self._done, note=text)

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes an evaluation's figures, and shows those of the protocol's first setting."""
        for setting, values in results.items():
            self.scalars(step, {f"eval/{setting}/{name}": values[name] for name in ("rank1", "mAP", "mINP")})
        setting, values = next(iter(results.items()))
        if self._active:
            text = f"step {step} {setting}: Rank-1 {values['rank1']:.1f} % mAP {values['mAP']:.1f} %"
            print(text, file=sys.stderr, flush=True)  # above the bar, where there is one


def wait_until_ready(array: Any) -> float:
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
        moment = self._clock.submit(wait_until_ready, metrics["loss"])
        self.read_last()
        self._unread = (before, after, metrics, moment)

    def read_last(self) -> None:
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
            f"epoch {epoch:.1f} loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}{speed}{skipped}"
        )
