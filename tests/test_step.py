"""The whole iteration: it learns, it is deterministic, and each piece of the state moves as docs/method.md says."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpanet_jax.methods.mpanet import MPANet as MPANetMethod
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.models.mpanet import CHANNEL_MODULES, PATTERN_MODULES, MPANet
from mpanet_jax.models.resnet import Bottleneck, ResNet
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.state import init_variables
from mpanet_jax.step import total_gradients, train_step
from tests.methods_in_tests import (
    NO_AUGMENTATION,
    LinenMethod,
    MPANetOfTwoBlocks,
    drawn_variables,
    small_mpanet,
    start,
)

P, K, HEIGHT, WIDTH = 4, 4, 64, 32


def make_model(**options):
    return MPANet(P, ResNet(Bottleneck, (0, 1, 1, 1), 16), **options)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    # One texture an identity, so that there is something to learn.
    base = rng.integers(0, 256, size=(P, 1, HEIGHT, WIDTH, 3))
    images = np.clip(base + rng.normal(0, 20, size=(P, K, HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    return {
        "images": images.reshape(P * K, HEIGHT, WIDTH, 3),
        "labels": np.repeat(np.arange(P), K).astype(np.int32),
        "modality": np.tile([0, 0, 1, 1], P).astype(np.int32),
    }


@cache
def make_step(*, augment=False, method_class=MPANetMethod, **fields):
    method = small_mpanet(
        data__images_per_id=K,
        optim__learning_rate=1e-3,
        **({} if augment else {k.replace(".", "__"): v for k, v in NO_AUGMENTATION.items()}),
        **fields,
    )
    method = method_class(method.settings)
    options = {"method": method, "network": method.build(P), "steps_per_epoch": 10}
    return jax.jit(partial(train_step, **options)), start(method, P, HEIGHT, WIDTH)


def equal(a, b):
    def numbers(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(numbers(x), numbers(y)), a, b)))


# What is left compiles in half the time.
CROSS_ENTROPY = {
    **{"model__channel_module": "none", "model__pattern_module": "none"},
    **{f"loss__{name}": 0.0 for name in ("center_cluster", "separation", "modality_identity", "mutual_mean")},
}


class Poisoned(MPANetOfTwoBlocks):
    """Its loss is NaN for batches that begin with the last identity."""

    def loss_terms(self, outputs, rows, averages, axis_name=None):
        terms = super().loss_terms(outputs, rows, averages, axis_name)
        return terms | {"identity": terms["identity"] * jnp.where(rows["labels"][0] == P - 1, jnp.nan, 1.0)}


def test_step_without_a_finite_loss_is_skipped():
    step, state = make_step(method_class=Poisoned, train__on_nonfinite="skip", **CROSS_ENTROPY)
    good, bad = make_batch(), {name: rows[::-1].copy() for name, rows in make_batch().items()}
    bad["modality"] = bad["modality"][::-1].copy()
    one, metrics = step(state, good)
    assert float(metrics["skipped"]) == 0 and not equal(one.params, state.params)
    two, metrics = step(one, bad)
    assert float(metrics["skipped"]) == 1 and np.isnan(float(metrics["loss"]))
    assert equal(two, one.replace(step=one.step + 1))
    three, metrics = step(two, good)
    assert float(metrics["skipped"]) == 0 and not equal(three.averages, two.averages)
    # Without augmentation the step after is the one that would have come.
    assert equal(three.params, step(one, good)[0].params)


def test_steps_are_skipped_only_where_that_was_asked_for():
    step, state = make_step(method_class=Poisoned, **CROSS_ENTROPY)
    bad = {name: rows[::-1].copy() for name, rows in make_batch().items()}
    after, metrics = step(state, bad)
    finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params)]
    assert "skipped" not in metrics and not all(finite)


def test_four_steps_train():
    step, state = make_step(augment=True)
    batch, history = make_batch(), []
    for _ in range(4):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    assert int(state.step) == 4
    assert all(np.isfinite(list(values.values())).all() for values in history)
    assert history[3]["identity"] < history[0]["identity"]
    assert set(history[0]) == {
        *("identity", "center_cluster", "separation", "modality_identity", "mutual_mean"),
        *("loss", "accuracy", "learning_rate"),
    }
    # Eq. 14.
    weights = {"identity": 1, "center_cluster": 1, "separation": 0.5, "modality_identity": 0.5, "mutual_mean": 2.5}
    total = sum(weight * history[0][name] for name, weight in weights.items())
    np.testing.assert_allclose(history[0]["loss"], total, rtol=1e-5)


def test_mean_classifiers_follow_equation_11():
    step, state = make_step(augment=True)
    assert MPANetSettings().mean.rate == 0.2
    start = state
    state, _ = step(state, make_batch())
    after_one = state
    # E starts as a copy of θ, so the first update (before the first optimiser step) leaves it where it is.
    for name in ("visible_classifier", "infrared_classifier"):
        np.testing.assert_allclose(after_one.averages[name], start.params[name], rtol=1e-6)
    state, _ = step(state, make_batch())
    for name in ("visible_classifier", "infrared_classifier"):
        expected = 0.8 * start.params[name] + 0.2 * after_one.params[name]
        np.testing.assert_allclose(state.averages[name], expected, rtol=1e-5, atol=1e-8)
        assert np.abs(state.averages[name] - start.params[name]).max() > 0


def test_image_cache_gives_the_same_step_as_images():
    # Another network than this package's would do as well: the images are taken before it.
    method = LinenMethod(replace(Settings(), {"data.images_per_id": K, "dtype": "float32"}))
    options = {"method": method, "network": method.build(P), "steps_per_epoch": 10}
    step, state = jax.jit(partial(train_step, **options)), start(method, P, HEIGHT, WIDTH)
    batch = make_batch()
    order = np.random.default_rng(5).permutation(P * K).astype(np.int32)
    cache = np.empty_like(batch["images"])
    cache[order] = batch["images"]
    by_index = {"labels": batch["labels"], "modality": batch["modality"], "index": order}
    from_images, _ = step(state, batch)
    from_cache, _ = step(state, by_index, jnp.asarray(cache.reshape(P * K, HEIGHT, WIDTH * 3)))
    assert equal(from_images.params, from_cache.params)


def test_randomness_depends_on_seed_and_step_only():
    step, state = make_step(augment=True)
    first, _ = step(state, make_batch())
    again, _ = step(state, make_batch())
    later, _ = step(state.replace(step=jnp.asarray(7, jnp.int32)), make_batch())
    assert equal(first.params, again.params)
    assert not equal(first.params, later.params)
    assert equal(jax.random.key_data(first.rng), jax.random.key_data(state.rng))


@pytest.mark.parametrize("channel_module", CHANNEL_MODULES)
@pytest.mark.parametrize("pattern_module", PATTERN_MODULES)
def test_every_ablation_builds_and_has_its_feature_size(channel_module, pattern_module):
    model = make_model(channel_module=channel_module, pattern_module=pattern_module)
    images = jnp.zeros((2, HEIGHT, WIDTH, 3), jnp.float32)
    outputs, _ = jax.eval_shape(lambda key: model.init_with_output(key, images, train=False), jax.random.key(0))
    channels = 32 * 16
    patterns = 6 if pattern_module == "pam" else 0
    assert outputs.features.shape == outputs.embedding.shape == (2, (patterns + 1) * channels)
    assert outputs.maps.shape == (2, (HEIGHT // 16) * (WIDTH // 16), patterns)
    assert outputs.logits.shape == (2, P)


def test_losses_that_are_off_are_not_computed():
    step, state = make_step(method_class=Poisoned, **CROSS_ENTROPY)  # a program that is there already
    _, metrics = jax.eval_shape(step, state, make_batch())
    assert set(metrics) == {"identity", "loss", "accuracy", "learning_rate"}


def test_embedding_does_not_depend_on_the_rest_of_the_batch():
    with jax.enable_x64(True):  # in float32 the rounding depends on the batch, and on the CPU
        method = small_mpanet(dtype="float64")
        variables = drawn_variables(method.network(P), HEIGHT, WIDTH)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        images = jnp.asarray(make_batch()["images"])
        embed = jax.jit(partial(method.embed, method.build(P)))
        together, alone = embed(variables, images), embed(variables, images[3:4])
    np.testing.assert_allclose(together[3:4], alone, rtol=1e-10, atol=1e-12)
    single = small_mpanet()
    variables = drawn_variables(single.network(P), HEIGHT, WIDTH)
    found = jax.eval_shape(partial(single.embed, single.build(P)), variables, images)
    assert found.shape == together.shape == (P * K, 7 * 256) and found.dtype == jnp.float32


def test_full_size_shapes():
    model = MPANet(num_ids=395)
    images = jnp.zeros((1, 384, 128, 3), jnp.float32)
    outputs, variables = jax.eval_shape(partial(model.init_with_output, train=False), jax.random.key(0), images)
    assert outputs.embedding.shape == (1, 14336)
    assert outputs.maps.shape == (1, 24 * 8, 6)
    backbone = {name: variables["params"][name] for name in ("stem", "stage1", "stage2", "stage3", "stage4")}
    assert variables["params"]["mam3"]["mask"]["w1"].shape == (1024, 64)
    # torchvision's ResNet-50 has 25,557,032 parameters, of which 2048·1000 + 1000 are the classifier's.
    assert sum(leaf.size for leaf in jax.tree.leaves(backbone)) == 25_557_032 - 2_049_000


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float32, "f32")])
def test_gradients_are_summed_over_devices_in_the_networks_type_and_global_ones_not_again(dtype, name):
    gradients = {"conv1": {"kernel": jnp.full((2, 3), 0.1)}, "bn1": {"scale": jnp.full((5,), 0.1)}}
    gradients["classifier"] = jnp.full((7, 2), 0.1)
    # The program tells the types; its result would not, because XLA adds bfloat16 in float32 on a CPU.
    one_device = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
    everywhere = jax.sharding.PartitionSpec()
    total = jax.jit(
        jax.shard_map(
            partial(
                total_gradients,
                summed={"bn1": {"scale": ((),)}, "classifier": ((),)},
                dtype=dtype,
                axis_name="devices",
            ),
            mesh=one_device,
            in_specs=everywhere,
            out_specs=everywhere,
            check_vma=False,
        )
    )
    program = total.lower(gradients).as_text()
    sums = re.findall(r'"stablehlo.all_reduce".*?: \(tensor<(\w+)>\)', program, re.DOTALL)
    assert sums == [f"2x3x{name}"]
    found = total(gradients)
    assert found["conv1"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(found["conv1"]["kernel"], np.full((2, 3), jnp.asarray(0.1, dtype), np.float32))
    np.testing.assert_array_equal(found["bn1"]["scale"], gradients["bn1"]["scale"])
    np.testing.assert_array_equal(found["classifier"], gradients["classifier"])


def test_modality_alleviation_starts_like_the_convolutions_of_the_backbone():
    # Kaiming normal, fan-out: √(2/64), √(2/1024) after stage 3 and √(2/128), √(2/2048) after stage 4.
    network = MPANet(2, ResNet(Bottleneck, (0, 0, 1, 1)))  # of the width of ResNet-50
    params = init_variables(network, jax.random.key(3), 32, 32)["params"]
    for name, deviations in (("mam3", (0.1768, 0.0442)), ("mam4", (0.125, 0.03125))):
        for kernel, deviation in zip(("w1", "w2"), deviations, strict=True):
            found = np.asarray(params[name]["mask"][kernel])
            np.testing.assert_allclose(found.std(), deviation, rtol=0.02)
            assert abs(found.mean()) < deviation / 50
            assert abs(found).max() > 3.5 * deviation  # normal, not uniform
