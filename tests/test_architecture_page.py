"""The snippets of docs/architecture.md run as they stand there, and what they add trains."""

import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import configs.synthetic
from mpanet_jax.datasets import DATASETS, open_evaluation, open_split
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.extract import make_trained_embed
from mpanet_jax.evaluation.workdir import evaluate_set
from mpanet_jax.methods import METHODS, make_method, settings_of
from mpanet_jax.models.resnet import BACKBONES
from mpanet_jax.settings_base import replace, to_dict
from mpanet_jax.step import train_step
from mpanet_jax.weights.convert import template_of
from mpanet_jax.weights.names import from_state_dict, to_state_dict
from tests.methods_in_tests import SMALL, start

PAGE = Path(__file__).parent.parent / "docs/architecture.md"
P, K, HEIGHT, WIDTH = 4, 4, 32, 16


@pytest.fixture(scope="module", autouse=True)
def snippets_run():
    """The names that all snippets define, run one after the other; what they register is forgotten afterwards."""
    before = dict(METHODS), dict(BACKBONES), dict(DATASETS)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(snippets) == 6
    names = {"__name__": __name__}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    yield names
    for registry, entries in zip((METHODS, BACKBONES, DATASETS), before, strict=True):
        registry.clear()
        registry.update(entries)


def train_one_step(settings):
    method = make_method(settings)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (P * K, HEIGHT, WIDTH, 3), np.uint8),
        "labels": np.repeat(np.arange(P), K).astype(np.int32),
        "modality": np.tile([0, 0, 1, 1], P).astype(np.int32),
    }
    state = start(method, P, HEIGHT, WIDTH)
    options = {"method": method, "network": method.build(P), "steps_per_epoch": 10}
    after, metrics = jax.jit(partial(train_step, **options))(state, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert any(jax.tree.leaves(moved))
    return {name: float(value) for name, value in metrics.items()}


def test_added_loss_is_logged_and_weighted():
    # What is left compiles in half the time.
    fields = {"model.channel_module": "none", "model.pattern_module": "none", "data.images_per_id": K}
    fields |= {f"loss.{name}": 0.0 for name in ("center_cluster", "separation", "modality_identity", "mutual_mean")}
    fields |= {**SMALL, "model.backbone": "resnet18"}
    plain = train_one_step(replace(METHODS["mpanet"].settings(), fields))
    found = train_one_step(replace(METHODS["mpanet_norm"].settings(), {**fields, "norm_weight": 0.5}))
    assert found["loss"] == pytest.approx(plain["loss"] + 0.5 * found["norm"], rel=1e-5)
    assert found["norm"] > 0


def test_added_loss_has_a_config(snippets_run):
    config = snippets_run["get_config"]()
    assert settings_of(config.to_dict()).norm_weight == 0.2
    small = configs.synthetic.get_config()
    small.method = "mpanet_norm"
    small.norm_weight = 0.2
    settings = settings_of(small.to_dict())
    assert isinstance(settings, METHODS["mpanet_norm"].settings) and settings.norm_weight == 0.2


def test_added_method_trains():
    metrics = train_one_step(replace(METHODS["tiny"].settings(), {"data.images_per_id": K}))
    assert set(metrics) == {"identity", "loss", "accuracy", "learning_rate"}
    # A config file, and a run's config.json, give its settings back.
    settings = METHODS["tiny"].settings()
    assert settings_of(to_dict(settings)) == settings


def test_added_method_embeds_and_starts_from_other_identities():
    method = make_method(METHODS["tiny"].settings())
    trained = start(method, 5, HEIGHT, WIDTH)
    variables = {"params": trained.params, "batch_stats": trained.batch_stats}
    embed = make_trained_embed(method, variables, "run")
    assert embed(np.zeros((2, HEIGHT, WIDTH, 3), np.uint8), np.zeros(2, np.int32)).shape == (2, 64)
    state_dict = to_state_dict(variables, method.names())
    expected = template_of(method, 7)
    taken, left_out = from_state_dict(state_dict, expected, method.names(), drop_classifiers=True, source="run")
    assert left_out == ["classifier.bias", "classifier.weight"]
    assert flatten_dict(taken).keys() == {path for path in flatten_dict(variables) if path[1] != "classifier"}


def test_added_backbone_trains_and_its_weights_have_its_names():
    settings = replace(METHODS["mpanet"].settings(), {"model.backbone": "small", "data.images_per_id": K})
    assert np.isfinite(train_one_step(settings)["loss"])
    names = make_method(settings).names()
    assert names.name(("params", "stage2", "conv", "kernel")) == "backbone.layers.stage2.conv.weight"
    assert names.describe(["backbone.layers.stage1.conv.weight"]) == "the small backbone"
    resnet = {"layer1.0.conv1.weight": np.zeros((8, 8, 3, 3), np.float32)}
    with pytest.raises(UserError, match=r"x\.pth: .*: no backbone like the small backbone in it; missing: .*layers\."):
        from_state_dict(resnet, template_of(make_method(settings), 5), names, source="x.pth")


def test_added_data_set_is_prepared_and_tested_by_its_protocol(tmp_path):
    for pid in range(1, 6):
        (tmp_path / f"raw/{pid}").mkdir(parents=True)
        for name in ("v1.png", "v2.png", "i1.png"):
            Image.new("RGB", (8, 16), (40 * pid,) * 3).save(tmp_path / f"raw/{pid}/{name}")
    tree = {"name": "folders", "source": str(tmp_path / "raw"), "data_dir": str(tmp_path / "data")}
    settings = settings_of({"dataset": tree, "data": {"height": 16, "width": 8}})
    train, tested = open_split(settings.dataset, "train"), open_evaluation(settings.dataset)
    assert (train.num_ids, len(train), len(tested.split)) == (3, 9, 6)
    metrics = evaluate_set(settings, tested, lambda images, modality: images.reshape(len(images), -1).astype(float))
    assert metrics["folders/infrared_to_visible"]["num_gallery"] == 4
    assert metrics["folders/infrared_to_visible"]["protocol"] == "folders"


def test_every_file_and_folder_of_the_picture_is_there():
    root = PAGE.parent.parent
    picture = PAGE.read_text().split("    tests/")[0]
    for name in re.findall(r"^    (\w+)/ ", picture, re.M):
        assert (root / name).is_dir(), name
    for name in re.findall(r"^      (\w+(?:\.py|/)) ", picture, re.M):
        assert (root / "mpanet_jax" / name).exists(), name
    package = root / "mpanet_jax"
    there = {p.name for p in package.iterdir() if p.suffix == ".py" and not p.name.startswith("_")}
    assert there <= set(re.findall(r"\w+\.py", picture))
