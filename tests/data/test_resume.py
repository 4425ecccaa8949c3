"""Killed at any step and restarted, the batches that follow are the same bits, in all feeding modes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mpanet_jax.errors import UserError
from tests.data.toy import batch_hash, toy_feed, toy_plan, toy_split
from tests.limits import HANGS_AFTER

ROOT = Path(__file__).resolve().parents[2]
MODES = ("none0", "none2", "host0", "device0")


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.data.feed_process", str(folder), *MODES]
    # A new file: what cleans up behind a killed process may still write to the old one.
    (folder / "stderr.txt").unlink(missing_ok=True)
    with open(folder / "stderr.txt", "w") as stderr:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)


def lines(folder: Path) -> list[str]:
    log = folder / "batches.txt"
    return log.read_text().splitlines() if log.exists() else []


def checkpoints(folder: Path) -> list[str]:
    """Those that are whole."""
    return [path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]


def children(pid: int) -> list[int]:
    """Those started by any of a process's threads."""
    while True:
        lists = [thread / "children" for thread in Path(f"/proc/{pid}/task").iterdir()]
        try:
            return [int(child) for list_of_one in lists for child in list_of_one.read_text().split()]
        except FileNotFoundError:  # a thread has ended meanwhile, and another one has its children now
            continue


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="watches processes through /proc")
def test_batches_after_a_kill_are_bit_identical_in_all_modes(tmp_path):
    feed = toy_feed(toy_split(), cache="none")
    expected = [batch_hash(batch) for batch in feed.batches]
    assert len(expected) == 3 * feed.steps_per_epoch == len(set(expected))
    for mode in MODES:
        (tmp_path / mode).mkdir()

    # One process runs all modes in turn. It is killed when each is at another step, after its first checkpoint.
    process = start(tmp_path)
    deadline = time.monotonic() + HANGS_AFTER
    while not all(len(lines(tmp_path / mode)) >= 4 and checkpoints(tmp_path / mode) for mode in MODES):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "stderr.txt").read_text()
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2  # those of none2
    deadline = time.monotonic() + HANGS_AFTER
    while any(map(running, workers)):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.02)

    process = start(tmp_path)
    assert process.wait(timeout=HANGS_AFTER) == 0, (tmp_path / "stderr.txt").read_text()
    assert "leaked" not in (tmp_path / "stderr.txt").read_text()  # the workers' shared memory
    for mode in MODES:
        log = lines(tmp_path / mode)
        assert log[-1] == "end"
        (restart,) = [number for number, line in enumerate(log) if line.startswith("restored")]
        step = int(log[restart].split()[1])
        assert step > 0 and step % 3 == 0
        hashes = dict(enumerate(expected))
        before = [line.split() for line in log[:restart]]
        assert [(int(s), h) for s, h in before] == list(hashes.items())[: len(before)], mode
        after = [line.split() for line in log[restart + 1 : -1]]
        assert [(int(s), h) for s, h in after] == list(hashes.items())[step:], mode


# A finalizer from before multiprocessing was imported makes Python run all finalizers after its clean-up.
UNCLOSED = """
import weakref
weakref.finalize(type("Early", (), {}), int)
from tests.data.toy import toy_feed, toy_split
if __name__ == "__main__":
    feed = toy_feed(toy_split(), cache="none", num_workers=2)
    next(feed.batches)
"""


def test_a_program_that_ends_without_closing_its_feed_ends_and_leaves_nothing(tmp_path):
    (tmp_path / "unclosed.py").write_text(UNCLOSED)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, tmp_path / "unclosed.py"]
    result = subprocess.run(command, env=environment, timeout=HANGS_AFTER, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def save(folder, batches):
    ocp.save_checkpointables(folder, {"state": {"step": np.zeros(())}, "data": batches})


def load(folder, batches):
    ocp.load_checkpointables(folder, {"state": None, "data": batches})


@pytest.mark.parametrize("taken", [0, 5, 9, 21])
def test_a_checkpoint_resumes_in_another_mode(tmp_path, taken):
    feed = toy_feed(toy_split(), cache="none")
    expected = [batch_hash(batch) for batch in feed.batches]
    assert len(expected) == 21
    feed = toy_feed(toy_split(), cache="none")
    for _ in range(taken):
        next(feed.batches)
    save(tmp_path / "checkpoint", feed.batches)
    for cache in ("host", "device"):
        other = toy_feed(toy_split(), cache=cache, cache_dir=tmp_path)
        if taken == 5:  # an iterator that is already under way is put back too
            for _ in range(8):
                next(other.batches)
        load(tmp_path / "checkpoint", other.batches)
        assert [batch_hash(batch, other.images) for batch in other.batches] == expected[taken:]


@pytest.mark.parametrize(
    "change", [dict(seed=4), dict(num_ids_per_batch=5), dict(images_per_id=2), dict(counts=[(5, 5)] * 6)]
)
def test_a_checkpoint_of_another_plan_is_refused(change):
    state = toy_feed(toy_split(), cache="none").batches.get_state()
    change = dict(change)
    split = toy_split(change.pop("counts")) if "counts" in change else toy_split()
    fix = (
        "the same data.*, seed and data set (and as many devices, with batch_scale = 'per_device'), or "
        "start in a new workdir"
    )
    with pytest.raises(UserError, match=re.escape(fix)):
        toy_feed(split, toy_plan(split, **change), cache="none").batches.set_state(state)


def test_a_checkpoint_beyond_the_last_epoch_is_refused():
    feed = toy_feed(toy_split(), cache="none")
    for _ in range(20):
        next(feed.batches)
    shorter = toy_feed(toy_split(), num_epochs=2, cache="none")
    with pytest.raises(UserError, match=r"next batch is 20, but this run has 14 batches; raise train\.num_epochs"):
        shorter.batches.set_state(feed.batches.get_state())
