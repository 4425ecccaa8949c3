"""StableHLO files against the network that they are made of, read where this package is not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.export import stablehlo
from mpanet_jax.export.stablehlo import export_stablehlo
from tests.pages import ROOT
from tests.trained import HEIGHT, WIDTH, person, trained_model

pytestmark = pytest.mark.xdist_group("trained")

# The code of docs/export.md, in a process in which importing this package fails.
WITHOUT_PACKAGE = """
import sys
sys.modules["mpanet_jax"] = sys.modules["flax"] = None
import numpy as np
from tests.pages import run_code
np.save("found.npy", run_code("docs/export.md", 1)["embeddings"])
"""


def test_trained_network_in_a_fresh_process(tmp_path):
    path = tmp_path / "model.stablehlo"
    export_stablehlo(trained_model(), path)
    Image.fromarray(person(30, 0, 1, (50, 120))).save(tmp_path / "person.jpg")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], check=True, cwd=tmp_path, env=environment)
    found, expected = np.load(tmp_path / "found.npy"), trained_model().embed([tmp_path / "person.jpg"])
    assert np.linalg.norm(found - expected) <= 1e-4
    about = json.loads(path.read_bytes().partition(b"\n")[0])
    assert (about["height"], about["width"], about["resize"]) == (str(HEIGHT), str(WIDTH), "bilinear")
    assert about["fingerprint"] == trained_model().fingerprint and about["platforms"] == ["cpu", "cuda", "tpu"]


def test_wrong_pixels_are_not_written(tmp_path, monkeypatch):
    right = stablehlo.embedding_function

    def wrong(model, **options):
        function, has_modality = right(model, **options)
        return lambda images: function(images[..., ::-1]), has_modality

    monkeypatch.setattr(stablehlo, "embedding_function", wrong)
    with pytest.raises(UserError, match=r"model\.stablehlo"):
        export_stablehlo(trained_model(), tmp_path / "model.stablehlo", batch=3)
    with pytest.raises(ArgumentError, match="platforms"):
        export_stablehlo(trained_model(), tmp_path / "model.stablehlo", platforms=("cuda",))
    assert not list(tmp_path.iterdir())
