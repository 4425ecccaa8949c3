"""Batch norm against PyTorch (forward, running statistics) and against autodiff of the plain formula (gradients)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mpanet_jax.models.normalization import BatchNorm, batch_norm


def test_train_and_eval_equal_torch_with_unbiased_running_variance():
    rng = np.random.default_rng(0)
    theirs = torch.nn.BatchNorm2d(5).double()
    theirs.weight.data = torch.tensor(rng.normal(size=5))
    theirs.bias.data = torch.tensor(rng.normal(size=5))
    batches = rng.normal(2.0, 3.0, size=(3, 4, 3, 2, 5))
    with jax.enable_x64(True):
        module = BatchNorm(param_dtype=jnp.float64)
        variables = {
            "params": {"scale": jnp.asarray(theirs.weight.data.numpy()), "bias": jnp.asarray(theirs.bias.data.numpy())},
            "batch_stats": {"mean": jnp.zeros(5, jnp.float64), "var": jnp.ones(5, jnp.float64)},
        }
        for batch in batches:
            expected = theirs(torch.tensor(batch).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
            actual, mutated = module.apply(variables, jnp.asarray(batch), train=True, mutable=["batch_stats"])
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
            variables |= mutated
        np.testing.assert_allclose(variables["batch_stats"]["mean"], theirs.running_mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(variables["batch_stats"]["var"], theirs.running_var.numpy(), rtol=1e-12)
        theirs.eval()
        expected = theirs(torch.tensor(batches[0]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
        actual = module.apply(variables, jnp.asarray(batches[0]), train=False)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def plain(x, residual, scale, bias, relu):
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
    y = y if residual is None else y + residual
    return jax.nn.relu(y) if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_hand_written_gradients_equal_autodiff(relu, with_residual):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(3, 4, 2, 5)))
        residual = jnp.asarray(rng.normal(size=x.shape)) if with_residual else None
        scale, bias = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
        weights = jnp.asarray(rng.normal(size=x.shape))

        def ours(*arguments):
            return (batch_norm(*arguments, 1e-5, relu, None)[0] * weights).sum()

        def expected(*arguments):
            return (plain(*arguments, relu) * weights).sum()

        arguments = (x, residual, scale, bias)
        np.testing.assert_allclose(ours(*arguments), expected(*arguments), rtol=1e-12)
        which = (0, 1, 2, 3) if with_residual else (0, 2, 3)
        for a, b in zip(jax.grad(ours, which)(*arguments), jax.grad(expected, which)(*arguments), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bfloat16_statistics_are_float32():
    # 1 + tiny steps: bfloat16 sums of 4,096 values near 1 would be off by whole percents.
    x = jnp.asarray(np.random.default_rng(2).normal(1.0, 0.1, size=(64, 8, 8, 3)), jnp.bfloat16)
    _, mean, variance = batch_norm(x, None, jnp.ones(3), jnp.zeros(3), 1e-5, False, None)
    wide = np.asarray(x, np.float64)
    assert mean.dtype == variance.dtype == jnp.float32
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, wide.var((0, 1, 2)), rtol=1e-3)


def test_no_bias_parameter_when_it_is_fixed_at_zero():
    variables = BatchNorm(use_bias=False).init(jax.random.key(0), jnp.ones((2, 3)), train=False)
    assert set(variables["params"]) == {"scale"}
