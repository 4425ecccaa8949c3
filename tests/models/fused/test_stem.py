"""The stem's own convolution against PyTorch's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mpanet_jax.models.fused.resnet import stem_convolution
from tests.models.layout import from_torch, to_torch


@pytest.mark.parametrize("size", [(12, 8), (11, 8), (12, 7), (2, 2)])
def test_convolution_equals_torch(size):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        images, kernel = jnp.asarray(rng.normal(size=(2, *size, 3))), jnp.asarray(rng.normal(size=(7, 7, 3, 5)))
        theirs_kernel = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).requires_grad_()
        expected = torch.nn.functional.conv2d(to_torch(images), theirs_kernel, stride=2, padding=3)
        actual = stem_convolution(images, kernel, jnp.float64)
        np.testing.assert_allclose(actual, from_torch(expected), rtol=1e-12, atol=1e-12)
        weights = rng.normal(size=actual.shape)
        (expected * torch.tensor(weights).permute(0, 3, 1, 2)).sum().backward()
        gradient = jax.grad(lambda k: (stem_convolution(images, k, jnp.float64) * weights).sum())(kernel)
        np.testing.assert_allclose(gradient, theirs_kernel.grad.permute(2, 3, 1, 0), rtol=1e-12, atol=1e-12)
