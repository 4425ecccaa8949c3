"""How a run ends when it is asked to: by SIGTERM, as schedulers do, or by Ctrl-C."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax

from mpanet_jax.errors import Stopped
from mpanet_jax.processes import gather, is_first_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Several processes ask one another so often whether one of them was told to stop: they wait for each other then.
AGREE_EVERY_STEPS = 10


class StopRequest:
    """Notes that this process is to stop; a context manager that catches the signals meanwhile.

    At first a signal raises `Stopped` where the program is. After `defer` it is only noted, and the training loop asks
    for it between calls. A second signal ends the process at once, whatever it does. Signals go to a program's main
    thread; in another thread nothing is caught.
    """

    def __init__(self):
        self._signal, self._deferred = 0, False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._restore.callback(signal.signal, number, signal.signal(number, self._note))
            # Python runs handlers between two instructions of its own, which a compilation may hold up for minutes; a
            # thread that reads the numbers from a pipe sees a second signal meanwhile.
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            self._restore.callback(os.close, writing)
            self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
            threading.Thread(target=_exit_at_second_signal, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _note(self, number: int, _: Any) -> None:
        if self._signal:
            return
        self._signal = number
        if not self._deferred:
            raise self.stopped("stopped before the first step; start again with the same command")
        os.write(2, b"stopping once the steps under way are done and saved; a second signal ends the run at once\n")

    def defer(self) -> None:
        """From here on a signal is only noted."""
        self._deferred = True

    def stopped(self, message: str) -> Stopped:
        """The exception to end with; of several processes the first one speaks."""
        return Stopped(message if is_first_process() else "", 128 + self._signal)

    def interrupts_work_of_one(self) -> bool:
        """Whether to leave off in the middle of something, which several processes could only do together."""
        return bool(self._signal) and jax.process_count() == 1

    def agreed(self, before: int, step: int, *, ask: bool = False) -> bool:
        """Whether all processes are to stop now; to be called by all, after each call of the compiled steps.

        Args:
          before, step: the steps done before the call and after it; processes ask one another every
            `AGREE_EVERY_STEPS`.
          ask: ask one another in any case.
        """
        if jax.process_count() > 1:
            if not ask and before // AGREE_EVERY_STEPS == step // AGREE_EVERY_STEPS:
                return False
            self._signal = max(gather(self._signal, "the question whether to stop"))
        return bool(self._signal)


def _exit_at_second_signal(reading: int) -> None:
    caught = 0
    while number := os.read(reading, 1):  # nothing: the other end was closed
        caught += number[0] in SIGNALS
        if caught == 2:
            os._exit(128 + number[0])
    os.close(reading)
