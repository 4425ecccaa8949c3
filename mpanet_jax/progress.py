"""The progress of long parts of the work: a bar on a terminal, and elsewhere a line now and then."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

BAR_AFTER = 5.0  # seconds; shorter parts need no bar
# The fewest seconds between two lines of this process, of any part.
LINE_EVERY = float(os.environ.get("MPANET_LINE_EVERY", 60))

Item = TypeVar("Item")


class _Display:
    """The bars of all parts under way, drawn by one display of rich; and when the last line was printed."""

    def __init__(self):
        # Reentrant: the garbage collector may end a part, that of an abandoned generator, while this lock is held.
        self._lock = threading.RLock()
        self._rich: Any = None
        self._last_line: float | None = None

    def add(self, console: Any, description: str, total: int | None) -> Any:
        from rich.progress import BarColumn, Progress, TextColumn

        with self._lock:
            rich = self._rich
            if rich is None:
                columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[status]}"))
                # If stdout goes to a file, rich must not send it to the terminal.
                redirects = sys.stdout is not None and sys.stdout.isatty()
                rich = Progress(*columns, console=console, transient=True, redirect_stdout=redirects)
                rich.start()
                self._rich = rich
            return rich.add_task(description, total=total, status="")

    def update(self, task: Any, done: int, total: int | None, status: str) -> None:
        with self._lock:
            # Another thread may have ended the part meanwhile.
            if self._rich is not None and task in self._rich.task_ids:
                self._rich.update(task, completed=done, total=total, status=status)

    def remove(self, task: Any) -> None:
        with self._lock:
            rich = self._rich
            if rich is None or task not in rich.task_ids:
                return
            rich.remove_task(task)
            if not rich.tasks:
                rich.stop()
                self._rich = None

    def line_is_due(self, now: float, since: float) -> bool:
        """Whether a part that began at `since` may print a line `now`; if so, it counts as printed."""
        with self._lock:
            last = since if self._last_line is None else max(since, self._last_line)
            if now - last < LINE_EVERY:
                return False
            self._last_line = now
            return True


_DISPLAY = _Display()
_quiet = False


def quiet() -> None:
    """Turns all progress off in this process; all processes but the first call it."""
    global _quiet
    _quiet = True


class Bar:
    """The progress of one part of the work; a context manager. Several threads may advance it.

    On a terminal a bar, with the rate and the time left, appears once the part has taken `BAR_AFTER` seconds, and
    disappears when it ends. If stderr is no terminal, a line is printed there at most every `LINE_EVERY` seconds. Parts
    may be nested; each has its own bar.

    Args:
      description: what is done: 'embedding'.
      total: how many items there are to do; None: unknown.
      unit: what the items are: 'images'.
      done: how many are done at the beginning.
      active: False shows nothing.
      clock: returns seconds; for tests.
      console: rich's, to draw on; for tests. None: stderr.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        unit: str = "images",
        done: int = 0,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
        console: Any = None,
    ):
        self._description, self._total, self._unit, self._done = description, total, unit, done
        self._active, self._clock, self._console = active, clock, console
        self._note = ""
        self._lock = threading.RLock()  # reentrant, as that of `_Display`
        self._task: Any = None
        self._open = False

    def __enter__(self) -> "Bar":
        # The first item may have waited for a compilation, so the rate counts from its end on.
        self._began, self._first = self._clock(), None
        self._timer = None
        if not self._active or _quiet:
            return self
        self._open = True
        if self.on_terminal:
            self._timer = threading.Timer(BAR_AFTER, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open = False
            if self._timer is not None:
                self._timer.cancel()
            if self._task is not None:
                _DISPLAY.remove(self._task)
                self._task = None

    @property
    def on_terminal(self) -> bool:
        """Whether the bar can be drawn: stderr is a terminal."""
        return self._console.is_terminal if self._console is not None else sys.stderr.isatty()

    def advance(self, count: int = 1) -> None:
        """Adds `count` items that are done."""
        with self._lock:
            self._done += count
        self._report()

    def update(self, done: int, *, total: int | None = None, note: str | None = None) -> None:
        """Sets the number of items that are done.

        Args:
          done: how many are.
          total: how many there are, if that is known only now.
          note: a text to show after the rate; None keeps the last one.
        """
        with self._lock:
            self._done = done
            self._total = self._total if total is None else total
            self._note = self._note if note is None else note
        self._report()

    def _report(self) -> None:
        if not self._open:
            return
        now = self._clock()
        if self._first is None:
            self._first = (now, self._done)
        if self.on_terminal:
            if self._task is None and now - self._began >= BAR_AFTER:
                self._show()
            elif self._task is not None:
                _DISPLAY.update(self._task, self._done, self._total, self._status(now))
        elif _DISPLAY.line_is_due(now, self._began):
            print(f"{self._description}: {self._status(now)}", file=sys.stderr, flush=True)

    def _show(self) -> None:
        with self._lock:
            if self._task is not None or not self._open:
                return
            console = self._console
            if console is None:
                from rich.console import Console

                console = Console(stderr=True)
            self._task = task = _DISPLAY.add(console, self._description, self._total)
        _DISPLAY.update(task, self._done, self._total, self._status(self._clock()))

    def _status(self, now: float) -> str:
        """The text beside the bar: '1,200 of 3,803 images, 35/s, 1:14 left'."""
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._done:,}{of} {self._unit}"]
        if self._first is not None and now > self._first[0] and self._done > self._first[1]:
            rate = (self._done - self._first[1]) / (now - self._first[0])
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            if self._total is not None:
                parts.append(f"{duration(max(0, self._total - self._done) / rate)} left")
        return ", ".join([*parts, self._note] if self._note else parts)


def track(
    items: Iterable[Item],
    description: str,
    total: int | None,
    *,
    unit: str = "images",
    size: Callable[[Item], int] = lambda _: 1,
    active: bool = True,
) -> Iterator[Item]:
    """Yields the items, and shows a `Bar`, which advances by `size(item)` once an item has been worked on."""
    with Bar(description, total, unit=unit, active=active) as bar, closing(items):
        for item in items:
            yield item
            bar.advance(size(item))


@contextlib.contextmanager
def closing(items: Iterable) -> Iterator[None]:
    """Closes a generator at the end of the block, also when an error would keep it; leaves other iterables alone."""
    try:
        yield
    finally:
        if isinstance(items, Generator):
            items.close()


def duration(seconds: float) -> str:
    """A time as minutes and seconds, with hours if there are any: '0:07', '12:40', '3:05:00'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
