"""A run that starts from trained weights: what it takes, what starts anew, what it refuses."""

import dataclasses
import functools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

from configs import synthetic as synthetic_config  # noqa: E402
from mpanet_jax.checkpoint import Checkpoints, load_model  # noqa: E402
from mpanet_jax.datasets.synthetic import write_dataset  # noqa: E402
from mpanet_jax.errors import UserError  # noqa: E402
from mpanet_jax.evaluation.extract import make_trained_embed  # noqa: E402
from mpanet_jax.loop import train  # noqa: E402
from mpanet_jax.methods import METHODS, Entry, make_method, settings_of  # noqa: E402
from mpanet_jax.methods.method import Method  # noqa: E402
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings  # noqa: E402
from mpanet_jax.models.resnet import Stem  # noqa: E402
from mpanet_jax.run_files import check_init_from, load_settings, save_settings  # noqa: E402
from mpanet_jax.run_setup import initial_state  # noqa: E402
from mpanet_jax.settings_base import replace  # noqa: E402
from mpanet_jax.state import init_variables  # noqa: E402
from mpanet_jax.weights.convert import convert, initial_variables, start_from  # noqa: E402
from mpanet_jax.weights.files import read_state_dict  # noqa: E402
from mpanet_jax.weights.names import to_state_dict  # noqa: E402
from tests.limits import HANGS_AFTER  # noqa: E402
from tests.methods_in_tests import small_mpanet  # noqa: E402
from tests.reference.model import MPANet as Reference  # noqa: E402
from tests.reference.model import randomise  # noqa: E402

ROOT = Path(__file__).parent.parent
# All in one worker: they share a run and the variables of the small network.
pytestmark = pytest.mark.xdist_group("fine-tuning")
SMALL = small_mpanet()
CLASSIFIERS = {"classifier", "visible_classifier", "infrared_classifier"}


@functools.cache  # a test asks for the same ones again and again
def random_variables(method=SMALL, num_ids=7, seed=1):
    """Drawn by NumPy, because compiling the network's own initialisation takes seconds."""
    shapes = jax.eval_shape(lambda key: init_variables(method.network(num_ids), key, 32, 32), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype), shapes)


def write_run(folder, method=SMALL, num_ids=5):
    """A run's folder with one checkpoint; returns the model in it."""
    state = initial_state(method, random_variables(method, num_ids, seed=2), steps_per_epoch=1)
    save_settings(method.settings, folder)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(3, state, iter(grain.MapDataset.range(4).to_iter_dataset()))
    return {"params": state.params, "batch_stats": state.batch_stats}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run for 5 identities, beside it run.safetensors and run.pth; its model)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    model = write_run(folder)
    convert(folder, folder.with_suffix(".safetensors"))
    convert(folder, folder.with_suffix(".pth"))
    convert(folder, folder.with_suffix(".without.safetensors"), drop_classifiers=True)
    return folder, model


# What is taken


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pth", ".without.safetensors"])
@pytest.mark.parametrize("num_ids", [7, 5])
def test_all_but_the_classifiers_is_taken(run, suffix, num_ids):
    folder, model = run
    source, before = str(folder.with_suffix(suffix)), random_variables(num_ids=num_ids)
    after, line = start_from(source, SMALL)(before)
    before, after, model = map(flatten_dict, (before, after, model))
    assert before.keys() == after.keys()
    anew = {path for path in after if path[-1] in CLASSIFIERS}
    assert len(anew) == 3 and {after[path].shape[-1] for path in anew} == {num_ids}
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, (before if path in anew else model)[path], err_msg=str(path))
    assert line == (
        f"init_from: {source}: loaded everything but the classifiers, which start from scratch for {num_ids} "
        "identities (classifier, infrared_classifier, visible_classifier)"
    )


def test_a_start_from_weights_traces_the_network_once(tmp_path):
    # No other test has this network, so nothing of it has been traced before.
    method, traced = small_mpanet(init_from=str(tmp_path / "x.safetensors"), model__width=12), []
    names = method.names()
    weights = to_state_dict(random_variables(method), names)
    save_file({n: a for n, a in weights.items() if not names.is_classifier(n)}, tmp_path / "x.safetensors")

    def note(plain, args, kwargs, context):
        if context.method_name == "__call__":
            traced.append(type(context.module))
        return plain(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: initial_variables(method, num_ids=23))
    assert traced.count(Stem) == 1


def test_a_published_checkpoint_embeds_as_pytorch_does_before_the_first_step(tmp_path):
    network = randomise(Reference(5, stage_sizes=(1, 1, 1, 1), width=8), seed=0).double()
    torch.save(network.state_dict(), tmp_path / "published.pth")
    fields = {"init_from": str(tmp_path / "published.pth"), "data__height": 32, "data__width": 32, "dtype": "float64"}
    method, lines = small_mpanet(**fields), []
    images = np.random.default_rng(0).integers(0, 256, (2 * jax.local_device_count(), 32, 32, 3), dtype=np.uint8)
    with jax.enable_x64(True):
        variables = initial_variables(method, 7, report=lines.append)
        found = make_trained_embed(method, variables, "x")(images)
        # The mean classifiers begin as what they average.
        averages = jax.tree.map(np.asarray, initial_state(method, variables, steps_per_epoch=1).averages)
    normalised = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = network.eval()(torch.tensor(normalised.transpose(0, 3, 1, 2))).embedding.numpy()
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert len(lines) == 1 and "from scratch for 7 identities" in lines[0]
    assert set(averages) == CLASSIFIERS - {"classifier"}
    for name, average in averages.items():
        np.testing.assert_array_equal(average, variables["params"][name])


class Unprefixed(MPANet):
    """A method whose weights have no names of their own: those of its backbone are the backbone's."""

    def names(self):
        return dataclasses.replace(Method.names(self), linear=r"(averages\.)?(visible_|infrared_)?classifier")


def test_a_backbone_is_told_from_a_whole_network_that_has_its_names(run, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "unprefixed", Entry(Unprefixed, MPANetSettings))
    method, model = make_method(replace(SMALL.settings, {"method": "unprefixed"})), flatten_dict(run[1])
    whole = to_state_dict(run[1], method.names())
    backbone = {name: array for name, array in whole.items() if name.startswith(("conv1.", "bn1.", "layer"))}
    assert set(backbone) < set(whole)
    before = random_variables()
    for content, words in ((backbone, "loaded the backbone; everything else"), (whole, "loaded everything but")):
        save_file(content, tmp_path / "x.safetensors")
        after, line = start_from(str(tmp_path / "x.safetensors"), method)(before)
        assert words in line
        for path, leaf in flatten_dict(after).items():
            is_taken = path[1].startswith("st") or (content is whole and path[-1] not in CLASSIFIERS)
            expected = model if is_taken else flatten_dict(before)
            np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
    for name in ("neck.running_mean", "layer1.0.bn1.bias"):
        save_file({n: a for n, a in whole.items() if n != name}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=rf"missing: {name};"):
            start_from(str(tmp_path / "x.safetensors"), method)(before)


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "other"),
    [
        ("model.channel_module", "se", "mam"),
        ("model.pattern_module", "none", "pam"),
        ("model.width", 16, 8),
        ("method", "mpanet_copy", "mpanet"),
    ],
)
def test_another_network_is_refused_by_the_names_of_both(tmp_path, monkeypatch, field, value, other):
    monkeypatch.setitem(METHODS, "mpanet_copy", Entry(MPANet, MPANetSettings))
    write_run(tmp_path / "run", MPANet(replace(SMALL.settings, {field: value})))
    convert(tmp_path / "run", tmp_path / "run.safetensors")
    for suffix in ("", ".safetensors"):
        with pytest.raises(UserError) as error:
            start_from(str(tmp_path / f"run{suffix}"), SMALL)
        assert str(error.value) == (
            f"init_from: {tmp_path}/run{suffix}: its weights are of another network: "
            f"{field} is {value!r} there and {other!r} here; set these fields to the values there, or name other "
            "weights"
        )


def test_of_a_backbone_only_the_backbone_has_to_be_the_same(run, tmp_path):
    """A folder with a bare backbone carries settings too, of which the modules mean nothing."""
    backbone = {
        name.removeprefix("backbone."): array
        for name, array in read_state_dict(run[0].with_suffix(".pth")).items()
        if name.startswith("backbone.") and "MAM" not in name
    }
    save_file(backbone, tmp_path / "backbone.safetensors")
    convert(tmp_path / "backbone.safetensors", tmp_path / "folder", settings=SMALL.settings)
    other = small_mpanet(model__channel_module="se")
    after, line = start_from(str(tmp_path / "folder"), other)(random_variables(other))
    assert line.endswith("folder: loaded the backbone; everything else starts from scratch")
    np.testing.assert_array_equal(
        after["params"]["stem"]["conv1"]["kernel"], backbone["conv1.weight"].transpose(2, 3, 1, 0)
    )
    wider = small_mpanet(model__width=16)
    with pytest.raises(UserError, match=r"^init_from: .*folder: .*: model\.width is 8 there and 16 here; set these"):
        start_from(str(tmp_path / "folder"), wider)


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        ("bn_neck.running_mean", None, r"missing: bn_neck\.running_mean"),
        (None, "gem.p", r"not part of the model: gem\.p"),
        ("backbone.MAM3.channel_attention.0.weight", "x.weight", r"missing: backbone\.MAM3\S+; not part .*: x\.weight"),
        (r"bn_neck", None, r"missing: bn_neck\.running_mean, bn_neck\.running_var, bn_neck\.weight"),
    ],
)
def test_missing_and_extra_tensors_are_named(run, tmp_path, without, extra, message):
    state_dict = read_state_dict(run[0].with_suffix(".pth"))
    state_dict = {name: array for name, array in state_dict.items() if not (without and name.startswith(without))}
    save_file(state_dict | ({extra: np.ones(1, np.float32)} if extra else {}), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"^init_from: \S+x\.safetensors: does not fit the model; {message}"):
        start_from(str(tmp_path / "x.safetensors"), SMALL)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    save_settings(SMALL.settings, tmp_path / "run")
    with pytest.raises(UserError, match=r"^init_from: \S+/run/checkpoints: no checkpoint here; train first"):
        start_from(str(tmp_path / "run"), SMALL)
    # What orbax leaves until a checkpoint is whole.
    (tmp_path / "run/checkpoints/3.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        start_from(str(tmp_path / "run"), SMALL)
    assert str(error.value) == (
        f"init_from: {tmp_path}/run/checkpoints: its first checkpoint is still being written, or was cut off; "
        "wait until it is there, or start that run again"
    )
    with pytest.raises(UserError, match=r"^init_from: \S+/none: no such weights file"):
        start_from(str(tmp_path / "none"), SMALL)


def test_missing_weights_are_named_before_the_network_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("mpanet_jax.weights.convert.init_variables", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(UserError, match=r"^init_from: \S+/none\.pth: no such weights file"):
        initial_variables(small_mpanet(init_from=str(tmp_path / "none.pth")), num_ids=5)


def test_a_run_cannot_start_from_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for init_from in ("run", "./run/", str(tmp_path / "run"), "link"):
        with pytest.raises(UserError, match=r"^init_from: \S+ is the workdir of this very run; give the new"):
            check_init_from(init_from, tmp_path / "run")
    for init_from in ("", "run2", "run/best.safetensors", "hf:timm/resnet50.tv_in1k"):
        check_init_from(init_from, tmp_path / "run")


# Whole runs


def settings_of_run(folder, num_ids, **changes):
    """Of a run on a synthetic data set in `folder`, which is drawn."""
    write_dataset(
        "sysu_mm01", folder / "raw", num_train_ids=num_ids, num_test_ids=4, images_per_camera=(3, 5), height=(48, 56)
    )
    fields = {
        **{"dataset.source": str(folder / "raw"), "dataset.data_dir": str(folder / "data")},
        **{"data.height": 32, "data.width": 16, "data.num_ids_per_batch": 3, "data.images_per_id": 4},
        **{"train.num_epochs": 1, "train.checkpoint_every_epochs": 1, "train.eval_every_epochs": 0},
        # What compiles fastest.
        **{"model.backbone": "resnet18", "model.channel_module": "none", "model.pattern_module": "none"},
        **{f"loss.{name}": 0.0 for name in ("center_cluster", "separation", "modality_identity", "mutual_mean")},
        **{"eval.batch_size": 16, **changes},
    }
    return replace(settings_of(synthetic_config.get_config().to_dict()), fields)


def test_a_run_starts_from_another_run_and_goes_on_without_it(tmp_path, capfd):
    """On other identities, at its own learning rate: one so small that the parameters stay what they were."""
    first, second = tmp_path / "first", tmp_path / "second"
    settings = settings_of_run(first, 6)
    train(settings, first / "run")
    with pytest.raises(UserError, match=r"^init_from: .* is the workdir of this very run"):
        train(replace(settings, {"init_from": str(first / "run")}), first / "run")
    capfd.readouterr()
    settings = settings_of_run(second, 4, **{"optim.learning_rate": 1e-30, "init_from": str(first / "run")})
    train(settings, second / "run")
    printed = capfd.readouterr().err
    assert printed.count("init_from: ") == 1 and "which start from scratch for 4 identities" in printed
    assert load_settings(second / "run") == settings
    (_, first_model), (steps, second_model) = (load_model(folder / "run") for folder in (first, second))
    first_model, second_model = flatten_dict(first_model), flatten_dict(second_model)
    for path, leaf in second_model.items():
        if path[0] == "params" and path[-1] not in CLASSIFIERS:
            # A parameter at 0 moves by the learning rate.
            np.testing.assert_allclose(leaf, first_model[path], rtol=0, atol=1e-25, err_msg=str(path))
    assert second_model["params", "classifier"].shape[-1] == 4

    shutil.rmtree(first / "run")
    train(replace(settings, {"train.num_epochs": 2}), second / "run")
    assert "init_from: " not in capfd.readouterr().err
    assert load_model(second / "run")[0] == 2 * steps


def test_of_several_processes_each_reads_for_itself(run, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.start_process", address, str(number), str(run[0]), str(tmp_path)],
            cwd=ROOT,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        assert [process.wait(timeout=HANGS_AFTER) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = [dict(np.load(tmp_path / f"{number}.npz")) for number in range(2)]
    expected = {"/".join(path): leaf for path, leaf in flatten_dict(run[1]).items()}
    assert found[0].keys() == found[1].keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        if name.rpartition("/")[2] not in CLASSIFIERS:
            np.testing.assert_array_equal(found[0][name], leaf, err_msg=name)
