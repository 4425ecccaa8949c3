"""The fused network is the plain one: values, gradients, running statistics, in training and in evaluation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpanet_jax.errors import SettingsError
from mpanet_jax.methods import method as method_module
from mpanet_jax.methods.mpanet import MPANet as Method
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.models.agw import NonLocalBlock
from mpanet_jax.models.fused import Fused, fuse, has_fused_blocks
from mpanet_jax.models.layers import SUMMED
from mpanet_jax.models.mpanet import CHANNEL_MODULES, PATTERN_MODULES, MPANet
from mpanet_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from mpanet_jax.settings_base import replace

# Shortcuts that are projected at stride 2 and at stride 1, and one that is not.
BACKBONE = ResNet(Bottleneck, (0, 2, 1, 1), 8)
ABLATIONS = [
    *(("mam", pattern) for pattern in PATTERN_MODULES),
    *((channel, "pam") for channel in CHANNEL_MODULES if channel != "mam"),
    ("cbam", "none"),
    ("none", "none"),
]


def relative_errors(a, b):
    a, b = jax.device_get((a, b))
    whole = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(b)))

    def error(x, y):
        # What is zero but for rounding is measured against the whole.
        norm = float(np.linalg.norm(y))
        return float(np.linalg.norm(x - y)) / (norm if norm > 1e-9 * whole else whole or 1)

    return jax.tree.map(error, a, b)


def with_inputs(network):
    """Variables for a network, and images with their modality."""
    rng = np.random.default_rng(0)
    # Blobs, so that feature maps vary; the odd width takes the stem's other branch.
    images = jnp.asarray(np.kron(rng.normal(size=(6, 4, 3, 3)), np.ones((1, 16, 16, 1)))[:, :, :-1])
    modality = jnp.arange(6) % 2
    # Every parameter and statistic away from 0 and 1, where errors would hide; kernels keep the size of the maps.
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(1), images, modality)
    variables = jax.tree.map(
        lambda s: (
            rng.normal(size=s.shape) * np.sqrt(2 / np.prod(s.shape[:-1]))
            if len(s.shape) > 1
            else rng.uniform(0.5, 1.5, s.shape)
        ),
        shapes,
    )
    return jax.tree.map(jnp.asarray, variables), images, modality


def make_network(channel_module, pattern_module):
    """The paper's with every kind of block, the others with those that differ by the module."""
    is_whole = (channel_module, pattern_module) == ("mam", "pam")
    backbone = BACKBONE if is_whole else ResNet(Bottleneck, (0, 0, 1, 1), 4)
    modules = {"channel_module": channel_module, "pattern_module": pattern_module}
    return MPANet(5, backbone, **modules, dtype=jnp.float64, param_dtype=jnp.float64)


@pytest.mark.parametrize(("channel_module", "pattern_module"), ABLATIONS)
def test_fused_equals_plain_in_training(channel_module, pattern_module):
    with jax.enable_x64(True):
        network = make_network(channel_module, pattern_module)
        variables, images, modality = with_inputs(network)
        shapes = jax.eval_shape(partial(network.apply, train=False), variables, images, modality)
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda s: rng.normal(size=s.shape), shapes)

        def outputs_and_gradients(form):
            def loss(params, images):
                all_variables = {**variables, "params": params}
                outputs, noted = form.apply(
                    all_variables, images, modality, train=True, mutable=["batch_stats", SUMMED]
                )
                return sum(map(jnp.vdot, outputs, weights)), (outputs, noted["batch_stats"])

            gradients, aux = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], images)
            return gradients, *aux

        found, expected = (outputs_and_gradients(form) for form in (fuse(network), network))
        assert max(jax.tree.leaves(relative_errors(found[0], expected[0]))) < 1e-8
        assert max(jax.tree.leaves(relative_errors(found[1:], expected[1:]))) < 1e-10


@pytest.mark.parametrize(("channel_module", "pattern_module"), ABLATIONS)
def test_fused_equals_plain_in_evaluation(channel_module, pattern_module):
    """The fused max-pool of the evaluation has no gradient of its own: it is for evaluation only."""
    with jax.enable_x64(True):
        network = make_network(channel_module, pattern_module)
        arguments = with_inputs(network)
        found, expected = (jax.jit(partial(form.apply, train=False))(*arguments) for form in (fuse(network), network))
        assert max(jax.tree.leaves(relative_errors(found, expected))) < 1e-10


@pytest.mark.parametrize("train", [True, False])
def test_the_fused_non_local_block_equals_the_plain_one(train):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        block = NonLocalBlock(param_dtype=jnp.float64)
        x, weights = jnp.asarray(rng.normal(size=(2, 4, 5, 3, 8)))
        shapes = jax.eval_shape(partial(block.init, train=False), jax.random.key(0), x)
        # Every parameter and statistic away from 0 and 1, the scale of the batch norm among them.
        variables = jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape) * rng.choice([-1, 1], s.shape), shapes)
        variables["batch_stats"]["bn"]["var"] = np.abs(variables["batch_stats"]["bn"]["var"])
        variables = jax.tree.map(jnp.asarray, variables)

        def loss(params, x, network):
            variables_ = {**variables, "params": params}
            y, changed = network.apply(variables_, x, train=train, mutable=["batch_stats"])
            return (y * weights).sum(), (y, changed["batch_stats"])

        results = [
            jax.jit(jax.value_and_grad(partial(loss, network=network), (0, 1), has_aux=True))(variables["params"], x)
            for network in (fuse(block), block)
        ]
        ((_, found), found_gradients), ((_, expected), gradients) = results
        assert max(jax.tree.leaves(relative_errors(found, expected))) < 1e-12
        # The batch norm divides w's size away: what is left of its gradient is a difference of large numbers.
        assert max(jax.tree.leaves(relative_errors(found_gradients, gradients))) < 1e-8
        initial = [
            jax.jit(partial(network.init, train=False))(jax.random.key(3), x) for network in (fuse(block), block)
        ]
        assert initial[0].keys() == variables.keys()
        jax.tree.map(np.testing.assert_array_equal, *initial)


def test_both_forms_have_the_same_variables():
    network = MPANet(5, BACKBONE)
    images, modality = jnp.zeros((2, 32, 32, 3)), jnp.zeros(2, jnp.int32)
    init = partial(jax.jit, static_argnames="train")
    plain, fused = (
        init(form.init)(jax.random.key(0), images, modality, train=False) for form in (network, fuse(network))
    )
    assert jax.tree.structure(plain) == jax.tree.structure(fused)
    jax.tree.map(np.testing.assert_array_equal, plain, fused)


def test_batch_norms_and_classifiers_say_that_they_sum_their_gradients_and_nothing_else_does():
    network = MPANet(5, BACKBONE)
    images, modality = jnp.zeros((2, 32, 32, 3)), jnp.zeros(2, jnp.int32)
    variables = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), images, modality)

    def noted(form):
        apply = partial(form.apply, train=True, mutable=["batch_stats", SUMMED])
        paths = jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(apply, variables, images, modality)[1].get(SUMMED, {}), is_leaf=lambda x: x == ((),)
        )
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}

    assert noted(network) == set()
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    expected = {name for name in names if name.endswith(("/scale", "/bias", "classifier"))} - {"pam/bias"}
    assert noted(fuse(network)) == expected


def test_fused_is_refused_where_there_is_no_fused_form():
    assert has_fused_blocks(MPANet(5, BACKBONE)) and not has_fused_blocks(MPANet(5, ResNet(BasicBlock, (1, 1, 1, 1))))
    settings = replace(MPANetSettings(), {"model.backbone": "resnet18", "model.fused": "on"})
    with pytest.raises(SettingsError, match=r"model.fused = 'on': .*'mpanet'.*'resnet18' has no fused form"):
        Method(settings).build(5)
    with pytest.raises(SettingsError, match=r"model.fused = 'on'"):
        Method(settings).check_form()
    for fused in ("off", "auto"):
        assert isinstance(Method(replace(settings, {"model.fused": fused})).build(5), nn.Module)


def test_a_method_looks_for_its_fused_form_once(monkeypatch):
    looked_at = []
    monkeypatch.setattr(method_module, "has_fused_blocks", lambda network: looked_at.append(network) or True)
    method = Method(replace(MPANetSettings(), {"model.fused": "on"}))
    method.check_form()
    assert isinstance(method.build(5), Fused) and isinstance(method.build(5, "devices"), Fused)
    assert len(looked_at) == 1


@pytest.mark.parametrize(
    ("fused", "platform", "expected"),
    [("on", "tpu", True), ("off", "gpu", False), ("auto", "gpu", True), ("auto", "cpu", True), ("auto", "tpu", False)],
)
def test_auto_takes_the_form_that_was_measured_to_be_faster(fused, platform, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    network = Method(replace(MPANetSettings(), {"model.fused": fused, "dtype": "float32"})).build(5)
    assert isinstance(network, Fused) == expected
