"""The shared layers against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mpanet_jax.models.layers import BatchNorm


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


def test_no_bias_parameter_when_it_is_fixed_at_zero():
    variables = BatchNorm(use_bias=False).init(jax.random.key(0), jnp.ones((2, 3)), train=False)
    assert set(variables["params"]) == {"scale"}
