"""A check that runs in a thread beside the training."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class InBackground(Generic[T]):
    """Calls a function once, in a thread that does not keep the program from ending."""

    def __init__(self, function: Callable[[], T]):
        self._function = function
        self._result: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Starts the call, unless it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._result.set_result(self._function())
        except BaseException as error:
            self._result.set_exception(error)

    def result(self) -> T:
        """Waits for the call, and returns its result or raises its error."""
        self.start()
        return self._result.result()
