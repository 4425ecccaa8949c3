"""export.py as it is called."""

import numpy as np
import onnxruntime
import pytest

from mpanet_jax.model import load
from tests.scripts_in_process import process
from tests.trained import person, save_trained, trained_model

pytestmark = pytest.mark.xdist_group("trained")


def run_export(*arguments):
    return process("export.py", *arguments)


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
