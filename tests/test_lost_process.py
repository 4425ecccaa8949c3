"""The lines with which JAX aborts a process that has lost another one become one; all others pass."""

import subprocess
import sys

import pytest

from mpanet_jax import lost_process
from mpanet_jax.lost_process import GO_ON, means_lost_process

ABORT = """E1130 06:23:10.949345    9273 coordination_service.cc:1549] Use error polling to tell all tasks
/job:jax_worker/replica:0/task:1
The tasks have crashed. Check the task logs for an earlier error.
F1130 06:23:10.950422    9284 client.h:80] Terminating process because the JAX distributed service detected errors.
*** Check failure stack trace: ***
    @     0x7f3db7e40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
Fatal Python error: Aborted
"""
LATE_SERVICE = ABORT.replace("task:1", "").replace("Use error polling", "Socket closed")


def filtered(text, process_id="0"):
    command = [sys.executable, "-I", lost_process.__file__, process_id]
    return subprocess.run(command, input=text.encode(), capture_output=True, check=True).stderr.decode()


@pytest.mark.parametrize("abort, lost", [(ABORT, "process 1"), (LATE_SERVICE, "process 0")])
def test_abort_becomes_one_line(abort, lost):
    before = "[Gloo] Rank 0 is connected to 1 peer ranks.\nW1130 compiling took long\n"
    line = f"error: process 2 ends because {lost} was lost; see what it printed, and {GO_ON}\n"
    assert filtered(before + abort, "2") == before + line


def test_abort_that_python_has_announced_says_nothing_more():
    assert filtered(ABORT + "\0said\n") == filtered("\0said\n" + ABORT) == ""


@pytest.mark.parametrize("text", ["E1130 06:23 coordination_service_agent.cc:289] no abort follows\n", "no line end"])
def test_everything_else_passes(text):
    assert filtered(text) == text


@pytest.mark.parametrize(
    "said, lost",
    [
        ("UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:5: Connection reset by peer", True),
        ("UNAVAILABLE: Socket closed", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes", False),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_runtime_errors_of_a_loss_are_known(said, lost):
    assert means_lost_process(RuntimeError(said)) == lost
