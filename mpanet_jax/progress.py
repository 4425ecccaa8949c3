"""How far a long part of the work is: a bar on a terminal, and now and then a line where there is none."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

BAR_AFTER = 5.0  # seconds: what is done sooner needs no bar
# Seconds between two lines of this process, whatever part they are of.
LINE_EVERY = float(os.environ.get("MPANET_LINE_EVERY", 60))

Item = TypeVar("Item")


class _Display:
    """The bars of all parts that are under way, drawn by one rich display; and when the last line was printed."""

    def __init__(self):
        # A generator that is thrown away ends its part wherever the garbage collector runs, in this lock too.
        self._lock = threading.RLock()
        self._rich: Any = None
        self._last_line: float | None = None

    def add(self, console: Any, description: str, total: int | None) -> Any:
        from rich.progress import BarColumn, Progress, TextColumn

        with self._lock:
            rich = self._rich
            if rich is None:
                columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[status]}"))
                # A stdout that goes to a file must not be sent to the terminal with the bar.
                redirects = sys.stdout is not None and sys.stdout.isatty()
                rich = Progress(*columns, console=console, transient=True, redirect_stdout=redirects)
                rich.start()
                self._rich = rich
            return rich.add_task(description, total=total, status="")

    def update(self, task: Any, done: int, total: int | None, status: str) -> None:
        with self._lock:
            # The part may have ended since, in another thread.
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
    """Shows nothing from now on, as in all processes but the first."""
    global _quiet
    _quiet = True


class Bar:
    """The progress of one part of the work; a context manager, which several threads may advance.

    On a terminal a bar appears when the part has taken `BAR_AFTER` seconds, with its rate and the time left, and goes
    when the part ends. Where stderr is no terminal the part prints a line there at most every `LINE_EVERY` seconds.
    Parts may lie within each other: each has its bar then.

    Args:
      description: what is done: 'embedding'.
      total: how many there are to do, or None where that is not known.
      unit: what they are: 'images'.
      done: how many are done when it begins.
      active: False shows nothing, as in all processes but one.
      clock: seconds; for tests.
      console: of rich, to draw on; for tests. None: stderr.
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
        self._lock = threading.RLock()  # as of `_Display`
        self._task: Any = None
        self._open = False

    def __enter__(self) -> "Bar":
        # The first that is done may have waited for a compiler, so the rate is counted from there on.
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
        """Whether there is a terminal to draw on."""
        return self._console.is_terminal if self._console is not None else sys.stderr.isatty()

    def advance(self, count: int = 1) -> None:
        """Says that `count` more are done."""
        with self._lock:
            self._done += count
        self._report()

    def update(self, done: int, *, total: int | None = None, note: str | None = None) -> None:
        """Says that `done` are done, of `total` where that is known only now; `note` stands behind the rate."""
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
        """'1,200 of 3,803 images, 35/s, 1:14 left'."""
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
    """The items, with a `Bar` that an item advances by `size(item)` when the next one is asked for."""
    with Bar(description, total, unit=unit, active=active) as bar:
        for item in items:
            yield item
            bar.advance(size(item))


def duration(seconds: float) -> str:
    """'0:07', '12:40', '3:05:00': minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
