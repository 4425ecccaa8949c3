"""What signals do to a run: at first, between calls of the compiled steps, and the second time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpanet_jax.errors import Stopped
from mpanet_jax.stop import StopRequest
from tests.limits import HANGS_AFTER

ROOT = Path(__file__).parent.parent
# Deaf for an hour, as in a compilation: Python's own handlers do not run meanwhile.
BUSY = """
import ctypes
from mpanet_jax.stop import StopRequest
with StopRequest() as stop:
    stop.defer()
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(3600)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_before_the_first_step_ends_the_run_where_it_is(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped before the first step; start again") as stopped, StopRequest():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_between_steps_is_noted(number, code):
    with StopRequest() as stop:
        stop.defer()
        assert not stop.agreed(0, 1)
        os.kill(os.getpid(), number)
        assert stop.agreed(1, 2) and stop.may_interrupt_evaluation()
        assert stop.stopped("said").exit_code == code and str(stop.stopped("said")) == "said"


def test_signal_that_comes_while_processes_ask_one_another_is_in_the_next_answer(monkeypatch):
    asked = []

    def gather(value, _):
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(value)
        return [value, 0]

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("mpanet_jax.stop.gather", gather)
    with StopRequest() as stop:
        stop.defer()
        assert not stop.agreed(9, 10)  # the other process has heard of no signal, and goes on
        assert not stop.agreed(10, 11) and asked == [0]
        assert stop.agreed(19, 20) and asked == [0, signal.SIGTERM]
        assert stop.stopped("").exit_code == 143


def test_signal_of_another_process_ends_this_one(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("mpanet_jax.stop.gather", lambda value, _: [value, int(signal.SIGINT)])
    with StopRequest() as stop:
        stop.defer()
        assert stop.agreed(9, 10) and stop.stopped("").exit_code == 130


def test_second_signal_ends_the_process_whatever_it_does():
    with subprocess.Popen([sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (130, 143)  # two signals that are sent at once come in either order


INTERRUPTED = """
import threading, time
import jax
import jax.numpy as jnp
from mpanet_jax.errors import UserError, run_script


def long_to_compile(x):
    for i in range(4000):
        x = jnp.sin(x @ x) + i
    return x


def main(arguments):
    lowered = jax.jit(long_to_compile).lower(jnp.ones((9, 9)))
    threading.Thread(target=lowered.compile, daemon=True).start()
    time.sleep(1)
    raise {error}


run_script(main)
"""


@pytest.mark.parametrize(
    "error, code, said",
    [
        ("KeyboardInterrupt", 130, "stopped\n"),
        ('UserError("not so")', 2, "error: not so\n"),
        ('ValueError("not so")', 1, "ValueError: not so\n"),
    ],
)
def test_a_script_that_ends_while_a_program_is_compiled_does_not_crash(tmp_path, error, code, said):
    (tmp_path / "script.py").write_text(INTERRUPTED.format(error=error))
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False, timeout=HANGS_AFTER
    )
    printed = done.stderr
    if code == 1:  # before the line, a traceback
        assert printed.startswith("Traceback ")
        printed = printed.splitlines(keepends=True)[-1]
    assert (done.returncode, printed) == (code, said)
