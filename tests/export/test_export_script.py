"""export.py as it is called."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mpanet_jax.model import load
from tests.trained import person, save_trained, trained_model

pytestmark = pytest.mark.xdist_group("trained")
ROOT = Path(__file__).resolve().parents[2]


def run_export(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "export.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_writes_onnx_and_published_names(tmp_path):
    model, people = save_trained(tmp_path / "model.safetensors"), np.stack([person(20, 0, 0), person(21, 0, 1)])
    done = run_export(f"--model={model}", f"--out={tmp_path / 'model.onnx'}", "--batch=2")
    assert done.returncode == 0, done.stderr
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": people})
    np.testing.assert_allclose(found, trained_model().embed(list(people)), atol=1e-5)
    done = run_export(f"--model={model}", f"--out={tmp_path / 'model.pth'}")
    assert done.returncode == 0, done.stderr
    loaded = load(tmp_path / "model.pth", settings=trained_model().settings)
    assert loaded.fingerprint == trained_model().fingerprint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out=model.pt2"], "--out=model.pt2"),
        (["--out=model"], "--out=model"),
        (["--out=model.onnx", "--batch=some"], "--batch=some"),
        (["--out=model.pth", "--batch=3"], "--batch"),
        (["--out=model.onnx", "--modality=thermal"], "--modality"),
    ],
)
def test_names_bad_input(arguments, named):
    done = run_export("--model=nowhere", *arguments)
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1
