"""The max-pool, alone and with batch norm and ReLU in front, against PyTorch's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mpanet_jax.models.fused.pooling import max_pool, normalize_and_pool
from tests.models.layout import from_torch, to_torch


def outputs_and_gradients(function, weights):
    """In one program: the gradients of the first output's weighted sum by all arguments, and the outputs."""

    def weighted(*arrays):
        outputs = function(*arrays)
        return (outputs[0] * weights).sum(), outputs

    return jax.jit(lambda *arrays: jax.grad(weighted, tuple(range(len(arrays))), has_aux=True)(*arrays))


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
        weights = rng.normal(size=from_torch(expected).shape)
        (expected * torch.tensor(weights).permute(0, 3, 1, 2)).sum().backward()
        gradient, found = outputs_and_gradients(lambda v: (max_pool(v),), weights)(x)
        np.testing.assert_array_equal(found[0], from_torch(expected))
        gradient = gradient[0]
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
        weights = rng.normal(size=from_torch(expected).shape)
        gradients, (actual, mean, variance) = outputs_and_gradients(
            lambda *arrays: normalize_and_pool(*arrays, 1e-5, None), weights
        )(x, scale, bias)
        np.testing.assert_allclose(actual, from_torch(expected), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(variance, x.var((0, 1, 2)), rtol=1e-10)
        (expected * torch.tensor(weights).permute(0, 3, 1, 2)).sum().backward()
        wanted = (from_torch(inputs.grad), norm.weight.grad.numpy(), norm.bias.grad.numpy())
        for actual, expected in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)
