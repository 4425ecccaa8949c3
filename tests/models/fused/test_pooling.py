"""The max-pool, alone and with batch norm and ReLU in front, against PyTorch's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mpanet_jax.models.fused.pooling import max_pool, normalize_and_pool
from tests.models.layout import from_torch, to_torch


@pytest.mark.parametrize("size", [(12, 8), (11, 8), (12, 7), (1, 1), (5, 3)])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_equals_torch(size, ties):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, *size, 3))
    if ties:  # few different values: most windows have several maxima, and the first has to take the gradient
        values = np.round(values)
    with jax.enable_x64(True):
        x = jnp.asarray(values)
        theirs = to_torch(x)
        expected = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
        np.testing.assert_array_equal(max_pool(x), from_torch(expected))
        weights = rng.normal(size=max_pool(x).shape)
        (expected * torch.tensor(weights).permute(0, 3, 1, 2)).sum().backward()
        gradient = jax.grad(lambda v: (max_pool(v) * weights).sum())(x)
        np.testing.assert_allclose(gradient, from_torch(theirs.grad), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [(12, 8), (11, 8), (12, 7), (1, 2)])
def test_batch_norm_and_pool_equal_torch_for_scales_of_both_signs(size):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(1, 2, size=(3, *size, 4)))
        scale, bias = jnp.asarray([1.5, -0.5, -2.0, 0.3]), jnp.asarray([0.1, 0.5, -0.3, 0.7])
        inputs, norm = to_torch(x), torch.nn.BatchNorm2d(4).double()
        norm.weight.data, norm.bias.data = torch.tensor(np.asarray(scale)), torch.tensor(np.asarray(bias))
        expected = torch.nn.functional.max_pool2d(torch.relu(norm(inputs)), 3, 2, 1)
        actual, mean, variance = normalize_and_pool(x, scale, bias, 1e-5, None)
        np.testing.assert_allclose(actual, from_torch(expected), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(variance, x.var((0, 1, 2)), rtol=1e-10)
        weights = rng.normal(size=actual.shape)
        (expected * torch.tensor(weights).permute(0, 3, 1, 2)).sum().backward()
        gradients = jax.grad(lambda *a: (normalize_and_pool(*a, 1e-5, None)[0] * weights).sum(), (0, 1, 2))(
            x, scale, bias
        )
        wanted = (from_torch(inputs.grad), norm.weight.grad.numpy(), norm.bias.grad.numpy())
        for actual, expected in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)
