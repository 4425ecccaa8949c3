"""A function that runs in a thread beside the rest of the program."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class InBackground(Generic[T]):
    """Calls a function once, in a thread.

    Args:
      function: what is called.
      cut_off: whether the program may end before the call does.
    """

    def __init__(self, function: Callable[[], T], *, cut_off: bool = True):
        self._function: Callable[[], T] | None = function
        self._result: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, daemon=cut_off)

    def start(self) -> None:
        """Starts the call, unless it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        function, self._function = self._function, None  # it may hold large arrays
        assert function is not None
        try:
            self._result.set_result(function())
        except BaseException as error:
            self._result.set_exception(error)

    def result(self) -> T:
        """Waits for the call, and returns its result or raises its error."""
        self.start()
        return self._result.result()

    def wait(self) -> None:
        """Waits for the call, whether it succeeds or not."""
        self.start()
        wait([self._result])
