"""How a run ends on SIGTERM, which schedulers send, and on Ctrl-C."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax

from mpanet_jax.errors import Stopped
from mpanet_jax.processes import gather, is_first_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Several processes wait for one another to agree on stopping; they do so after every so many steps.
AGREE_EVERY_STEPS = 10


class StopRequest:
    """Catches the signals that ask this process to stop; a context manager.

    At first a signal raises `Stopped` wherever the program is. After `defer` it is only noted, and the training loop
    asks for it between calls of the compiled steps. A second signal ends the process at once, whatever it does. Only
    the main thread of a program receives signals; in another thread nothing is caught.
    """

    def __init__(self):
        self._signal, self._deferred = 0, False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._restore.callback(signal.signal, number, signal.signal(number, self._note))
            # Python runs a signal's handler between two of its instructions, and a compilation may take minutes. A
            # thread that reads the signals' numbers from a pipe sees the second one meanwhile.
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
        """From now on signals are only noted."""
        self._deferred = True

    def stopped(self, message: str) -> Stopped:
        """The exception that ends the run; only in the first process does it have the message."""
        return Stopped(message if is_first_process() else "", 128 + self._signal)

    def may_interrupt_evaluation(self) -> bool:
        """Whether to leave an evaluation unfinished: a signal has come, and no other process takes part in it."""
        return bool(self._signal) and jax.process_count() == 1

    def agreed(self, before: int, step: int, *, ask: bool = False) -> bool:
        """Whether to stop now; all processes call it after each call of the compiled steps, and get the same answer.

        Several processes ask one another once in `AGREE_EVERY_STEPS` steps; the answer is no in between.

        Args:
          before, step: the steps done before the call and after it.
          ask: ask one another now in any case.
        """
        if jax.process_count() > 1:
            if not ask and before // AGREE_EVERY_STEPS == step // AGREE_EVERY_STEPS:
                return False
            told = max(gather(self._signal, "the question whether to stop"))
            # A signal that came to this process meanwhile stays noted: it was not in the answer, and is in the next.
            self._signal = self._signal or told
            return bool(told)
        return bool(self._signal)


def _exit_at_second_signal(reading: int) -> None:
    caught = 0
    while number := os.read(reading, 1):  # nothing: the other end was closed
        caught += number[0] in SIGNALS
        if caught == 2:
            os._exit(128 + number[0])
    os.close(reading)
