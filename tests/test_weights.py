"""Weights in and out: the name map, round trips to the bit, and files that must be refused."""

import os
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from mpanet_jax import weights  # noqa: E402
from mpanet_jax.checkpoint import Checkpoints, load_model  # noqa: E402
from mpanet_jax.errors import UserError  # noqa: E402
from mpanet_jax.models.mpanet import MPANet as FlaxMPANet  # noqa: E402
from mpanet_jax.optim import create_optimizer  # noqa: E402
from mpanet_jax.state import create_train_state, init_variables  # noqa: E402
from tests.reference.compare import numpy_state_dict  # noqa: E402
from tests.reference.model import MPANet, randomise  # noqa: E402
from tests.reference.resnet import ResNet  # noqa: E402

SIZE = {"stage_sizes": (1, 1, 1, 1), "width": 8}
CLASSIFIER_NAMES = [f"{kind}classifier{mean}.weight" for kind in ("visible_", "infrared_") for mean in ("", "_")]
CLASSIFIER_NAMES = sorted(["classifier.weight", *CLASSIFIER_NAMES])


def network(seed=0, num_ids=5, **options):
    return randomise(MPANet(num_ids, **SIZE, **options), seed)


@pytest.fixture(scope="module")
def published():
    """A state dict as the published program saves it."""
    return numpy_state_dict(network())


@pytest.fixture(scope="module")
def torchvision():
    """A state dict with a ResNet's own names and its classifier."""
    torch.manual_seed(0)
    state_dict = numpy_state_dict(ResNet(**SIZE))
    for name, array in state_dict.items():
        if "running" in name or "bn" in name:
            array += np.random.default_rng(0).random(array.shape).astype(array.dtype)
    return state_dict | {"fc.weight": np.ones((10, 256), np.float32), "fc.bias": np.ones(10, np.float32)}


def template(num_ids=5, **options):
    model = FlaxMPANet(num_ids, **SIZE, **options)
    return jax.eval_shape(lambda key: init_variables(model, key, 32, 32), jax.random.key(0))


def same(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


def without_counters(state_dict):
    return {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}


# The name map


def test_arrays_land_where_they_belong(published):
    variables, left_out = weights.to_flax(published, template())
    params, statistics = variables["params"], variables["batch_stats"]
    stem = params["stem"]["conv1"]["kernel"]  # height, width, in, out
    assert stem.shape == (7, 7, 3, 8)
    assert stem[1, 2, 0, 5] == published["backbone.conv1.weight"][5, 0, 1, 2]
    projection = params["stage2"]["block0"]["downsample_conv"]["kernel"]
    assert projection[0, 0, 3, 4] == published["backbone.layer2.0.downsample.0.weight"][4, 3, 0, 0]
    squeeze = params["mam4"]["mask"]["w1"]  # 256 → 16
    assert squeeze[100, 3] == published["backbone.MAM4.channel_attention.0.weight"][3, 100, 0, 0]
    assert params["pam"]["kernel"][7, 2] == published["spatial_attention.weight"][2, 7, 0, 0]
    assert params["infrared_classifier"][9, 1] == published["infrared_classifier.weight"][1, 9]
    assert variables["mean_classifiers"]["infrared_classifier"][9, 1] == published["infrared_classifier_.weight"][1, 9]
    variance = statistics["stage3"]["block0"]["downsample_bn"]["var"]
    np.testing.assert_array_equal(variance, published["backbone.layer3.0.downsample.1.running_var"])
    np.testing.assert_array_equal(statistics["neck"]["mean"], published["bn_neck.running_mean"])
    assert all(name.endswith("num_batches_tracked") for name in left_out)


@pytest.mark.parametrize(
    "options",
    [{}, {"mam": "none", "pam": "none"}, {"mam": "cbam", "pam": "none"}, {"mam": "in", "pam": "non_local"}],
    ids=["MPANet", "baseline", "CBAM", "IN and non-local"],
)
def test_round_trips_are_bit_exact(options):
    source = network(**options)
    state_dict = numpy_state_dict(source)
    kinds = {"channel_module": options.get("mam", "mam"), "pattern_module": options.get("pam", "pam")}
    variables, _ = weights.to_flax(state_dict, template(**kinds))
    back = weights.from_flax(variables)
    assert same(back, without_counters(state_dict))
    again, left_out = weights.to_flax(back, template(**kinds))
    assert same(again, variables)
    assert not left_out
    twin = MPANet(5, **SIZE, **options)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()}, strict=True)
    assert same(without_counters(numpy_state_dict(twin)), without_counters(state_dict))


def test_every_misfit_is_named(published):
    state_dict = dict(published, **{"backbone.layer5.0.conv1.weight": np.zeros(3, np.float32)})
    del state_dict["spatial_attention.bias"], state_dict["backbone.layer4.0.bn2.running_var"]
    state_dict["backbone.conv1.weight"] = state_dict["backbone.conv1.weight"][:, :1]
    state_dict["bn_neck.weight"] = state_dict["bn_neck.weight"].astype(np.int64)
    with pytest.raises(UserError) as error:
        weights.to_flax(state_dict, template(), source="x.pth")
    message = str(error.value)
    assert message.startswith("x.pth: ")
    assert "missing: backbone.layer4.0.bn2.running_var, spatial_attention.bias" in message
    assert "not part of the model: backbone.layer5.0.conv1.weight" in message
    assert "backbone.conv1.weight is float32[8, 1, 7, 7], expected [8, 3, 7, 7]" in message
    assert "bn_neck.weight is int64" in message


@pytest.mark.parametrize(("dtype", "value"), [(np.float32, np.nan), (np.float16, np.inf)])
def test_values_that_are_not_finite_are_named(published, dtype, value):
    kernel = published["backbone.layer2.0.conv1.weight"].astype(dtype)
    kernel[1, 0] = value
    with pytest.raises(UserError, match=r"x\.pth: NaN or infinity in backbone\.layer2\.0\.conv1\.weight;"):
        weights.to_flax(dict(published, **{"backbone.layer2.0.conv1.weight": kernel}), template(), source="x.pth")


def test_a_trained_neck_bias_is_refused(published):
    state_dict = dict(published, **{"bn_neck.bias": published["bn_neck.bias"] + 1e-3})
    with pytest.raises(UserError, match=r"not part of the model: bn_neck\.bias"):
        weights.to_flax(state_dict, template())


def test_classifiers_of_other_identities_are_left_out_on_request_only(published):
    with pytest.raises(UserError, match="--drop-classifiers") as error:
        weights.to_flax(published, template(num_ids=7))
    assert "infrared_classifier_.weight is float32[5, 1792], expected [7, 1792]" in str(error.value)
    variables, left_out = weights.to_flax(published, template(num_ids=7), drop_classifiers=True)
    assert [name for name in left_out if "num_batches" not in name] == CLASSIFIER_NAMES
    assert not any("classifier" in name for name in variables["params"])
    model, complete = weights.embedding_network(variables)
    images = jnp.ones((1, 32, 32, 3))
    expected = network().eval()(torch.ones(1, 3, 32, 32)).embedding
    embedding = model.apply(jax.tree.map(jnp.asarray, complete), images, train=False).embedding
    np.testing.assert_allclose(embedding, expected.detach(), rtol=1e-3, atol=1e-4)


def test_half_precision_is_widened(published):
    half = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in published.items()}
    variables, _ = weights.to_flax(half, template())
    np.testing.assert_array_equal(variables["params"]["classifier"].T, half["classifier.weight"].astype(np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


# Files


def save_torch(path, content, zip_format=True):
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    return path


def tensors(state_dict):
    return {name: torch.tensor(array) for name, array in state_dict.items()}


def test_all_formats_read_alike(published, tmp_path):
    prefixed = {f"module.{name}": tensor for name, tensor in tensors(published).items()}
    files = [
        save_torch(tmp_path / "zip.pth", tensors(published)),
        save_torch(tmp_path / "old.pth", tensors(published), zip_format=False),
        save_torch(tmp_path / "wrapped.pt", {"epoch": 3, "state_dict": prefixed}),
        save_torch(tmp_path / "model.bin", {"model": network().state_dict()}),
    ]
    save_file(published, tmp_path / "plain.safetensors")
    for file in [*files, tmp_path / "plain.safetensors"]:
        assert same(weights.read_state_dict(file), published), file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_written_reads_back(published, tmp_path, suffix):
    transposed = published | {"classifier.weight": np.asfortranarray(published["classifier.weight"])}
    weights.write_state_dict(tmp_path / f"new/out{suffix}", transposed)
    if suffix == ".pth":
        loaded = torch.load(tmp_path / "new/out.pth", weights_only=True)
        loaded = {name: tensor.numpy() for name, tensor in loaded.items()}
    else:
        loaded = load_file(tmp_path / "new/out.safetensors")
    assert same(loaded, published)
    assert [file.name for file in (tmp_path / "new").iterdir()] == [f"out{suffix}"]


def test_without_torch(published, tmp_path, monkeypatch):
    save_torch(tmp_path / "a.pth", tensors(published))
    save_file(published, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert same(weights.read_state_dict(tmp_path / "a.safetensors"), published)
    with pytest.raises(UserError, match=r"a\.pth: .*pip install 'mpanet_jax\[torch\]'"):
        weights.read_state_dict(tmp_path / "a.pth")
    with pytest.raises(UserError, match="files need torch"):
        weights.write_state_dict(tmp_path / "b.pth", published)
    assert not (tmp_path / "b.pth").exists()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    path = save_torch(tmp_path / "bad.pth", {"state_dict": {"conv1.weight": torch.ones(1)}, "x": Harmful()}, zip_format)
    with pytest.raises(UserError, match=r"bad\.pth: refused, its pickle holds code \((posix|nt|os)\.system\)"):
        weights.read_state_dict(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".old.pth"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_refused(published, tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(published, path)
    else:
        save_torch(path, tensors(published), zip_format=suffix == ".pth")
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "foreign": b"<html>404</html>\n" * 9, "empty": b""}[damage]
    )
    with pytest.raises(UserError, match=rf"weights{suffix}: truncated, or not a") as error:
        weights.read_state_dict(path)
    assert "\n" not in str(error.value)


def test_other_contents_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such weights file"):
        weights.read_state_dict(tmp_path / "none.pth")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unknown weights format.*\.safetensors"):
        weights.read_state_dict(tmp_path / "weights.h5")
    with pytest.raises(UserError, match="expected a state dict"):
        weights.read_state_dict(save_torch(tmp_path / "list.pth", [torch.ones(1)]))
    with pytest.raises(UserError, match="no tensors: epoch, optimizer"):
        weights.read_state_dict(save_torch(tmp_path / "other.pth", {"epoch": 1, "optimizer": {"lr": 1}}))


def resnet18_names():
    state_dict = {"conv1.weight": np.zeros((8, 3, 7, 7), np.float32)}
    for stage in range(1, 5):
        for block in range(2):
            for layer in (1, 2):
                state_dict[f"layer{stage}.{block}.conv{layer}.weight"] = np.zeros((8, 8, 3, 3), np.float32)
    return state_dict


def test_other_architectures_are_named_as_such(torchvision):
    with pytest.raises(UserError, match=r"another architecture \(blocks without conv3") as error:
        weights.to_flax(resnet18_names(), template())
    assert "layer1.0.conv3.weight" in str(error.value)
    deeper = torchvision | {
        name.replace("layer3.0", "layer3.1"): array for name, array in torchvision.items() if "layer3.0" in name
    }
    with pytest.raises(UserError, match=r"stages of \(1, 1, 2, 1\) blocks, expected \(1, 1, 1, 1\)"):
        weights.to_flax(deeper, template())
    with pytest.raises(UserError, match="no ResNet in it"):
        weights.to_flax({"encoder.weight": np.zeros(3, np.float32)}, template())


# Pretrained backbones


def random_variables():
    model = FlaxMPANet(5, **SIZE)
    return init_variables(model, jax.random.key(1), 32, 32)


def test_load_backbone_takes_the_resnet_and_nothing_else(torchvision, published, tmp_path):
    save_file(torchvision, tmp_path / "resnet.safetensors")
    before = random_variables()
    params, statistics = weights.load_backbone(str(tmp_path / "resnet.safetensors"), **before)
    assert jax.tree.structure((params, statistics)) == jax.tree.structure((before["params"], before["batch_stats"]))
    kernel = params["stage4"]["block0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kernel, torchvision["layer4.0.conv2.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(statistics["stem"]["bn1"]["var"], torchvision["bn1.running_var"])
    for name in ("mam3", "mam4", "pam", "neck", "classifier"):
        assert same(params[name], before["params"][name])
    # The classifier of ImageNet is not asked for, whatever it is called there.
    save_torch(tmp_path / "mpanet.pth", tensors(published))
    params, _ = weights.load_backbone(str(tmp_path / "mpanet.pth"), **before)
    np.testing.assert_array_equal(params["stem"]["bn1"]["bias"], published["backbone.bn1.bias"])
    assert same(params["mam3"], before["params"]["mam3"])


def test_load_backbone_names_the_config_field(torchvision, tmp_path):
    with pytest.raises(UserError, match=r"config\.init_from: .*none\.pth: no such"):
        weights.load_backbone(str(tmp_path / "none.pth"), **random_variables())
    save_file({name: a for name, a in torchvision.items() if name != "bn1.bias"}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"config\.init_from=.*missing: bn1\.bias"):
        weights.load_backbone(str(tmp_path / "short.safetensors"), **random_variables())


def hub_cache(root: Path, state_dict) -> None:
    """Hugging Face's cache layout, with one file of one repository."""
    repository = root / "models--timm--resnet50.tv_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    save_file(state_dict, snapshot / "model.safetensors")


def test_hugging_face_repositories_come_from_the_cache(torchvision, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"config\.init_from.*hf download timm/resnet50\.tv_in1k model\.safetensors$"):
        weights.load_backbone("hf:timm/resnet50.tv_in1k", **random_variables())
    with pytest.raises(UserError, match=r"hf download no-owner model\.safetensors"):
        weights.resolve("hf:no-owner")
    hub_cache(tmp_path, torchvision)
    params, _ = weights.load_backbone("hf:timm/resnet50.tv_in1k", **random_variables())
    np.testing.assert_array_equal(params["stem"]["bn1"]["scale"], torchvision["bn1.weight"])


# Whole conversions


def test_published_checkpoint_to_orbax_and_back(published, tmp_path):
    source = save_torch(tmp_path / "published.pth", tensors(published), zip_format=False)
    weights.convert(source, tmp_path / "folder", **SIZE)
    _, model = load_model(tmp_path / "folder")
    expected, _ = weights.to_flax(published, template())
    assert same(jax.tree.map(np.asarray, dict(model)), expected)
    weights.convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), without_counters(published))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back.safetensors", "folder", "published.pth"]
    with pytest.raises(UserError, match="exists already"):
        weights.convert(source, tmp_path / "folder", **SIZE)
    with pytest.raises(UserError, match=r"--drop-classifiers.*expected \[7, 1792\]"):
        weights.convert(tmp_path / "folder", tmp_path / "seven.pth", num_ids=7)
    left_out = weights.convert(tmp_path / "folder", tmp_path / "none.pth", num_ids=7, drop_classifiers=True)
    assert left_out == CLASSIFIER_NAMES
    assert not set(CLASSIFIER_NAMES) & weights.read_state_dict(tmp_path / "none.pth").keys()


def test_resnet_to_orbax_and_back(torchvision, tmp_path):
    save_file(torchvision, tmp_path / "timm.safetensors")
    left_out = weights.convert(tmp_path / "timm.safetensors", tmp_path / "folder", **SIZE)
    assert [name for name in left_out if "num_batches" not in name] == ["fc.bias", "fc.weight"]
    weights.convert(tmp_path / "folder", tmp_path / "back.pth")
    expected = {name: array for name, array in torchvision.items() if not name.startswith("fc.")}
    assert same(weights.read_state_dict(tmp_path / "back.pth"), without_counters(expected))
    variables, _ = weights.read_weights(tmp_path / "folder")
    with pytest.raises(UserError, match="bare ResNet"):
        weights.embedding_network(variables)


def test_a_training_run_becomes_a_published_checkpoint(tmp_path):
    """The mean classifiers differ from the classifiers, as after training, and go by their own names."""
    variables = random_variables()
    optimizer = create_optimizer(1e-3, 5e-4)
    state = create_train_state(variables["params"], variables["batch_stats"], optimizer, jax.random.key(0))
    state = state.replace(mean_classifiers=jax.tree.map(lambda leaf: leaf + 1, state.mean_classifiers))
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(3, state, iter(grain.MapDataset.range(4).to_iter_dataset()))
    weights.convert(tmp_path / "run", tmp_path / "out.pth")
    twin = MPANet(5, **SIZE)
    twin.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    params = state.params
    np.testing.assert_array_equal(twin.visible_classifier.weight.detach(), params["visible_classifier"].T)
    np.testing.assert_array_equal(twin.visible_classifier_.weight.detach(), params["visible_classifier"].T + 1)
    squeeze = twin.backbone.MAM3.channel_attention[0].weight.detach().numpy()
    np.testing.assert_array_equal(squeeze[:, :, 0, 0].T, params["mam3"]["mask"]["w1"])
    np.testing.assert_array_equal(
        twin.backbone.layer2[0].downsample[0].weight.detach().permute(2, 3, 1, 0),
        params["stage2"]["block0"]["downsample_conv"]["kernel"],
    )


def run_script(*arguments):
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, root / "scripts/convert_weights.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    )


def test_script(published, tmp_path):
    save_file(published, tmp_path / "a.safetensors")
    size = ["--stage_sizes=1,1,1,1", "--width=8"]
    done = run_script(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--drop-classifiers", *size)
    assert done.returncode == 0, done.stderr
    assert f"left out: {', '.join(CLASSIFIER_NAMES)}" in done.stdout
    assert set(load_file(tmp_path / "b.safetensors")) == set(without_counters(published)) - set(CLASSIFIER_NAMES)
    failed = run_script(tmp_path / "a.safetensors", tmp_path / "c.safetensors")  # not a ResNet-50
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert "stages of (1, 1, 1, 1) blocks, expected (3, 4, 6, 3)" in failed.stderr
    assert not (tmp_path / "c.safetensors").exists()
