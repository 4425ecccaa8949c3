"""One run in a workdir at a time, on disks with locks and without."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mpanet_jax import workdir_lock
from mpanet_jax.errors import UserError
from mpanet_jax.workdir_lock import LOCK_FILE, RECORD_FILE, locked_workdir

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from mpanet_jax.workdir_lock import locked_workdir
with locked_workdir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture(params=["locks", "no locks"])
def disk(request, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if request.param == "no locks":
        monkeypatch.setattr(workdir_lock.fcntl, "flock", no_locks)
    return request.param


def test_second_run_is_refused_while_the_first_one_trains(tmp_path, disk):
    workdir = tmp_path / "runs/one"
    with locked_workdir(workdir):
        said = rf"{workdir}: process {os.getpid()} on .* trains there"
        with pytest.raises(UserError, match=said) as error, locked_workdir(workdir):
            pass
        assert (str(workdir / RECORD_FILE) in str(error.value)) == (disk == "no locks")
        with locked_workdir(tmp_path / "runs/other"):
            pass
    assert not list(workdir.iterdir())
    with locked_workdir(workdir):
        pass


def test_lock_ends_with_a_process_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"), locked_workdir(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_FILE).exists()  # left behind, and no obstacle
    with locked_workdir(tmp_path):
        pass


@pytest.mark.parametrize("holder", ["dead", "elsewhere", "cut off"])
@pytest.mark.parametrize("disk", ["no locks"], indirect=True)
def test_record_of_a_killed_process_is_an_obstacle_only_where_nobody_can_tell(tmp_path, disk, holder):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = socket.gethostname() if holder == "dead" else "another-host"
    record = tmp_path / RECORD_FILE
    record.write_text("" if holder == "cut off" else f"process {process.pid} on {host}")
    if holder == "dead":
        with locked_workdir(tmp_path):
            assert str(os.getpid()) in record.read_text()
        assert not record.exists()
    else:
        with pytest.raises(UserError, match=f"delete {record}"), locked_workdir(tmp_path):
            pass
        assert record.exists()
