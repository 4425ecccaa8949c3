"""Work that a thread does beside the rest of the program: a call, or an iterator's next element."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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


class Ahead(Generic[T]):
    """An iterator whose next element is made by a thread while the last one is used; a context manager.

    At its end it waits for the element that is being made, so that what the iterator reads may then be closed.
    """

    def __init__(self, iterator: Iterator[T]):
        self._iterator = iterator
        self._thread = ThreadPoolExecutor(1)
        self._next = self._start()

    def _start(self) -> Future[T]:
        return self._thread.submit(self._make)

    def _make(self) -> T:
        try:
            return next(self._iterator)
        except StopIteration:
            raise _EndError from None  # a future must not raise StopIteration

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        try:
            made = self._next.result()
        except _EndError:
            raise StopIteration from None
        self._next = self._start()
        return made

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As the end of the context."""
        self._thread.shutdown(cancel_futures=True)
        self._next = Future()  # lets go of an element that nobody has asked for
        self._next.set_exception(_EndError())


class _EndError(Exception):
    """The iterator has no further element."""
