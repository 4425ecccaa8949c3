"""The fused batch norms against autodiff of the plain formula, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpanet_jax.models.fused.batch_norm import _sums_together, batch_norm, sum_overlapped
from mpanet_jax.models.fused.conv1x1 import _convolution, conv1x1, conv1x1_batch_norm
from mpanet_jax.models.layers import BatchNorm


def plain(x, scale, bias, residual=None):
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
    return y if residual is None else y + residual


def assert_same_values_and_gradients(ours, expected, arguments, seed=0):
    """Of functions of arrays; the gradients are those of a random weighted sum."""
    shape = jax.eval_shape(expected, *arguments).shape
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=shape))

    def weighted(function):
        def total(*arrays):
            values = function(*arrays)
            return (values * weights).sum(), values

        return jax.jit(jax.grad(total, tuple(range(len(arguments))), has_aux=True))

    (actual, values), (wanted, expected_values) = (weighted(f)(*arguments) for f in (ours, expected))
    np.testing.assert_allclose(values, expected_values, rtol=1e-10, atol=1e-12)
    for a, b in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("devices", "primitive"), [(2, "all_gather"), (4, "all_gather"), (8, "psum"), (16, "psum")])
def test_sums_over_devices_are_gathered_on_few_and_reduced_on_many(devices, primitive):
    rng = np.random.default_rng(0)
    values = tuple(jnp.asarray(rng.normal(size=(devices, size)), jnp.float32) for size in (3, 5))
    work = jnp.asarray(rng.normal(size=(devices, 2)), jnp.float32)

    def sums(values, work):
        return sum_overlapped(values, 2 * work, "devices")

    totals, done = jax.vmap(sums, axis_name="devices")(values, work)
    for total, value in zip(totals, values, strict=True):
        np.testing.assert_allclose(total, np.broadcast_to(np.asarray(value).sum(0), value.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(done, 2 * work)
    program = str(jax.make_jaxpr(sums, axis_env=[("devices", devices)])(tuple(v[0] for v in values), work[0]))
    assert [name for name in ("all_gather", "psum") if f"{name}[" in program or f"{name} " in program] == [primitive]


@pytest.mark.parametrize("relu", [False, True])
def test_hand_written_gradients_equal_autodiff(relu):
    rng = np.random.default_rng(1)
    activation = jax.nn.relu if relu else lambda y: y

    def ours(x, scale, bias, kernel):
        (y, _, _), kernel = batch_norm(x, scale, bias, kernel, 1e-5, relu, None)
        return y @ kernel

    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(3, 4, 2, 5))), jnp.asarray(rng.normal(size=(5, 7)))
        scale, bias = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
        assert_same_values_and_gradients(ours, lambda *a: activation(plain(*a[:3])) @ a[3], (x, scale, bias, kernel))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv1x1_batch_norm_equals_autodiff_of_convolution_and_batch_norm(relu, with_residual):
    rng = np.random.default_rng(2)
    activation = jax.nn.relu if relu else lambda y: y
    with jax.enable_x64(True):
        u, kernel = jnp.asarray(rng.normal(1, 1, size=(3, 4, 2, 5))), jnp.asarray(rng.normal(size=(5, 7)))
        scale, bias = jnp.asarray(rng.normal(size=7)), jnp.asarray(rng.normal(size=7))
        arguments = (u, kernel, scale, bias)
        if with_residual:
            arguments += (jnp.asarray(rng.normal(size=(3, 4, 2, 7))),)

        def ours(u, kernel, scale, bias, residual=None):
            return conv1x1_batch_norm(u, kernel, residual, scale, bias, 1e-5, relu, None)[0]

        def expected(u, kernel, *rest):
            return activation(plain(u @ kernel, *rest))

        assert_same_values_and_gradients(ours, expected, arguments)
        _, mean, variance = conv1x1_batch_norm(u, kernel, None, scale, bias, 1e-5, relu, None)
        np.testing.assert_allclose(mean, (u @ kernel).mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(variance, (u @ kernel).var((0, 1, 2)), rtol=1e-10)


def test_operations_of_accelerators_equal_those_of_the_cpu():
    # platform_dependent runs the others here, so these are called by name.
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        x, y = (jnp.asarray(rng.normal(size=(2, 3, 4, 5))) for _ in range(2))
        for axes in ((0, 1, 2), (1, 2)):
            for actual, values in zip(_sums_together(x, y, axes), (x, y), strict=True):
                np.testing.assert_allclose(actual, np.asarray(values).sum(axes), rtol=1e-12)
        kernel = jnp.asarray(rng.normal(size=(5, 7)))
        np.testing.assert_allclose(_convolution(x, kernel), np.asarray(x) @ np.asarray(kernel), rtol=1e-12)


def test_conv1x1_of_the_running_statistics_equals_convolution_and_batch_norm():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(2, 3, 4, 5))), jnp.asarray(rng.normal(size=(5, 7)))
        residual = jnp.asarray(rng.normal(size=(2, 3, 4, 7)))
        variables = {
            "params": {"scale": jnp.asarray(rng.normal(size=7)), "bias": jnp.asarray(rng.normal(size=7))},
            "batch_stats": {"mean": jnp.asarray(rng.normal(size=7)), "var": jnp.asarray(rng.uniform(0.5, 2, size=7))},
        }
        norm = BatchNorm(param_dtype=jnp.float64)
        expected = jax.nn.relu(norm.apply(variables, x @ kernel, train=False) + residual)
        mean, variance = variables["batch_stats"]["mean"], variables["batch_stats"]["var"]
        factor = variables["params"]["scale"] / jnp.sqrt(variance + norm.eps)
        offset = variables["params"]["bias"] - mean * factor
        actual = conv1x1(x, kernel * factor, offset, residual, True)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_conv1x1_batch_norm_in_bfloat16_keeps_mean_and_deviation():
    # The sums of 8,192 squares would be off by percents in bfloat16, and so would be a variance that is a small
    # difference of large products: here the mean is three times the deviation.
    rng = np.random.default_rng(4)
    u = jnp.asarray(np.maximum(rng.normal(1.5, 0.5, size=(64, 16, 8, 16)), 0), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    y, mean, variance = conv1x1_batch_norm(u, kernel, None, jnp.ones(64), jnp.zeros(64), 1e-5, False, None)
    exact = np.asarray(u, np.float64) @ np.asarray(kernel, np.float64)
    assert y.dtype == jnp.bfloat16 and mean.dtype == variance.dtype == jnp.float32
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), rtol=1e-3)
    y = np.asarray(y, np.float64)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=0.01)
    # The offset is added in bfloat16: half a unit in its last place is all that the mean may be off.
    offset = np.abs(exact.mean((0, 1, 2)) / exact.std((0, 1, 2)))
    assert (np.abs(y.mean((0, 1, 2))) <= offset * 2**-8 + 1e-3).all()


def test_bfloat16_statistics_are_float32():
    # 1 + tiny steps: bfloat16 sums of 4,096 values near 1 would be off by whole percents.
    x = jnp.asarray(np.random.default_rng(2).normal(1.0, 0.1, size=(64, 8, 8, 3)), jnp.bfloat16)
    (_, mean, variance), _ = batch_norm(x, jnp.ones(3), jnp.zeros(3), None, 1e-5, False, None)
    wide = np.asarray(x, np.float64)
    assert mean.dtype == variance.dtype == jnp.float32
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, wide.var((0, 1, 2)), rtol=1e-3)
