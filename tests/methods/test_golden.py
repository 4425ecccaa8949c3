"""AGW and CAJ against numbers of the published program (golden/README.md), to 1e-8 in float64."""

import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpanet_jax.methods.agw import AGW, AGWSettings, RandomBatchPlan, weighted_triplet
from mpanet_jax.methods.caj import CAJ, CAJSettings, enhanced_squared_difference
from mpanet_jax.models.agw import NonLocalBlock
from mpanet_jax.models.resnet import Bottleneck, Stem
from mpanet_jax.settings_base import replace
from mpanet_jax.state import create_train_state
from mpanet_jax.step import train_step
from mpanet_jax.weights.convert import template_of
from mpanet_jax.weights.names import from_state_dict, to_state_dict
from tests.reference.compare import gradient_recorder

GOLDEN = np.load(Path(__file__).parent / "golden/agw.npz")
NUM_IDS, BOUND = 10, 1e-8
LABELS = np.repeat([0, 1], 4).astype(np.int32)
# Zero in exact arithmetic: a batch norm, or another one behind it, takes them out again.
ZERO = [*(f"NL_{stage}.{i}.W.0.bias" for stage, i in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)))]
ZERO += ["NL_2.1.W.1.bias", "NL_3.2.W.1.bias"]


def rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def draw(name, shape):
    """The weight `name` in PyTorch's layout."""
    r, last = rng(name), name.rsplit(".", 1)[1]
    if name == "bottleneck.bias":
        return np.zeros(shape)
    if last == "running_mean":
        v = 0.1 * r.standard_normal(shape)
    elif last == "running_var" or (last == "weight" and len(shape) == 1):
        v = r.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        v = 0.1 * r.standard_normal(shape)
    else:
        v = r.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    if name.startswith("NL_") and name.endswith((".theta.weight", ".phi.weight", ".g.0.weight")):
        v = v / 4
    in_stage_4 = name.startswith("base_resnet.base.layer4.")
    if in_stage_4 and (".bn3." in name or ".downsample.1." in name) and last in ("weight", "bias"):
        v = v / 8
    return v.astype(np.float32).astype(np.float64)


def images(name, size=8):
    return rng(name).standard_normal((size, 3, 96, 48)).transpose(0, 2, 3, 1)


class Golden:
    """Is given what the network sees, keeps the last gradients, and has one step in each of the epochs 0, 10 and 25."""

    def views(self, key, images, rows, first_index):
        return images, rows

    def learning_rate(self, steps_per_epoch):
        schedule = super().learning_rate(1)
        return lambda step: schedule(jnp.asarray([0, 10, 25])[step])

    def optimizer(self, learning_rate):
        chain = super().optimizer(learning_rate)
        return optax.chain(gradient_recorder(), chain)


class GoldenAGW(Golden, AGW):
    """AGW's."""


class GoldenCAJ(Golden, CAJ):
    """CAJ's, of which the loss and the gradients are compared; the rest of the step is AGW's."""

    def optimizer(self, learning_rate):
        return gradient_recorder()


def make(cls, settings):
    method = cls(replace(settings, {"dtype": "float64", "model.fused": "off"}))
    template = template_of(method, NUM_IDS)
    names = to_state_dict(jax.tree.map(lambda leaf: np.zeros(leaf.shape), template), method.names())
    state_dict = {name: draw(name, array.shape) for name, array in names.items()}
    return method, jax.tree.map(jnp.asarray, from_state_dict(state_dict, template, method.names())[0])


def published(method, params, state):
    return to_state_dict({"params": params, "batch_stats": state.batch_stats, "averages": {}}, method.names())


def compiled(function):
    # The whole ResNet-50 computes for longer than it compiles, so it is worth more than tests/conftest.py asks for.
    options = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
    return jax.jit(function, compiler_options=options)


def error(found, expected):
    """Relative, by the norm."""
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def table_errors(names, arrays, table):
    """Relative errors of norms and sums, and what should be 0."""
    errors = {}
    for name, (norm, total) in zip(names, table, strict=True):
        array = arrays[name]
        if name in ZERO and norm < 1e-8:
            errors[name] = np.linalg.norm(array)
        else:
            of_sum = abs(array.sum() - total) / (norm * np.sqrt(array.size))
            errors[name] = max(abs(np.linalg.norm(array) - norm) / norm, of_sum)
    return errors


def beyond(errors):
    return {name: value for name, value in errors.items() if not value <= BOUND}


@pytest.mark.parametrize("distance", [1, 5, 20])
@pytest.mark.parametrize(("loss", "name"), [(weighted_triplet, "wrt"), (enhanced_squared_difference, "adp")])
def test_losses_and_their_gradients(loss, name, distance):
    with jax.enable_x64(True):
        prefix = f"loss/{distance}/"
        features, labels = jnp.asarray(GOLDEN[prefix + "features"]), jnp.asarray(GOLDEN["loss/labels"])
        value, gradient = jax.value_and_grad(loss)(features, labels)
        assert error(value, GOLDEN[prefix + name]) <= BOUND
        expected = GOLDEN[f"{prefix}{name}_grad"]
        if expected.any():
            assert error(gradient, expected) <= BOUND
        else:
            assert not gradient.any()


def check_schedule(method, name):
    schedule = method.learning_rate(7)
    factor = method.settings.optim.body_rate
    head = np.array([schedule(7 * epoch + 3) for epoch in range(101)])
    np.testing.assert_allclose(np.stack([factor * head, head], 1), GOLDEN[f"schedule/{name}"], rtol=1e-6)
    assert method.settings.train.num_epochs == GOLDEN[f"schedule/{name}_epochs"]


def test_schedule():
    check_schedule(AGW(AGWSettings()), "agw")
    check_schedule(CAJ(CAJSettings()), "caj")


def test_batches_of_an_epoch():
    for (visible, infrared), steps in zip(GOLDEN["sampler/counts"], GOLDEN["sampler/steps"], strict=True):
        pids = np.concatenate([np.arange(visible) % 8, np.arange(infrared) % 8])
        modality = np.repeat([0, 1], (visible, infrared))
        assert RandomBatchPlan(pids, modality, 8, 8, 0).steps_per_epoch == steps


def test_evaluation():
    with jax.enable_x64(True):
        method, variables = make(AGW, AGWSettings())
        network = method.network(NUM_IDS)
        chosen = (Stem, Bottleneck, NonLocalBlock)
        apply = compiled(
            partial(network.apply, train=False, capture_intermediates=lambda module, _: isinstance(module, chosen))
        )
        state = {name: variables[name] for name in ("params", "batch_stats")}
        for value, modality in enumerate(("visible", "infrared")):
            x = jnp.asarray(images(f"agw/eval/{modality}", 4))
            outputs, seen = apply(state, x, jnp.full((4,), value, jnp.int32))
            assert error(outputs.embedding[:, ::8], GOLDEN[f"eval/{modality}/neck"]) <= BOUND
            seen = seen["intermediates"]
            for name, norm in zip(GOLDEN["names/blocks"], GOLDEN[f"eval/{modality}/blocks"], strict=True):
                first, *rest = str(name).replace("base_resnet.base.", "").split(".")
                if first == "maxpool":
                    found = seen[modality]["stem"]
                elif first.startswith("NL"):
                    found = seen[f"non_local{first[-1]}_{rest[0]}"]
                else:
                    found = seen[f"stage{first[-1]}"][f"block{rest[0]}"]
                assert abs(np.linalg.norm(found["__call__"][0]) - norm) / norm <= BOUND, name


def test_names_are_the_published_ones():
    method = AGW(AGWSettings())
    names = to_state_dict(jax.tree.map(lambda leaf: np.zeros(leaf.shape), template_of(method, NUM_IDS)), method.names())
    assert set(names) == {*map(str, GOLDEN["names/params"]), *map(str, GOLDEN["names/stats"]), "bottleneck.bias"}


def test_three_training_steps():
    with jax.enable_x64(True):
        method, variables = make(GoldenAGW, AGWSettings())
        state = create_train_state(variables, {}, method.optimizer(method.learning_rate(1)), jax.random.key(0))
        step = compiled(partial(train_step, method=method, network=method.build(NUM_IDS), steps_per_epoch=1))
        # The published program's batch is sorted by modality; any order is the same.
        order = np.random.default_rng(0).permutation(16)
        batch = {
            "images": np.concatenate([images("agw/train/visible"), images("agw/train/infrared")])[order],
            "labels": np.tile(LABELS, 2)[order],
            "modality": np.repeat([0, 1], 8).astype(np.int32)[order],
        }
        for number in range(3):
            state, metrics = step(state, batch)
            found = [metrics[name] for name in ("loss", "identity", "triplet")]
            np.testing.assert_allclose(found, GOLDEN["agw/train/loss"][number], rtol=BOUND)
            params = published(method, state.params, state)
            if number == 0:
                gradients = published(method, state.opt_state[0], state)
                names = list(map(str, GOLDEN["names/params"]))
                assert not beyond(table_errors(names, gradients, GOLDEN["agw/train/grad"]))
            assert not beyond(table_errors(names, params, GOLDEN["agw/train/params"][number]))
            stats = list(map(str, GOLDEN["names/stats"]))
            assert not beyond(table_errors(stats, params, GOLDEN["agw/train/stats"][number]))


def test_a_step_of_caj():
    with jax.enable_x64(True):
        method, variables = make(GoldenCAJ, CAJSettings())
        state = create_train_state(variables, {}, method.optimizer(method.learning_rate(1)), jax.random.key(0))
        step = compiled(partial(train_step, method=method, network=method.build(NUM_IDS), steps_per_epoch=1))
        views = ("visible", "channel", "infrared")
        batch = {
            "images": np.concatenate([images(f"caj/train/{view}") for view in views]),
            "labels": np.tile(LABELS, 3),
            "modality": np.repeat([0, 0, 1], 8).astype(np.int32),
        }
        state, metrics = step(state, batch)
        found = [metrics[name] for name in ("loss", "identity", "triplet")]
        np.testing.assert_allclose(found, GOLDEN["caj/train/loss"], rtol=BOUND)
        gradients = published(method, state.opt_state, state)
        assert not beyond(table_errors(list(map(str, GOLDEN["names/params"])), gradients, GOLDEN["caj/train/grad"]))
