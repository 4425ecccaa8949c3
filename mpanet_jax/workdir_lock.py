"""A lock that lets only one run train in a workdir at a time; it ends with the process that holds it."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mpanet_jax.errors import UserError
from mpanet_jax.processes import gather, is_first_process

LOCK_FILE = ".lock"
# Where the disk has no locks: a file that names the process which trains. It stays if that process is killed.
RECORD_FILE = ".training"


@contextlib.contextmanager
def locked_workdir(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir` for a run of one or of several processes. Evaluation does not need the lock.

    Raises:
      UserError: another run trains there; the message names its host and process.
    """
    refused = None
    with contextlib.ExitStack() as stack:
        if is_first_process():
            try:
                stack.enter_context(_lock(workdir))
            except UserError as error:
                refused = error
        if gather(int(refused is not None), "the lock of the workdir")[0]:
            raise refused or UserError(f"{workdir}: another run trains there; see what process 0 prints")
        yield


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{workdir}: {holder} trains there; wait until it ends, stop it, or give another workdir"
            ) from None
        except OSError:  # a disk without locks, as some network drives are
            os.close(descriptor)
            path.unlink(missing_ok=True)
            with _recorded(workdir):
                yield
            return
        # The process that held the lock before may have removed the file after it was opened here.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, _this_process().encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def _recorded(workdir: Path) -> Iterator[None]:
    path = workdir / RECORD_FILE
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            holder = path.read_text(errors="replace")
            if _has_ended(holder):
                path.unlink(missing_ok=True)
                continue
            raise UserError(
                f"{workdir}: {holder or 'another process'} trains there; wait until it ends or give another workdir; "
                f"if it was killed, delete {path} (this disk has no locks that the system would release)"
            ) from None
    try:
        os.write(descriptor, _this_process().encode())
        os.close(descriptor)
        yield
    finally:
        path.unlink(missing_ok=True)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _has_ended(holder: str) -> bool:
    """Whether the process that `holder` names, as `_this_process` does, is known to have ended on this host."""
    try:
        _, number, _, host = holder.split()
        if host != socket.gethostname():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError):
        return False
    return False
