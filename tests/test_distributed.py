"""scripts/train.py as two processes with two devices each: the result of one, and what happens when one is killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpanet_jax.checkpoint import load_model
from mpanet_jax.datasets.synthetic import write_dataset
from tests import scripts_in_process
from tests.limits import HANGS_AFTER

# All in one worker: the processes of the last test sleep while the other tests run.
pytestmark = pytest.mark.xdist_group("distributed")
ROOT = Path(__file__).parent.parent
STEPS_PER_EPOCH = 3
QUIET = ("step ", "images: ", "checking images", "writing ", "batches: ")
PROGRESS = re.compile(r"^[\w /.-]+: [\d,]+( of [\d,]+)? \w+")
# "[Gloo] Rank 0 is connected to 3 peer ranks. …: 3", of which several threads write pieces into each other's lines.
GLOO = re.compile(r"Gloo|peer ranks|^[\d\s]*$")
ALONE = ("--config.data.cache=device", f"--config.train.steps_per_call={STEPS_PER_EPOCH}")
# tests/test_parallel.py has the other networks and losses, on devices of one process.
NETWORK = (
    *("--config.model.backbone=resnet18", "--config.model.width=4", "--config.model.fused=off"),
    *("--config.model.channel_module=none", "--config.model.pattern_module=none", "--config.augment.crop_padding=0"),
    *(f"--config.loss.{term}=0" for term in ("separation", "modality_identity", "mutual_mean")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    # Four identities with six infrared images each: three batches of P = 4, K = 4.
    write_dataset(
        "sysu_mm01", folder / "raw", num_train_ids=4, num_test_ids=4, images_per_camera=(3, 3), height=(48, 56)
    )
    return folder


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder, workdir, num_epochs, *more, num_processes=1, of_each=((), ()), late=None):
    """Starts the processes of a run; what they print goes to WORKDIR.<process>.log.

    `of_each`: further flags of each; `late`: PLACES and SECONDS of each, for tests/late_process.py.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "MPANET_LINE_EVERY": "0",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
        f"--xla_force_host_platform_device_count={1 if num_processes == 1 else 2} "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={HANGS_AFTER}",
    }
    flags = [
        f"--config={ROOT}/configs/synthetic.py",
        *(f"--workdir={folder / workdir}", f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"),
        *(f"--config.dataset.source={folder / 'raw'}", f"--config.dataset.data_dir={folder / 'prepared'}"),
        *("--config.data.height=32", "--config.data.width=16", "--config.dtype=float64", *NETWORK),
        *("--config.data.num_ids_per_batch=4", "--config.data.images_per_id=4", "--config.optim.learning_rate=1e-4"),
        *(f"--config.train.num_epochs={num_epochs}", "--config.train.checkpoint_every_epochs=1"),
        *("--config.train.eval_every_epochs=0", "--config.train.keep_checkpoints=1000"),
        *("--config.train.log_every_steps=1", "--config.eval.batch_size=15"),
        *more,
    ]
    if num_processes > 1:
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        flags += ["--distributed", address, f"--num_processes={num_processes}"]
    processes = []
    for number in range(num_processes):
        which = [f"--process_id={number}", *of_each[number]] if num_processes > 1 else []
        script = ["-m", "tests.late_process", *late[number]] if late else [str(ROOT / "scripts/train.py")]
        command = [sys.executable, *script, *flags, *which]
        with open(log_file(folder, workdir, number), "w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return processes


def log_file(folder, workdir, process):
    return folder / f"{workdir}.{process}.log"


def checkpoints(folder, workdir):
    """The steps of those that are whole."""
    names = [path.name for path in (folder / workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def float64():
    jax.config.update("jax_enable_x64", True)  # not JAX's context manager: orbax reads in threads of its own
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def model_at(folder, workdir, step):
    alone = folder / f"{workdir}-{step}"
    shutil.copytree(folder / workdir / "checkpoints" / str(step), alone / "checkpoints" / str(step))
    with float64():
        found, model = load_model(alone)
    assert found == step
    return jax.tree.map(np.asarray, model)


def evaluated_alone(folder, workdir):
    """What one process with one device says about the last checkpoint."""
    out = folder / f"{workdir}-alone.json"
    with float64():
        process = scripts_in_process.process("evaluate.py", f"--workdir={folder / workdir}", f"--out={out}")
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


def logged_steps(folder, workdir):
    return [round(float(epoch) * STEPS_PER_EPOCH) for epoch, _ in losses(log_file(folder, workdir, 0).read_text())]


def losses(log):
    """(epoch, loss) of every step in a log, as text; a line may come again."""
    return list(dict.fromkeys(re.findall(r"epoch (\S+) loss (\S+)", log)))


@pytest.fixture(scope="module")
def late_run(folder):
    """The processes of the last test: one that is late, the one that waits for it, and one alone."""
    # A collective that is the first of its devices waits 30 s.
    late = (("prompt", "0"), ("joined,compiling", "40"))
    alone = ("--config.data.cache=device", "--config.train.steps_per_call=2")
    processes = start(folder, "late", 1, "--config.parallel=shard_map", *alone, num_processes=2, late=late)
    processes += start(folder, "prompt", 1, *alone, late=late)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("late_run")
def test_two_processes_give_the_result_of_one_and_survive_a_kill(folder):
    resized_there = ("--config.data.cache=none", "--config.data.resize_on=device")
    processes = start(folder, "two", 10_000, *resized_there, num_processes=2)
    try:
        deadline = time.monotonic() + HANGS_AFTER
        while not checkpoints(folder, "two"):
            assert time.monotonic() < deadline, log_file(folder, "two", 0).read_text()
            assert all(process.poll() is None for process in processes), log_file(folder, "two", 0).read_text()
            time.sleep(0.1)
        processes[1].kill()
        assert processes[1].wait(timeout=HANGS_AFTER) == -signal.SIGKILL
        # Meanwhile one device does the same another way: all steps in one call.
        (alone,) = start(folder, "one", 1, *ALONE)
        processes.append(alone)
        assert processes[0].wait(timeout=HANGS_AFTER) != 0
        assert alone.wait(timeout=HANGS_AFTER) == 0, log_file(folder, "one", 0).read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # Beside gloo's lines when the processes meet, the survivor says one, as it would on a terminal.
    text, line = log_file(folder, "two", 0).read_text(), "error: process 0 ends because "
    said = [other for other in text.split("\n") if not GLOO.search(other) and not other.startswith(QUIET)]
    said = [other for other in said if not PROGRESS.search(other)]
    assert text.count(line) == 1 and all(line in other for other in said), said
    assert checkpoints(folder, "two")[0] == STEPS_PER_EPOCH
    assert checkpoints(folder, "one") == [STEPS_PER_EPOCH]

    one, two = (model_at(folder, workdir, STEPS_PER_EPOCH) for workdir in ("one", "two"))
    deviations = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, two)
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {np.dtype(np.float64)}
    assert max(jax.tree.leaves(deviations)) < 1e-9, deviations

    # Started again, two processes go on from the last checkpoint; and then one alone from theirs.
    last = checkpoints(folder, "two")[-1]
    for num_processes in (2, 1):
        more = ALONE if num_processes == 1 else ()
        processes = start(folder, "two", last // STEPS_PER_EPOCH + 1, *more, num_processes=num_processes)
        try:
            codes = [process.wait(timeout=HANGS_AFTER) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * num_processes, log_file(folder, "two", 0).read_text()
        assert logged_steps(folder, "two") == [last + 1, last + 2, last + 3]
        last += STEPS_PER_EPOCH
        assert checkpoints(folder, "two")[-1] == last
        metrics = json.loads((folder / "two/metrics.json").read_text())
        assert metrics["sysu/all/single"]["step"] == last
        if num_processes == 2:  # each embedded its half of the test set
            assert metrics == evaluated_alone(folder, "two")
    # Process 0 speaks for all.
    assert "sysu/all/single" in log_file(folder, "two", 0).read_text()
    assert "sysu/all/single" not in log_file(folder, "two", 1).read_text()
    assert len(list((folder / "two/logs").iterdir())) == 3  # one for each start


def test_processes_stop_together_when_one_is_told_to(folder):
    # No checkpoint is due before the end. Schedulers tell all processes, at moments that differ; here they tell one.
    more = ("--config.train.checkpoint_every_epochs=0", "--config.train.keep_checkpoints=1")
    processes = start(folder, "told", 10_000, *more, num_processes=2, late=(("prompt", "0"),) * 2)
    try:
        deadline = time.monotonic() + HANGS_AFTER
        while not logged_steps(folder, "told"):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].terminate()
        codes = [process.wait(timeout=HANGS_AFTER) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [log_file(folder, "told", number).read_text() for number in range(2)]
    assert codes == [143, 143], logs
    (step,) = checkpoints(folder, "told")
    assert logs[0].splitlines()[-1] == f"stopped at step {step}, saved; start again with the same command"
    assert step >= logged_steps(folder, "told")[-1] and "Traceback" not in "".join(logs)


def test_a_process_that_does_not_come_is_waited_for_so_long(folder):
    late = (("impatient", "2"), ("joined", str(HANGS_AFTER)))
    processes = start(folder, "absent", 1, num_processes=2, late=late)
    try:
        code = processes[0].wait(timeout=HANGS_AFTER)
    finally:
        for process in processes:
            process.kill()
    message = log_file(folder, "absent", 0).read_text()
    assert code == 2 and message.splitlines()[-1] == (
        "error: process 0 waited 2 s at the choice of data.cache for a process that has not come; see what the "
        "others print, and where they only take longer, raise process_timeout"
    ), message


def test_a_process_that_does_not_join_is_waited_for_so_long(folder):
    flags = ("--distributed", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0")
    (process,) = start(folder, "lonely", 1, *flags, "--process_timeout=2")
    try:
        code = process.wait(timeout=HANGS_AFTER)
    finally:
        process.kill()
    message = log_file(folder, "lonely", 0).read_text()
    assert code == 2 and message.count("\n") == 1 and "waited 2 s for all processes to join" in message, message
    assert "raise process_timeout" in message
    assert not (folder / "lonely").exists()


def test_workdirs_that_are_not_one_folder_are_refused_before_the_first_step(folder):
    other = folder / "other"
    processes = start(folder, "split", 1, num_processes=2, of_each=((), (f"--workdir={other}",)))
    try:
        codes = [process.wait(timeout=HANGS_AFTER) for process in processes]
    finally:
        for process in processes:
            process.kill()
    message = log_file(folder, "split", 0).read_text()
    assert codes == [2, 2], message
    assert f"error: --workdir = {folder / 'split'} of process 0: another folder for process 1" in message
    assert not other.exists() and not list((folder / "split").iterdir())


def test_a_distributed_start_without_a_cluster_says_what_is_missing(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), f"--config={ROOT}/configs/synthetic.py", "--distributed"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "coordinator_address" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_processes_wait_for_one_that_reads_or_compiles_for_longer(folder, late_run):
    codes = [process.wait(timeout=HANGS_AFTER) for process in late_run]
    logs = [log_file(folder, *which).read_text() for which in (("late", 0), ("late", 1), ("prompt", 0))]
    assert codes == [0, 0, 0], logs
    # A call of two steps, and one of one: what was compiled before the processes met is what ran.
    for log in logs:
        assert json.loads(log.splitlines()[-1]) == {"traced": {"2": 1, "1": 1}, "compiled": 2}
    late, prompt = losses(logs[0]), losses(logs[2])
    assert len(late) == STEPS_PER_EPOCH and late == prompt
