"""StableHLO files against the network that they are made of, read where this package is not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.export import stablehlo
from mpanet_jax.export.stablehlo import export_stablehlo
from tests.trained import HEIGHT, WIDTH, person, trained_model

pytestmark = pytest.mark.xdist_group("trained")

# As docs/export.md reads a file, in a process in which importing this package fails.
WITHOUT_PACKAGE = """
import json, sys
sys.modules["mpanet_jax"] = sys.modules["flax"] = None
import jax
import numpy as np
header, _, encoded = open(sys.argv[1], "rb").read().partition(b"\\n")
about, network = json.loads(header), jax.export.deserialize(bytearray(encoded))
pixels = np.load(sys.argv[2])
assert pixels.shape[1:3] == (int(about["height"]), int(about["width"]))
np.save(sys.argv[3], np.asarray(network.call(pixels)))
"""


def test_trained_network_in_a_fresh_process(tmp_path):
    people = np.stack([person(10 + i, i, i % 2) for i in range(5)])
    path = tmp_path / "model.stablehlo"
    export_stablehlo(trained_model(), path)
    np.save(tmp_path / "people.npy", people)
    arguments = [path, tmp_path / "people.npy", tmp_path / "found.npy"]
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    found, expected = np.load(tmp_path / "found.npy"), trained_model().embed(list(people))
    assert np.max(np.linalg.norm(found - expected, axis=1)) <= 1e-4
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
