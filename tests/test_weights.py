"""Weights in and out: the name map, round trips to the bit, and files that must be refused."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")


from mpanet_jax.checkpoint import Checkpoints, load_model  # noqa: E402
from mpanet_jax.errors import UserError  # noqa: E402
from mpanet_jax.evaluation.extract import make_trained_embed  # noqa: E402
from mpanet_jax.methods import make_method  # noqa: E402
from mpanet_jax.methods.mpanet import MPANetSettings  # noqa: E402
from mpanet_jax.run_files import load_settings, save_settings  # noqa: E402
from mpanet_jax.run_setup import initial_state  # noqa: E402
from mpanet_jax.settings_base import replace, to_dict  # noqa: E402
from mpanet_jax.weights.convert import convert, read_weights, start_from, template_of  # noqa: E402
from mpanet_jax.weights.files import read_metadata, read_state_dict, write_state_dict  # noqa: E402
from mpanet_jax.weights.hub import resolve  # noqa: E402
from mpanet_jax.weights.names import from_state_dict, to_state_dict  # noqa: E402
from tests.methods_in_tests import drawn_variables  # noqa: E402
from tests.reference.model import MPANet, randomise  # noqa: E402
from tests.reference.resnet import ResNet  # noqa: E402
from tests.scripts_in_process import process  # noqa: E402

ROOT = Path(__file__).parent.parent
SIZE = {"stage_sizes": (1, 1, 1, 1), "width": 8}
CLASSIFIER_NAMES = [f"{kind}classifier{mean}.weight" for kind in ("visible_", "infrared_") for mean in ("", "_")]
CLASSIFIER_NAMES = sorted(["classifier.weight", *CLASSIFIER_NAMES])


def settings_of_size(**model):
    return replace(MPANetSettings(), {f"model.{name}": value for name, value in (SIZE | model).items()})


SMALL = settings_of_size()
SMALL_METHOD = make_method(SMALL)
NAMES = SMALL_METHOD.names()


def numpy_state_dict(network):
    return {name: value.detach().numpy().copy() for name, value in network.state_dict().items()}


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


def template(num_ids=5, **model):
    return template_of(make_method(settings_of_size(**model)), num_ids)


def to_flax(state_dict, template, **options):
    return from_state_dict(state_dict, template, NAMES, **options)


def same(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


IMAGES = np.random.default_rng(0).integers(0, 256, (2 * jax.local_device_count(), 32, 32, 3), dtype=np.uint8)


def pytorch_embedding(network):
    images = (IMAGES / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        return network.eval()(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)).embedding.numpy()


def without_counters(state_dict):
    return {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}


# The name map


def test_arrays_land_where_they_belong(published):
    variables, left_out = to_flax(published, template())
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
    assert variables["averages"]["infrared_classifier"][9, 1] == published["infrared_classifier_.weight"][1, 9]
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
    variables, _ = to_flax(state_dict, template(**kinds))
    back = to_state_dict(variables, NAMES)
    assert same(back, without_counters(state_dict))
    again, left_out = to_flax(back, template(**kinds))
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
        to_flax(state_dict, template(), source="x.pth")
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
        to_flax(dict(published, **{"backbone.layer2.0.conv1.weight": kernel}), template(), source="x.pth")


def test_a_trained_neck_bias_is_refused(published):
    state_dict = dict(published, **{"bn_neck.bias": published["bn_neck.bias"] + 1e-3})
    with pytest.raises(UserError, match=r"not part of the model: bn_neck\.bias"):
        to_flax(state_dict, template())


def test_classifiers_of_other_identities_are_left_out_on_request_only(published):
    with pytest.raises(UserError, match="drop_classifiers") as error:
        to_flax(published, template(num_ids=7))
    assert "infrared_classifier_.weight is float32[5, 1792], expected [7, 1792]" in str(error.value)
    variables, left_out = to_flax(published, template(num_ids=7), drop_classifiers=True)
    assert [name for name in left_out if "num_batches" not in name] == CLASSIFIER_NAMES
    assert not any("classifier" in name for name in variables["params"])
    embedding = make_trained_embed(SMALL_METHOD, variables, "x.pth")(IMAGES)
    np.testing.assert_allclose(embedding, pytorch_embedding(network()), rtol=1e-3, atol=1e-4)


def test_half_precision_is_widened(published):
    half = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in published.items()}
    variables, _ = to_flax(half, template())
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
        assert same(read_state_dict(file), published), file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_written_reads_back(published, tmp_path, suffix):
    transposed = published | {"classifier.weight": np.asfortranarray(published["classifier.weight"])}
    write_state_dict(tmp_path / f"new/out{suffix}", transposed)
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
    assert same(read_state_dict(tmp_path / "a.safetensors"), published)
    with pytest.raises(UserError, match=r"a\.pth: .*pip install torch, or"):
        read_state_dict(tmp_path / "a.pth")
    with pytest.raises(UserError, match="files need torch"):
        write_state_dict(tmp_path / "b.pth", published)
    assert not (tmp_path / "b.pth").exists()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    path = save_torch(tmp_path / "bad.pth", {"state_dict": {"conv1.weight": torch.ones(1)}, "x": Harmful()}, zip_format)
    with pytest.raises(UserError, match=r"bad\.pth: refused, its pickle holds code \((posix|nt|os)\.system\)"):
        read_state_dict(path)
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
        read_state_dict(path)
    assert "\n" not in str(error.value)


def test_other_contents_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such weights file"):
        read_state_dict(tmp_path / "none.pth")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unknown weights format.*\.safetensors"):
        read_state_dict(tmp_path / "weights.h5")
    with pytest.raises(UserError, match="expected a state dict"):
        read_state_dict(save_torch(tmp_path / "list.pth", [torch.ones(1)]))
    with pytest.raises(UserError, match="not tensors: epoch, optimizer"):
        read_state_dict(save_torch(tmp_path / "other.pth", {"epoch": 1, "optimizer": {"lr": 1}}))


def resnet18_names():
    state_dict = {"conv1.weight": np.zeros((8, 3, 7, 7), np.float32)}
    for stage in range(1, 5):
        for block in range(2):
            for layer in (1, 2):
                state_dict[f"layer{stage}.{block}.conv{layer}.weight"] = np.zeros((8, 8, 3, 3), np.float32)
    return state_dict


def test_other_architectures_are_named_as_such(torchvision):
    with pytest.raises(
        UserError, match=r"another backbone, resnet18 \(stages of \(2, 2, 2, 2\) basic blocks\)"
    ) as error:
        to_flax(resnet18_names(), template())
    assert re.search(
        r"; missing: (\S+, ){4}\S+ and \d+ more; not part of the model: (\S+, ){4}\S+ and \d+ more", str(error.value)
    )
    deeper = torchvision | {
        name.replace("layer3.0", "layer3.1"): array for name, array in torchvision.items() if "layer3.0" in name
    }
    with pytest.raises(UserError, match=r"stages of \(1, 1, 2, 1\) bottlenecks; expected stages of \(1, 1, 1, 1\)"):
        to_flax(deeper, template())
    with pytest.raises(UserError, match=r"no backbone like stages of \(1, 1, 1, 1\) bottlenecks in it"):
        to_flax({"encoder.weight": np.zeros(3, np.float32)}, template())


# Pretrained backbones


def random_variables():
    return drawn_variables(SMALL_METHOD.network(5), 32, 32)


@functools.cache
def zeros(settings):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template_of(make_method(settings), 5))


def start(source, method=SMALL_METHOD, variables=None):
    return start_from(str(source), method)(random_variables() if variables is None else variables)[0]


def test_a_backbone_is_taken_and_nothing_else(torchvision, tmp_path):
    save_file(torchvision, tmp_path / "resnet.safetensors")
    before = random_variables()
    after, line = start_from(str(tmp_path / "resnet.safetensors"), SMALL_METHOD)(before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    params, statistics = after["params"], after["batch_stats"]
    kernel = params["stage4"]["block0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kernel, torchvision["layer4.0.conv2.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(statistics["stem"]["bn1"]["var"], torchvision["bn1.running_var"])
    for name in ("mam3", "mam4", "pam", "neck", "classifier"):
        assert same(params[name], before["params"][name])
    # The classifier of ImageNet is not asked for.
    assert line == (
        f"init_from: {tmp_path}/resnet.safetensors: loaded the backbone; everything else starts from scratch; "
        "left out: fc.bias, fc.weight"
    )


def test_misfits_name_the_config_field(torchvision, tmp_path):
    with pytest.raises(UserError, match=r"init_from: .*none\.pth: no such"):
        start(tmp_path / "none.pth")
    save_file({name: a for name, a in torchvision.items() if name != "bn1.bias"}, tmp_path / "short.safetensors")
    with pytest.raises(
        UserError,
        match=r"init_from: .*short\.safetensors: .*missing: bn1\.bias; the settings method and model",
    ):
        start(tmp_path / "short.safetensors")


def test_a_deeper_network_does_not_start_a_shorter_one(published, tmp_path):
    deeper = {name.replace("layer3.0", "layer3.1"): array for name, array in published.items() if "layer3.0" in name}
    save_file(published | deeper, tmp_path / "deeper.safetensors")
    message = r"stages of \(1, 1, 2, 1\).*not part of the model: backbone\.layer3\.1\.bn1\.bias"
    with pytest.raises(UserError, match=message):
        start(tmp_path / "deeper.safetensors")


# Name, blocks of the stages, whether with three convolutions, arrays and parameters of torchvision's network with `fc`.
TORCHVISION = {
    "resnet18": ((2, 2, 2, 2), False, 122, 11_689_512),
    "resnet34": ((3, 4, 6, 3), False, 218, 21_797_672),
    "resnet50": ((3, 4, 6, 3), True, 320, 25_557_032),
    "resnet101": ((3, 4, 23, 3), True, 626, 44_549_160),
    "resnet152": ((3, 8, 36, 3), True, 932, 60_192_808),
}


def torchvision_shapes(name, width=64):
    """{name: shape} of torchvision's network, with `fc`."""
    sizes, bottleneck, *_ = TORCHVISION[name]
    shapes = {}

    def convolution(name, channels, out, size):
        shapes[f"{name}.weight"] = (out, channels, size, size)

    def norm(name, channels):
        for array in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{array}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    convolution("conv1", 3, width, 7)
    norm("bn1", width)
    channels = width
    for stage, blocks in enumerate(sizes, start=1):
        inner = width * 2 ** (stage - 1)
        kernels = [(inner, 1), (inner, 3), (4 * inner, 1)] if bottleneck else [(inner, 3), (inner, 3)]
        for block in range(blocks):
            before = channels
            for number, (out, size) in enumerate(kernels, start=1):
                convolution(f"layer{stage}.{block}.conv{number}", channels, out, size)
                norm(f"layer{stage}.{block}.bn{number}", out)
                channels = out
            if block == 0 and (bottleneck or stage > 1):
                convolution(f"layer{stage}.0.downsample.0", before, channels, 1)
                norm(f"layer{stage}.0.downsample.1", channels)
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_backbone_has_the_names_and_shapes_of_torchvision(name):
    shapes = torchvision_shapes(name)
    parameters = {n: s for n, s in shapes.items() if "running_" not in n and "num_batches" not in n}
    assert len(shapes) == TORCHVISION[name][2]
    assert sum(int(np.prod(shape)) for shape in parameters.values()) == TORCHVISION[name][3]
    method = make_method(replace(MPANetSettings(), {"model.backbone": name}))
    ours = template_of(method, 5)
    ours = {
        collection: {part: leaves for part, leaves in ours[collection].items() if part.startswith("st")}
        for collection in ("params", "batch_stats")
    }
    ours = to_state_dict(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), ours), method.names())
    expected = {n: s for n, s in shapes.items() if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    assert {n: array.shape for n, array in ours.items()} == expected


def random_resnet(name):
    """A state dict of torchvision's network, 8 channels wide."""
    generator = np.random.default_rng(0)
    return {
        n: np.array(3) if n.endswith("num_batches_tracked") else generator.random(shape).astype(np.float32)
        for n, shape in torchvision_shapes(name, width=8).items()
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101"])
def test_other_backbones_round_trip_and_are_refused_for_another(name, tmp_path):
    resnet, path = random_resnet(name), str(tmp_path / "resnet.safetensors")
    save_file(resnet, path)
    settings = settings_of_size(backbone=name, stage_sizes=())
    method = make_method(settings)
    variables = start(path, method, zeros(settings))
    kernel = variables["params"]["stage3"]["block1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kernel, resnet["layer3.1.conv2.weight"].transpose(2, 3, 1, 0))
    expected = {n: array for n, array in without_counters(resnet).items() if not n.startswith("fc.")}
    # As the backbone of a whole network, alone, and alone again by way of a file and of a folder.
    whole = to_state_dict(variables, method.names())
    assert same({n: a for n, a in whole.items() if n.removeprefix("backbone.") in expected}, prefixed(expected))
    left_out = convert(path, tmp_path / "folder", settings=settings)
    assert [n for n in left_out if "num_batches" not in n] == ["fc.bias", "fc.weight"]
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), expected)
    assert load_settings(tmp_path / "folder") == settings

    for other in {"resnet18", "resnet34", "resnet50", "resnet101"} - {name}:
        other_settings = settings_of_size(backbone=other, stage_sizes=())
        message = rf"another backbone, {name} \(.*; expected {other} \(.*(missing|not part of the model): layer\d\."
        with pytest.raises(UserError, match=message):
            start(path, make_method(other_settings), zeros(other_settings))
        with pytest.raises(UserError, match=rf"model\.backbone is '{name}' there and '{other}' here"):
            convert(tmp_path / "back.safetensors", tmp_path / "other", settings=other_settings)
    assert not (tmp_path / "other").exists()


def prefixed(state_dict):
    return {f"backbone.{name}": array for name, array in state_dict.items()}


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
    with pytest.raises(UserError, match=r"init_from.*hf download timm/resnet50\.tv_in1k model\.safetensors$"):
        start("hf:timm/resnet50.tv_in1k")
    with pytest.raises(UserError, match=r"hf download no-owner model\.safetensors"):
        resolve("hf:no-owner")
    hub_cache(tmp_path, torchvision)
    params = start("hf:timm/resnet50.tv_in1k")["params"]
    np.testing.assert_array_equal(params["stem"]["bn1"]["scale"], torchvision["bn1.weight"])


# Whole conversions


def test_published_checkpoint_to_orbax_and_back(published, tmp_path):
    source = save_torch(tmp_path / "published.pth", tensors(published), zip_format=False)
    convert(source, tmp_path / "folder", settings=SMALL)
    _, model = load_model(tmp_path / "folder")
    expected, _ = to_flax(published, template())
    assert same(jax.tree.map(np.asarray, dict(model)), expected)
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), without_counters(published))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back.safetensors", "folder", "published.pth"]
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "folder", settings=SMALL)
    with pytest.raises(UserError, match=r"drop_classifiers.*expected \[7, 1792\]"):
        convert(tmp_path / "folder", tmp_path / "seven.pth", num_ids=7)
    left_out = convert(tmp_path / "folder", tmp_path / "none.pth", num_ids=7, drop_classifiers=True)
    assert left_out == CLASSIFIER_NAMES
    assert not set(CLASSIFIER_NAMES) & read_state_dict(tmp_path / "none.pth").keys()


def test_resnet_to_orbax_and_back(torchvision, tmp_path):
    save_file(torchvision, tmp_path / "timm.safetensors")
    left_out = convert(tmp_path / "timm.safetensors", tmp_path / "folder", settings=SMALL)
    assert [name for name in left_out if "num_batches" not in name] == ["fc.bias", "fc.weight"]
    convert(tmp_path / "folder", tmp_path / "back.pth")
    expected = {name: array for name, array in torchvision.items() if not name.startswith("fc.")}
    assert same(read_state_dict(tmp_path / "back.pth"), without_counters(expected))
    settings, variables, _ = read_weights(tmp_path / "folder")
    with pytest.raises(UserError, match=r"^x\.pth: these weights are a bare backbone's"):
        make_trained_embed(make_method(settings), variables, "x.pth")


def test_a_training_run_becomes_a_published_checkpoint(tmp_path):
    """The mean classifiers differ from the classifiers, as after training, and go by their own names."""
    state = initial_state(SMALL_METHOD, random_variables(), steps_per_epoch=1)
    state = state.replace(averages=jax.tree.map(lambda leaf: leaf + 1, state.averages))
    save_settings(SMALL, tmp_path / "run")
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(3, state, iter(grain.MapDataset.range(4).to_iter_dataset()))
    convert(tmp_path / "run", tmp_path / "out.pth")
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
    return process("convert_weights.py", *arguments)


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
    assert "stages of (1, 1, 1, 1) bottlenecks; expected resnet50 (stages of (3, 4, 6, 3)" in failed.stderr
    assert not (tmp_path / "c.safetensors").exists()


# Settings that go with the weights


ABLATIONS = {"SE": ("mam", "se"), "baseline": ("mam", "none"), "non-local": ("pam", "non_local")}


@pytest.fixture(params=ABLATIONS.values(), ids=ABLATIONS.keys())
def ablation(request, tmp_path):
    """(PyTorch's network, its settings, its state dict as a .safetensors file without settings)."""
    kind, value = request.param
    source = network(**{kind: value})
    save_file(numpy_state_dict(source), tmp_path / "ablation.safetensors")
    return source, settings_of_size(**{f"{({'mam': 'channel', 'pam': 'pattern'})[kind]}_module": value}), tmp_path


def embedding_of(source, **options):
    settings, variables, _ = read_weights(source, drop_classifiers=True, **options)
    return make_trained_embed(make_method(settings), variables, source)(IMAGES)


def test_settings_go_with_the_weights(ablation):
    """Converted once by its settings, an ablation needs none any more, and its embeddings are PyTorch's."""
    source, settings, folder = ablation
    convert(folder / "ablation.safetensors", folder / "a.safetensors", settings=settings)
    assert read_metadata(folder / "a.safetensors") == json.loads(json.dumps(to_dict(settings)))
    convert(folder / "a.safetensors", folder / "b")
    convert(folder / "b", folder / "c.safetensors")
    assert same(load_file(folder / "c.safetensors"), load_file(folder / "a.safetensors"))
    assert read_metadata(folder / "c.safetensors") == read_metadata(folder / "a.safetensors")
    for stored in ("a.safetensors", "b"):
        embedding = embedding_of(folder / stored)
        np.testing.assert_allclose(embedding, pytorch_embedding(source), rtol=1e-3, atol=1e-4)
    with pytest.raises(
        UserError, match=r"a\.safetensors: .*another network: model\.\w+_module is '\w+' there and '(mam|pam)' here"
    ):
        convert(folder / "a.safetensors", folder / "d", settings=SMALL)
    assert not (folder / "d").exists()


def test_weights_without_settings_are_the_papers_unless_told(ablation):
    source, settings, folder = ablation
    path = folder / "ablation.safetensors"
    if settings.model.channel_module != "se":  # which has the very arrays of MAM
        with pytest.raises(UserError, match=r"missing: .*(spatial_attention|MAM3).*; weights without settings"):
            read_weights(path)
        with pytest.raises(UserError, match=r"ablation\.safetensors: does not fit the model; missing: .*\.weight"):
            read_weights(path, settings=SMALL)
    embedding = embedding_of(path, settings=settings)
    np.testing.assert_allclose(embedding, pytorch_embedding(source), rtol=1e-3, atol=1e-4)


def test_folder_without_settings_is_as_a_file_without(published, tmp_path):
    """As version 0.1 wrote folders."""
    save_file(published, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", settings=SMALL)
    (tmp_path / "folder/config.json").unlink()
    _, variables, _ = read_weights(tmp_path / "folder", settings=SMALL)
    assert same(variables, to_flax(published, template())[0])
    with pytest.raises(UserError, match=r"folder: .*stages of \(1, 1, 1, 1\).*; weights without settings are"):
        read_weights(tmp_path / "folder")


def test_metadata_that_are_no_settings_are_refused(published, tmp_path):
    path = tmp_path / "a.safetensors"
    for text, reason in (("{", "not a run's"), ('{"model": {"depth": 3}}', "model.depth"), ("[]", "not a run's")):
        save_file(published, path, metadata={"mpanet_jax.settings": text})
        with pytest.raises(UserError, match=rf"a\.safetensors: .*{reason}"):
            read_weights(path)


def test_script_takes_the_network_from_a_config(published, tmp_path):
    save_file(numpy_state_dict(network(mam="none")), tmp_path / "none.safetensors")
    config = [f"--config={ROOT}/configs/sysu.py", "--config.model.channel_module=none"]
    size = ["--stage_sizes=1,1,1,1", "--width=8"]
    failed = run_script(tmp_path / "none.safetensors", tmp_path / "a.safetensors", *size)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert "missing: backbone.MAM3.channel_attention.0.weight" in failed.stderr
    done = run_script(tmp_path / "none.safetensors", tmp_path / "a.safetensors", *config, *size)
    assert done.returncode == 0, done.stderr
    stored = read_metadata(tmp_path / "a.safetensors")["model"]
    assert (stored["channel_module"], stored["stage_sizes"], stored["width"]) == ("none", [1, 1, 1, 1], 8)
    for options, named in (
        (
            [*config, *size, "--config.model.backbone=resnet18"],
            "model.backbone is 'resnet50' there and 'resnet18' here",
        ),
        (["--width=16"], "model.width is 8 there and 16 here"),
        (["--stage_sizes=1,1"], "--stage_sizes, --width: model.stage_sizes = (1, 1): expected 4 numbers"),
        (["--config.model.width=8"], "--config.model.width: fields of a config go with --config="),
    ):
        failed = run_script(tmp_path / "a.safetensors", tmp_path / "folder", *options)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
        assert named in failed.stderr
        assert not (tmp_path / "folder").exists()
    done = run_script(tmp_path / "a.safetensors", tmp_path / "folder", "--width=8")
    assert done.returncode == 0, done.stderr
