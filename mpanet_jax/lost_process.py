"""One line on standard error in place of JAX's stack traces, when another process of the run is lost.

JAX's coordination service then aborts this process from C++ with about a hundred lines of stack traces. Python can
neither catch that nor add to it (`missed_heartbeat_callback` of jaxlib 0.10 ends in std::bad_cast before it calls
Python). So what C++ writes to standard error goes through a small process, this file run as a script. That outlives the
abort, drops those lines and says what has happened. What Python writes does not go through it.
"""

import os
import re
import signal
import subprocess
import sys

GO_ON = "start all of them again with the same command: the run goes on from its last checkpoint"
# From such a line on, everything belongs to the abort.
_BEGINS = re.compile(rb"^[EF]\d{4} .*coordination_service|Terminating process because the JAX distributed service")
_SAID = b"\0said\n"
_ABORTS = b"Terminating process because the JAX distributed service"


def filter_standard_error(process_id: int | None) -> None:
    """Starts the filter: from now on what C++ writes to standard error goes through it. Call this once.

    Args:
      process_id: the number of this process in the run, for the line; None: unknown.
    """
    sys.stderr.flush()
    python_writes = os.dup(2)
    reading, writing = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", __file__, "" if process_id is None else str(process_id)],
        stdin=reading,
        stderr=python_writes,
        stdout=subprocess.DEVNULL,
    )
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = os.fdopen(python_writes, "w", buffering=1, errors="backslashreplace")


def suppress_abort_line() -> None:
    """Tells the filter that Python has printed the line already, in case JAX still aborts the process."""
    os.write(2, _SAID)


def means_lost_process(error: BaseException) -> bool:
    """Whether a runtime error of JAX means that another process does not answer."""
    signs = r"gloo|connection (closed|reset|refused)|socket closed|UNAVAILABLE|heartbeat|task died|unhealthy"
    return re.search(signs, str(error), re.I) is not None


def _filter(lines, output, process_id: str) -> None:
    held, said = b"", False
    for text in lines:
        if text.endswith(_SAID):
            said = True
        elif held or _BEGINS.search(text):
            held += text
        else:
            output.write(text)
            output.flush()
    if _ABORTS in held:
        lost = re.search(rb"task:(\d+)", held)
        who = f"process {lost[1].decode()}" if lost else "process 0" if b"Socket closed" in held else "another process"
        this = f"process {process_id}" if process_id else "this process"
        line = f"error: {this} ends because {who} was lost; see what it printed, and {GO_ON}\n"
        held = b"" if said else line.encode()
    output.write(held)
    output.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the end of its input ends it
        signal.signal(number, signal.SIG_IGN)
    _filter(sys.stdin.buffer, sys.stderr.buffer, sys.argv[1])
