"""ONNX files against the network that they are made of, by ONNX Runtime, here and where there is no JAX."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from mpanet_jax.data import augment
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.export import onnx_file
from mpanet_jax.export.equations import equations_of
from mpanet_jax.export.onnx_file import export_onnx, onnx_bytes
from mpanet_jax.methods import make_method, settings_of
from mpanet_jax.methods.method import l2_normalize
from mpanet_jax.model import Model
from mpanet_jax.settings_base import replace
from mpanet_jax.weights.convert import template_of
from tests.pages import run_code
from tests.trained import HEIGHT, WIDTH, person, trained_model

pytestmark = pytest.mark.xdist_group("trained")

# Runs a file in a process in which importing JAX, or this package, fails.
WITHOUT_JAX = """
import sys
for name in ("jax", "jaxlib", "flax", "mpanet_jax"):
    sys.modules[name] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
np.save(sys.argv[3], session.run(None, {"images": np.load(sys.argv[2])})[0])
"""


def run(path, images, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"images": images, **inputs})
    return embeddings


def relative_error(found, expected):
    return np.max(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1))


@pytest.fixture(scope="module")
def people():
    """Pictures that the network was not trained on."""
    return np.stack([person(10 + i, i, i % 2) for i in range(5)])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(trained_model(), path)
    return path


def test_trained_network_in_a_process_without_jax(exported, people, tmp_path):
    np.save(tmp_path / "people.npy", people)
    arguments = [exported, tmp_path / "people.npy", tmp_path / "found.npy"]
    subprocess.run([sys.executable, "-c", WITHOUT_JAX, *map(str, arguments)], check=True, cwd=tmp_path)
    expected = trained_model().embed(list(people))
    found = np.load(tmp_path / "found.npy")
    assert found.shape == expected.shape and found.dtype == np.float32
    assert relative_error(found, expected) <= 1e-4
    # The pictures are told apart: rows that were all alike would pass with any picture.
    others = expected @ expected.T
    assert others[~np.eye(len(people), dtype=bool)].max() < 0.9


def test_page_s_code_embeds_a_picture(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(exported.read_bytes())
    Image.fromarray(person(30, 0, 0, (50, 120))).save("person.jpg")
    found = run_code("docs/export.md", 0)["embeddings"]
    assert relative_error(found, trained_model().embed(["person.jpg"])) <= 1e-4


def test_file_says_what_it_needs(exported):
    file = onnx.load(exported)
    props = {prop.key.removeprefix("mpanet_jax."): prop.value for prop in file.metadata_props}
    assert (props["height"], props["width"], props["resize"]) == (str(HEIGHT), str(WIDTH), "bilinear")
    assert props["fingerprint"] == trained_model().fingerprint
    kinds = [node.op_type for node in file.graph.node]
    assert "BatchNormalization" not in kinds
    # 12 convolutions with a batch norm each (stem, 8 in the blocks, 3 of shortcuts), into which those are folded:
    # factors and summands are left of the input's normalisation, the neck and the modules only.
    convolutions = [node for node in file.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 12 and all(len(node.input) == 3 for node in convolutions)


@pytest.mark.parametrize("fault", ["order of channels", "deviation of one channel", "mean of another order"])
def test_wrong_normalisation_is_not_written(fault, tmp_path, monkeypatch):
    right = onnx_file.onnx_bytes

    def wrong(function, *arguments):
        with monkeypatch.context() as patch:
            if fault == "order of channels":
                return right(lambda images: function(jnp.flip(images, 3)), *arguments)
            name, values = {"d": ("STD", (0.229, 0.224, 0.229)), "m": ("MEAN", (0.406, 0.456, 0.485))}[fault[0]]
            patch.setattr(augment, f"IMAGENET_{name}", values)
            return right(function, *arguments)

    monkeypatch.setattr(onnx_file, "onnx_bytes", wrong)
    with pytest.raises(UserError, match=r"model\.onnx"):
        export_onnx(trained_model(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def random_model(**fields):
    """A network of one block a stage, in which no batch norm is the identity."""
    size = {"model.backbone": "resnet50", "model.stage_sizes": (1, 1, 1, 1), "model.width": 8, "model.fused": "off"}
    size |= {"data.height": HEIGHT, "data.width": WIDTH, "dtype": "float32"}
    settings = replace(settings_of({"method": fields.pop("method", "mpanet")}), {**size, **fields})
    generator = np.random.default_rng(0)

    def drawn(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "var") else 0.0
        if len(leaf.shape) > 1:
            return generator.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        return (centre + generator.uniform(-0.3, 0.3, leaf.shape)).astype(np.float32)

    template = template_of(make_method(settings), 1)
    return Model(settings, jax.tree_util.tree_map_with_path(drawn, template), "random")


@pytest.mark.parametrize(
    "fields",
    [
        {"model.channel_module": "mam", "model.pattern_module": "pam", "eval.flip": True},
        {"model.channel_module": "se", "model.pattern_module": "non_local"},
        {"model.channel_module": "in", "model.pattern_module": "none", "model.backbone": "resnet34"},
        {"model.channel_module": "cbam", "model.pattern_module": "none"},
        {"method": "caj"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_network_agrees(fields, tmp_path, people, monkeypatch):
    model = random_model(**fields)
    monkeypatch.setattr(onnx_file, "check_file", lambda *_, **__: None)  # it would compile the network once more
    export_onnx(model, tmp_path / "model.onnx", normalize=False)
    numbers = np.arange(len(people), dtype=np.int32) % 2
    inputs = {"modality": numbers} if model.method.needs_modality else {}
    expected = model.embed(list(people), modality=numbers, normalize=False)
    assert relative_error(run(tmp_path / "model.onnx", people, **inputs), expected) <= 1e-4


def test_one_modality_of_agw_needs_no_second_input(tmp_path, people):
    model = random_model(method="agw")
    export_onnx(model, tmp_path / "infrared.onnx", modality="infrared", batch=len(people))
    expected = model.embed(list(people), modality="infrared")
    assert relative_error(run(tmp_path / "infrared.onnx", people), expected) <= 1e-4
    assert relative_error(expected, model.embed(list(people), modality="visible")) > 1e-2
    stems = [node for node in onnx.load(tmp_path / "infrared.onnx").graph.node if node.op_type == "MaxPool"]
    assert len(stems) == 1


def test_fixed_batch_and_bad_arguments(tmp_path, people):
    export_onnx(trained_model(), tmp_path / "four.onnx", batch=4)
    assert run(tmp_path / "four.onnx", people[:4]).shape == (4, trained_model().size)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(tmp_path / "four.onnx", people)
    for batch in (0, "many", True):
        with pytest.raises(ArgumentError, match="batch"):
            export_onnx(trained_model(), tmp_path / "bad.onnx", batch=batch)
    with pytest.raises(ArgumentError, match="modality"):
        export_onnx(trained_model(), tmp_path / "bad.onnx", modality="thermal")
    assert [path.name for path in tmp_path.iterdir()] == ["four.onnx"]


def of_layers(images):
    """Primitives that the networks of this package do not have, or not so; of uint8[b, 8, 6, 3]."""
    x = jax.nn.tanh(images.astype(jnp.float32) / 100 - 1)
    average = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    half = jnp.where(average > 0.1, average, jnp.exp(average) - 1)[:, 1:]
    half = jax.lax.slice_in_dim(half, 0, 3, 2, 2)
    parts = jnp.concatenate([half, jnp.abs(half), jnp.clip(half, -0.2, 0.3)], -1)
    rows = jnp.stack([parts.max((1, 2)), parts[:, 1, 0] + parts.min((1, 2)), jax.lax.erf(parts).sum((1, 2))], 1)
    mixed = jnp.einsum("bkc,dc->bkd", rows, jnp.arange(36.0).reshape(4, 9) / 36) - rows[:, :, :4] ** 2
    return l2_normalize(jnp.einsum("bkd,bjd->bkj", mixed, rows[..., :4]).transpose(0, 2, 1).reshape(-1, 9))


def test_layers_of_other_methods(tmp_path):
    batch = jax.export.symbolic_shape("batch")[0]
    shape = jax.ShapeDtypeStruct((batch, 8, 6, 3), jnp.uint8)
    (tmp_path / "layers.onnx").write_bytes(onnx_bytes(of_layers, [shape], 9, {}))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    assert relative_error(run(tmp_path / "layers.onnx", images), np.asarray(of_layers(images))) < 1e-5


def test_a_factor_is_folded_where_nobody_else_reads_the_value(tmp_path):
    def function(images):
        doubled = images.astype(jnp.float32)[:, 0, 0] * 2
        return jax.lax.stop_gradient(doubled) * 3 + doubled

    shape = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.uint8)
    (tmp_path / "factors.onnx").write_bytes(onnx_bytes(function, [shape], 3, {}))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)
    np.testing.assert_allclose(run(tmp_path / "factors.onnx", images), 8.0 * images[:, 0, 0])


def test_what_has_no_onnx_form_is_named():
    shape = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.uint8)
    with pytest.raises(UserError, match="sort"):
        onnx_bytes(lambda images: jnp.sort(images.astype(jnp.float32), 1), [shape], 3, {})


def test_equations_leave_out_what_nobody_reads():
    def function(x):
        _ = jnp.sin(x)
        return jax.jit(lambda y: (jax.nn.relu(y), jnp.cos(y))[0])(x) + 1

    names = [equation.primitive for equation in equations_of(function, np.ones(3, np.float32)).equations]
    assert names == ["max", "add"]
