"""When a bar appears, what it says, and how rarely a line is printed where there is no terminal."""

import io

import pytest
from rich.console import Console

from mpanet_jax import progress
from mpanet_jax.progress import Bar, duration, track


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "_DISPLAY", progress._Display())
    return Clock()


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def steps(bar, clock, seconds, every=1):
    """Advances the bar by one each `every` seconds, for so many seconds."""
    for _ in range(seconds // every):
        clock.now += every
        bar.advance()


def test_on_a_terminal_a_bar_comes_after_five_seconds_and_goes_at_the_end(clock):
    screen = console(True)
    with Bar("embedding", 40, clock=clock, console=screen) as bar:
        steps(bar, clock, 4)
        assert screen.file.getvalue() == ""
        steps(bar, clock, 16, every=2)
        assert "embedding" in screen.file.getvalue()
        # Eleven intervals between the first and the twelfth image took 3 + 8·2 seconds.
        assert bar._status(clock.now) == "12 of 40 images, 0.58/s, 0:48 left"
    assert progress._DISPLAY._rich is None
    screen.file.truncate(0)
    bar.advance()
    assert "embedding" not in screen.file.getvalue()


def test_parts_within_each_other_have_a_bar_each(clock):
    screen = console(True)
    with Bar("training", 10, unit="steps", clock=clock, console=screen) as outer:
        steps(outer, clock, 6)
        with Bar("embedding", 10, clock=clock, console=screen) as inner:
            steps(inner, clock, 6)
            assert [task.description for task in progress._DISPLAY._rich.tasks] == ["training", "embedding"]
        assert [task.description for task in progress._DISPLAY._rich.tasks] == ["training"]


def test_without_a_terminal_there_is_a_line_a_minute_of_all_parts_together(clock, capsys):
    with Bar("training", 1000, unit="steps", clock=clock, console=console(False)) as outer:
        steps(outer, clock, 59)
        assert capsys.readouterr().err == ""
        steps(outer, clock, 1)
        assert capsys.readouterr().err == "training: 60 of 1,000 steps, 1/s, 15:40 left\n"
        with Bar("embedding", None, clock=clock, console=console(False)) as inner:
            for _ in range(180):
                steps(inner, clock, 1)
                outer.update(60, note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0] == "embedding: 60 images, 1/s"


def test_a_short_part_and_another_process_s_say_nothing(clock, capsys):
    for _ in range(30):  # each under a minute
        with Bar("ranking", 20, clock=clock, console=console(False)) as bar:
            steps(bar, clock, 20)
    with Bar("ranking", 200, clock=clock, active=False) as bar:
        steps(bar, clock, 200)
    assert capsys.readouterr().err == ""


def test_a_quiet_process_says_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_quiet", False)
    progress.quiet()
    with Bar("ranking", 200, clock=clock, console=console(False)) as bar:
        steps(bar, clock, 200)
    assert capsys.readouterr().err == ""


def test_a_report_that_comes_after_the_end_of_its_part_is_left_out(clock, monkeypatch):
    screen, update = console(True), progress._Display.update
    with Bar("training", 10, clock=clock, console=screen) as outer:
        steps(outer, clock, 6)
        with Bar("embedding", 10, clock=clock, console=screen) as inner:

            def end_first(display, task, *rest):
                inner.__exit__()
                update(display, task, *rest)

            monkeypatch.setattr(progress._Display, "update", end_first)
            steps(inner, clock, 6)
        assert [task.description for task in progress._DISPLAY._rich.tasks] == ["training"]


def test_a_part_may_end_while_its_lock_is_held(clock):
    with Bar("embedding", 10, clock=clock, console=console(True)) as bar:
        steps(bar, clock, 6)
        with progress._DISPLAY._lock, bar._lock:  # as when the garbage collector closes a generator there
            bar.__exit__()
    assert progress._DISPLAY._rich is None


def test_output_to_a_file_stays_out_of_the_bar_s_terminal(clock, capsys):
    screen = console(True)
    with Bar("embedding", 10, clock=clock, console=screen) as bar:
        steps(bar, clock, 6)
        print("a result")
    assert capsys.readouterr().out == "a result\n" and "a result" not in screen.file.getvalue()


def test_track_gives_the_items_and_counts_their_size(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    seen = []
    monkeypatch.setattr(Bar, "advance", lambda self, count=1: seen.append(count))
    assert list(track(["a", "bcd"], "reading", 4, size=len)) == ["a", "bcd"]
    assert seen == [1, 3]


@pytest.mark.parametrize("seconds, text", [(7.4, "0:07"), (760, "12:40"), (11100, "3:05:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text
