"""What a script does before it imports the rest."""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from mpanet_jax.compilation import end_start, start_fast, time_fewer_kernels
from tests.scripts_in_process import early_start

TILINGS = "--xla_gpu_experimental_cost_model_gemm_tiling_options"


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process without an NVIDIA plugin, whose threshold and flags are set back."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    install(monkeypatch, None)
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def install(monkeypatch, plugin):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == plugin else None)


def wait_for_threads(before):
    for thread in set(threading.enumerate()) - before:
        thread.join()


def test_devices_start_beside_the_program(monkeypatch):
    threads, started, go_on = set(threading.enumerate()), [], threading.Event()

    def devices():
        assert go_on.wait(60)
        started.append(threading.current_thread())

    monkeypatch.setattr(jax, "devices", devices)
    start_fast(devices=True)
    assert not started  # and the program has gone on
    go_on.set()
    wait_for_threads(threads)
    assert len(started) == 1 and started[0] is not threading.current_thread()


def test_devices_may_be_left_alone(monkeypatch):
    threads, started = set(threading.enumerate()), []
    monkeypatch.setattr(jax, "devices", lambda: started.append(1))
    start_fast(devices=False)
    wait_for_threads(threads)
    assert not started


def test_garbage_is_hardly_looked_for_until_the_start_ends():
    own = gc.get_threshold()
    end_start()
    assert gc.get_threshold() == own  # nothing was started: a program's own threshold stays
    start_fast(devices=False)
    assert gc.get_threshold()[0] == 1_000_000
    end_start()
    assert gc.get_threshold()[0] == 10_000


def test_a_device_that_does_not_start_is_left_to_the_next_use(monkeypatch):
    threads, asked, said = set(threading.enumerate()), [], []

    def devices():
        asked.append(1)
        raise RuntimeError("no device")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(threading, "excepthook", said.append)
    start_fast(devices=True)
    wait_for_threads(threads)
    assert asked and not said


@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin"])
def test_xla_is_asked_for_fewer_kernels_for_nvidia_gpus_alone(monkeypatch, plugin):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=folder")
    start_fast(devices=False)
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=folder"
    install(monkeypatch, plugin)
    for _ in range(2):  # a second call changes nothing
        start_fast(devices=False)
        assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=folder {TILINGS}=top=4,top_from_default=1"
    monkeypatch.delenv("XLA_FLAGS")
    time_fewer_kernels()
    assert os.environ["XLA_FLAGS"] == f"{TILINGS}=top=4,top_from_default=1"


def test_a_choice_of_kernels_of_ones_own_stays(monkeypatch):
    install(monkeypatch, "jax_cuda13_plugin")
    monkeypatch.setenv("XLA_FLAGS", f"{TILINGS}=filter=0.5")
    time_fewer_kernels()
    assert os.environ["XLA_FLAGS"] == f"{TILINGS}=filter=0.5"


@pytest.mark.parametrize(
    ("release", "known"), [((0, 10, 1), False), ((0, 10, 2), True), ((0, 12, 0, 1), True), ((0, 13, 0), False)]
)
def test_an_xla_that_may_not_know_the_option_is_not_asked(monkeypatch, release, known):
    install(monkeypatch, "jax_cuda13_plugin")
    monkeypatch.setattr(jax, "__version_info__", release)
    monkeypatch.setenv("XLA_FLAGS", "")
    time_fewer_kernels()
    assert (TILINGS in os.environ["XLA_FLAGS"]) == known


def test_the_installed_xla_knows_the_option(monkeypatch):
    install(monkeypatch, "jax_cuda13_plugin")
    monkeypatch.setenv("XLA_FLAGS", "")
    time_fewer_kernels()
    assert (TILINGS in os.environ["XLA_FLAGS"]) == (jax.__version_info__ >= (0, 10, 2))
    # Of the text XLA reads only what it knows: one wrong letter ends this process.
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "early"),
    [
        ("--config=configs/sysu.py --workdir=run", True),
        ("--config configs/sysu.py --config.dataset.data_dir=data", True),
        ("--config=configs/sysu.py --distributed", False),
        ("--config=configs/sysu.py --distributed=true --process_id=1", False),
        ("--config=configs/sysu.py --flagfile=flags.txt", False),  # it may hold --distributed
        ("--help", False),
    ],
)
def test_training_starts_devices_early_unless_it_joins_others(monkeypatch, tmp_path, words, early):
    (tmp_path / "flags.txt").touch()
    words = words.replace("flags.txt", str(tmp_path / "flags.txt"))
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *words.split()])
    assert early_start(Path("scripts/train.py")) == {"devices": early}
