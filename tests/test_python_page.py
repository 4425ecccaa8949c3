"""The snippets of docs/python.md run as they stand there, one after the other."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mpanet_jax
from mpanet_jax.datasets.regdb import RegdbSettings
from mpanet_jax.embeddings import Embeddings, save_embeddings
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.methods import make_method
from mpanet_jax.methods.agw import AGWSettings
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.model import Model
from mpanet_jax.weights.convert import convert, template_of
from tests.pages import snippets

PAGE = Path(__file__).parent.parent / "docs/python.md"
SMALL = {"model.stage_sizes": (1, 1, 1, 1), "model.width": 8, "data.height": 64, "data.width": 32, "dtype": "float32"}


def drawn(settings):
    generator, shapes = np.random.default_rng(0), template_of(make_method(settings), 1)
    arrays = jax.tree.map(lambda leaf: generator.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    return Model(settings, {**arrays, "batch_stats": jax.tree.map(np.abs, arrays["batch_stats"])}, "drawn")


def toy_embeddings(camera, modality):
    count = 4
    features = np.random.default_rng(camera).normal(size=(count, 8)).astype(np.float32)
    paths = np.array([f"{camera}/{place}.jpg" for place in range(count)])
    return Embeddings(features, np.arange(count), np.full(count, camera), paths, np.full(count, modality))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the snippets leave behind, run in a folder with the files that they name; and what `train` was told."""
    folder, generator, trained = tmp_path_factory.mktemp("page"), np.random.default_rng(0), []
    for name, settings in (("sysu", MPANetSettings()), ("agw", AGWSettings())):
        drawn(settings.replace(SMALL)).save(folder / f"saved_{name}")
        # A run's folder would be written by training, which is for other tests.
        model_file = folder / f"saved_{name}/model.safetensors"
        convert(model_file, folder / f"runs/{name}", drop_classifiers=True)
    for name in ("day", "night"):
        Image.fromarray(generator.integers(0, 256, (100, 40, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
    for name, camera, modality in (("visible", 1, 0), ("infrared", 2, 1)):
        save_embeddings(folder / f"{name}.npz", toy_embeddings(camera, modality))

    def train(settings, workdir):
        trained.append((settings, workdir))
        return {"sysu/all/single": {"rank1": 70.0}}

    code = snippets("docs/python.md")
    assert len(code) == 10
    found = {"__name__": __name__}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(mpanet_jax, "train", train, raising=False)
        for snippet in code:
            exec(compile(snippet, str(PAGE), "exec"), found)
    return {**found, "trained": trained, "folder": folder}


def test_snippets_give_what_they_say(names):
    model, size = names["model"], names["model"].size
    assert names["similarity"].shape == (2, 2)
    assert names["raw"].shape == (5, size) and len(names["skipped"]) == 1
    image = names["skipped"][0]
    assert (image.position, image.name, image.reason) == (1, "missing.jpg", "No such file or directory")
    assert names["maps"].shape == (2, 6, 64 // 16, 32 // 16)
    assert (names["folder"] / "people/README.md").exists()
    assert model.settings.method == "mpanet" and names["agw"].settings.method == "agw"


def test_train_is_told_the_papers_recipe(names):
    ((settings, workdir),) = names["trained"]
    expected = MPANetSettings().replace({"dataset.source": "/data/SYSU-MM01", "seed": 1})
    assert (settings, workdir) == (expected, "runs/sysu_1")
    assert settings.init_from.startswith("hf:") and settings.train.num_epochs == 140
    assert names["settings"] == AGWSettings(dataset=RegdbSettings(trial=3))


def test_the_page_lists_all_public_names():
    table = PAGE.read_text().split("| name | |")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)", table, re.M))
    assert set(mpanet_jax.__all__) <= listed


# ---- mpanet_jax.evaluate ----


def test_files_and_embeddings_are_the_same(names):
    files = [names["folder"] / f"{name}.npz" for name in ("visible", "infrared")]
    sets = [toy_embeddings(1, 0), toy_embeddings(2, 1)]
    by_file = mpanet_jax.evaluate(files[0], str(files[1]), protocol="regdb")
    assert by_file == mpanet_jax.evaluate(*sets, protocol="regdb")
    # Against the definition: Rank-1 is how often the nearest has the query's identity.
    visible, infrared = (s.features / np.linalg.norm(s.features, axis=1, keepdims=True) for s in sets)
    rank1 = 100 * np.mean((visible @ infrared.T).argmax(1) == np.arange(4))
    assert by_file["regdb/visible_to_infrared"]["rank1"] == rank1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "sysu"}, r"^protocol = 'sysu': .*'sysu_mm01'"),
        ({"protocol": 5}, "^protocol = 5"),
        ({"protocol": "sysu_mm01"}, "^permutation missing"),
        ({"protocol": "regdb", "permutation": "x.mat"}, r"^permutation = x\.mat"),
        ({"protocol": "regdb", "metric": "l2"}, "^metric = 'l2'"),
        ({"protocol": "regdb", "cmc": "x"}, "^cmc = 'x'"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ArgumentError, match=message) as raised:
        mpanet_jax.evaluate(toy_embeddings(1, 0), toy_embeddings(2, 1), **options)
    assert "--" not in str(raised.value)
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        mpanet_jax.evaluate("none.npz", "none.npz", protocol="regdb")
