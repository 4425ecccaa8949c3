"""Checkpoints: what saving them leaves behind, and what damaged ones do."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mpanet_jax.checkpoint import FOLDERS, Checkpoints, load_model
from mpanet_jax.checksums import CHECKSUMS_FILE, write_checksums
from mpanet_jax.errors import UserError
from mpanet_jax.state import TrainState

ROOT = Path(__file__).parent.parent


def test_saves_leave_no_descriptors_threads_or_memory_behind(tmp_path):
    saves = 50
    command = [sys.executable, "-m", "tests.saves_process", str(tmp_path), "30", str(saves)]
    # One heap: how much of several ones the threads of a save leave unused is chance.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    growth = json.loads(result.stdout)
    assert (growth["descriptors"], growth["threads"]) == (0, 0)
    assert growth["bytes"] < 0.05 * 2**20 * saves


# Saves step 1 as it should be and step 2, perhaps as the best, where no file may be larger than 4 KiB, as where a disk
# is full.
FULL_DISK = """
import resource, sys
from pathlib import Path
from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.errors import run_script
from tests.test_checkpoint import Batches, state_at

def main(arguments):
    with Checkpoints(Path(arguments[0]), keep=2) as checkpoints:
        checkpoints.save(1, state_at(1), Batches(1))
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with Checkpoints(Path(arguments[0]), keep=2, which=arguments[1]) as more:
            more.save(2, state_at(2, size=64), Batches(2))
            more.wait()

run_script(main)
"""


@pytest.mark.parametrize("which", ["last", "best"])
def test_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, which):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), which],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # its files have no room either
    )
    assert result.returncode == 2
    line = f"error: {tmp_path}/{FOLDERS[which]}: no room for a checkpoint; make room there, and start again "
    assert result.stderr == line + "with the same command: the run goes on from step 1\n"
    # With room it does.
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert int(checkpoints.restore(state_at(0), Batches(0)).step) == 1
        checkpoints.save(2, state_at(2), Batches(2))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "2"]


def state_at(step, bad=None, size=16):
    kernel = jax.random.normal(jax.random.key(step), (size, size)).at[3, 3].set(bad if bad is not None else 1.0)
    parts = {"params": {"conv": {"kernel": kernel}}, "batch_stats": {}, "averages": {}, "opt_state": (kernel * 2,)}
    return TrainState(step=jnp.array(step, jnp.int32), rng=jax.random.key(0), **parts)


class Batches:
    def __init__(self, position):
        self.position = position

    def get_state(self):
        return {"next_index": self.position, "plan": "a plan"}

    def set_state(self, state):
        self.position = state["next_index"]


def save_steps(workdir, last=None):
    with Checkpoints(workdir, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, last if last is not None and step == 3 else state_at(step), Batches(step))
    return workdir / "checkpoints"


def test_the_next_step_may_have_the_buffers_of_what_is_saved(tmp_path):
    state, batches = state_at(1, size=512), Batches(1)
    kernel = np.array(state.params["conv"]["kernel"])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, batches)
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # as a step does that takes the state over
        batches.position = 2
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        position = Batches(0)
        restored = checkpoints.restore(state_at(0, size=512), position)
    np.testing.assert_array_equal(restored.params["conv"]["kernel"], kernel)
    np.testing.assert_array_equal(restored.opt_state[0], 2 * kernel)
    assert position.position == 1


def test_without_room_for_a_copy_on_the_device_the_state_is_saved_itself(tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    state = state_at(1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_put", no_room)
            checkpoints.save(1, state, Batches(1))
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert int(checkpoints.restore(state_at(0), Batches(0)).step) == 1


def test_two_saves_do_not_start_at_the_same_time(tmp_path, monkeypatch):
    # The last checkpoint and the best one. orbax would mix them up, in one of a dozen runs.
    plain, inside, most = ocp.training.Checkpointer.save_checkpointables_async, [], []

    def slowly(*arguments, **options):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.2)
        saving = plain(*arguments, **options)
        inside.pop()
        return saving

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", slowly)
    with Checkpoints(tmp_path, keep=1) as last, Checkpoints(tmp_path, keep=1, which="best") as best:
        for checkpoints in (last, best):
            checkpoints.save(1, state_at(1), Batches(1))
    assert most == [1, 1]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def swap_item(folder):
    shutil.rmtree(folder / "model")
    shutil.copytree(folder.with_name("2") / "model", folder / "model")


DAMAGE = {
    "flipped bit in an item": lambda folder: flip_a_bit(largest_file(folder / "model")),
    "flipped bit in the optimiser's item": lambda folder: flip_a_bit(largest_file(folder / "training")),
    "item of another step": swap_item,
    "all items of another step": lambda folder: [
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("2"), folder),
    ],
    "empty folder": empty,
    "file cut off": lambda folder: os.truncate(largest_file(folder), 10),
    "item gone": lambda folder: shutil.rmtree(folder / "model"),
    "position gone": lambda folder: shutil.rmtree(folder / "data"),
    "metadata are no JSON": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("{"),
    "checksums are no JSON": lambda folder: (folder / CHECKSUMS_FILE).write_text("[1"),
    "cut off, without checksums": lambda folder: [
        (folder / CHECKSUMS_FILE).unlink(),
        os.truncate(largest_file(folder / "model"), 10),
    ],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_put_aside_and_the_one_before_taken(tmp_path, capfd, how):
    folder = save_steps(tmp_path)
    DAMAGE[how](folder / "3")
    if how not in ("position gone", "all items of another step"):  # evaluation does not read it, or could not tell
        with pytest.raises(UserError, match=rf"^{folder}/3: this checkpoint is damaged \(.+\); move it away"):
            load_model(tmp_path)
    capfd.readouterr()
    batches = Batches(0)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = checkpoints.restore(state_at(0), batches)
        # Step 3 may be saved again.
        checkpoints.save(3, state_at(3), batches)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{folder}/3: damaged ("), lines
    assert (int(restored.step), batches.position) == (2, 2)
    np.testing.assert_array_equal(restored.params["conv"]["kernel"], state_at(2).params["conv"]["kernel"])
    assert [path.name for path in (tmp_path / "checkpoints_damaged").iterdir()] == ["3"]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    assert load_model(tmp_path)[0] == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_checkpoint_that_holds_no_numbers_is_damaged(tmp_path, capfd, bad):
    folder = save_steps(tmp_path, last=state_at(3, bad))
    with pytest.raises(UserError, match=rf"^{folder}/3: this checkpoint is damaged \(it holds NaN or infinite"):
        load_model(tmp_path)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert int(checkpoints.restore(state_at(0), Batches(0)).step) == 2
    assert "3: damaged (it holds NaN or infinite numbers)" in capfd.readouterr().err


def test_without_a_sound_checkpoint_the_next_start_is_from_the_beginning(tmp_path):
    folder = save_steps(tmp_path)
    for step in (1, 2, 3):
        flip_a_bit(largest_file(folder / str(step) / "model"))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(UserError, match=rf"^{folder}: no sound checkpoint is left"):
            checkpoints.restore(state_at(0), Batches(0))
        assert checkpoints.latest_step is None


def test_every_file_has_a_checksum(tmp_path):
    folder = save_steps(tmp_path)
    recorded = json.loads((folder / "3" / CHECKSUMS_FILE).read_text())
    files = {str(path.relative_to(folder / "3")) for path in (folder / "3").rglob("*") if path.is_file()}
    assert set(recorded) == files - {CHECKSUMS_FILE}
    import binascii

    for name, (size, crc) in recorded.items():
        data = (folder / "3" / name).read_bytes()
        assert (size, crc) == (len(data), binascii.crc32(data))


def test_checkpoint_of_an_older_version_has_no_checksums_and_is_taken(tmp_path):
    folder = save_steps(tmp_path)
    (folder / "3" / CHECKSUMS_FILE).unlink()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert int(checkpoints.restore(state_at(0), Batches(0)).step) == 3
    write_checksums(folder / "3")
    assert load_model(tmp_path)[0] == 3
