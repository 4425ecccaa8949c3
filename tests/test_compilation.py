"""What a script does before it imports the rest."""

import gc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import jax
import pytest

from mpanet_jax.compilation import autotune_fewer_tilings, end_start, start_fast
from tests.scripts_in_process import early_start

TILINGS = "--xla_gpu_experimental_cost_model_gemm_tiling_options"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
FIND_SPEC, VERSION = importlib.util.find_spec, importlib.metadata.version


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process without a plugin for NVIDIA GPUs, whose threshold and flags are set back."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    install(monkeypatch, None)
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def install(monkeypatch, plugin, jaxlib="0.11.2"):
    def find_spec(name, *package):
        return (object() if name == plugin else None) if name in PLUGINS else FIND_SPEC(name, *package)

    def version(name):
        return jaxlib if name == "jaxlib" else VERSION(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", version)


def wait_for_threads(before):
    for thread in set(threading.enumerate()) - before:
        thread.join()


def test_devices_start_beside_the_program(monkeypatch):
    threads, started, go_on = set(threading.enumerate()), [], threading.Event()

    def devices():
        flags = os.environ["XLA_FLAGS"]
        assert go_on.wait(60)
        started.append((threading.current_thread(), flags))

    monkeypatch.setattr(jax, "devices", devices)
    install(monkeypatch, PLUGINS[0])
    start_fast(devices=True)
    assert not started  # and the program has gone on
    go_on.set()
    wait_for_threads(threads)
    ((thread, flags),) = started
    assert thread is not threading.current_thread()
    assert TILINGS in flags  # devices read the flags as they start


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


@pytest.mark.parametrize("plugin", PLUGINS)
def test_xla_autotunes_fewer_tilings_for_nvidia_gpus_alone(monkeypatch, plugin):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=folder")
    start_fast(devices=False)
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=folder"
    install(monkeypatch, plugin)
    for _ in range(2):  # a second call changes nothing
        start_fast(devices=False)
        assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=folder {TILINGS}=top=4,top_from_default=1"
    monkeypatch.delenv("XLA_FLAGS")
    autotune_fewer_tilings()
    assert os.environ["XLA_FLAGS"] == f"{TILINGS}=top=4,top_from_default=1"


@pytest.mark.parametrize("flags", [f"{TILINGS}=filter=0.5", "flags.txt"])  # XLA reads flags from a file too
def test_flags_of_ones_own_stay(monkeypatch, flags):
    install(monkeypatch, PLUGINS[1])
    monkeypatch.setenv("XLA_FLAGS", flags)
    autotune_fewer_tilings()
    assert os.environ["XLA_FLAGS"] == flags


@pytest.mark.parametrize("jaxlib", ["0.10.0", "0.12.1", "0.13.0.dev20261201"])
def test_an_xla_that_may_not_know_the_option_is_not_given_it(monkeypatch, jaxlib):
    install(monkeypatch, PLUGINS[1], jaxlib)
    monkeypatch.setenv("XLA_FLAGS", "")
    autotune_fewer_tilings()
    assert not os.environ["XLA_FLAGS"]


def test_the_installed_xla_knows_the_option(monkeypatch):
    installed = VERSION("jaxlib")
    install(monkeypatch, PLUGINS[1], installed)
    monkeypatch.setenv("XLA_FLAGS", "")
    autotune_fewer_tilings()
    if not os.environ["XLA_FLAGS"]:
        pytest.skip(
            f"jaxlib {installed} is none of those that were seen to have the option (mpanet_jax/compilation.py)"
        )
    # XLA ends a process with a flag whose name it does not know; the value is read when it compiles for a GPU.
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True, capture_output=True)


def test_the_lab_has_the_processes_of_its_rows_autotune_fewer_tilings():
    assert early_start(Path("scripts/ablate.py")) == [mock.call.autotune_fewer_tilings()]


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
    assert early_start(Path("scripts/train.py")) == [mock.call.start_fast(devices=early)]
