"""Own cameras from end to end: images with neutral names are trained on, killed, resumed, evaluated and extracted."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpanet_jax.checkpoint import load_model
from mpanet_jax.datasets.synthetic import write_dataset
from mpanet_jax.embeddings import load_embeddings
from tests import scripts_in_process
from tests.datasets.by_name import list_images
from tests.limits import HANGS_AFTER

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config.init_from=",
    "--config.model.stage_sizes=(1,1,1,1)",
    "--config.model.backbone=resnet18",
    "--config.model.width=4",
    "--config.model.channel_module=none",
    "--config.model.pattern_module=none",
    "--config.loss.separation=0",
    "--config.loss.modality_identity=0",
    "--config.loss.mutual_mean=0",
    "--config.augment.erase_probability=0",
    "--config.data.height=32",
    "--config.data.width=16",
    "--config.data.num_ids_per_batch=3",
    "--config.data.images_per_id=4",
    "--config.train.num_epochs=2",
    "--config.train.checkpoint_every_epochs=1",
    "--config.train.eval_every_epochs=1",
    "--config.eval.batch_size=16",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The drawn people as a folder of numbered files: nothing but the CSV says whose an image is."""
    root = tmp_path_factory.mktemp("own")
    drawn = root / "drawn"
    write_dataset("sysu_mm01", drawn, num_train_ids=6, num_test_ids=4, images_per_camera=(3, 4), height=(48, 56))
    rows = []
    (root / "raw").mkdir()
    for split in ("train", "test"):
        for record in list_images("sysu_mm01", drawn, split):
            name = f"{len(rows):06d}.jpg"
            shutil.copyfile(drawn / record.path, root / "raw" / name)
            modality = ("visible", "infrared")[record.modality]
            part = "val" if split == "train" and record.part == "val" else split
            rows.append([name, f"person {record.pid}", record.camid, modality, part])
    order = np.random.default_rng(0).permutation(len(rows))
    with open(root / "raw/images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "pid", "camid", "modality", "split"], *(rows[i] for i in order)])
    return root


def script(name, *arguments, cwd):
    """What it prints to stdout and stderr, run in this process."""
    done = scripts_in_process.process(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def train_flags(own, workdir):
    places = (f"--config.dataset.source={own}/raw", f"--config.dataset.data_dir={own}/data", f"--workdir={workdir}")
    return f"--config={ROOT}/configs/own.py", *SMALL, *places


def train_until_the_first_checkpoint(own, workdir):
    """A process of its own, which is killed then."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), *train_flags(own, workdir)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    process = subprocess.Popen(
        command, cwd=own, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + HANGS_AFTER
    while not [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_train_kill_resume_evaluate_extract(own):
    out, _ = script("prepare_data.py", "--dataset=own", f"--source={own}/raw", "--check", cwd=own)
    assert "no faults" in out and not (own / "data").exists()

    # Killed when the checkpoint of the first epoch is there; the second run comes to the end of an undisturbed one.
    train_until_the_first_checkpoint(own, own / "run")
    out, err = script("train.py", *train_flags(own, own / "run"), cwd=own)
    assert "own/visible_to_infrared" in out and "own/infrared_to_visible" in out
    script("train.py", *train_flags(own, own / "whole"), cwd=own)
    (step, resumed), (_, whole) = load_model(own / "run"), load_model(own / "whole")
    for name in ("params", "batch_stats", "averages"):
        for (path, one), (_, other) in zip(_leaves(resumed[name]), _leaves(whole[name]), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{name}{path}")
    assert re.search(r"batches: \d+ of \d+ identities have fewer than K/2", err) or "batches:" not in err

    written = json.loads((own / "run/metrics.json").read_text())
    (own / "run/metrics.json").unlink()
    script("evaluate.py", f"--workdir={own}/run", cwd=own)
    assert json.loads((own / "run/metrics.json").read_text()) == written
    assert {values["step"] for values in written.values()} == {step}

    # From the CSV, one modality a file, whichever comes first: the same figures, and the names of the pids.
    for modality in ("visible", "infrared"):
        source = (f"--images={own}/raw/images.csv", "--split=test", f"--modality={modality}")
        script("extract.py", f"--workdir={own}/run", *source, f"--out={own}/{modality}.npz", cwd=own)
    for order in (("visible", "infrared"), ("infrared", "visible")):
        first, second = (own / f"{modality}.npz" for modality in order)
        files = ("--features", first, second, "--protocol=own", f"--out={own}/m.json")
        script("evaluate.py", *files, cwd=own)
        for name, values in json.loads((own / "m.json").read_text()).items():
            assert values["mAP"] == pytest.approx(written[name]["mAP"], abs=1e-4)
    embeddings = load_embeddings(own / "infrared.npz")
    with open(own / "raw/images.csv", encoding="utf-8", newline="") as file:
        listed = {row["path"]: row for row in csv.DictReader(file)}
    assert len(embeddings) == sum(r["split"] == "test" and r["modality"] == "infrared" for r in listed.values())
    assert embeddings.modality.tolist() == [1] * len(embeddings)
    assert [listed[path]["pid"] for path in embeddings.paths] == embeddings.pid_names.tolist()


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
