"""The split of a block's input between its first convolution and the projected shortcut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpanet_jax.models.fused.resnet import with_strided


def plainly(x, stride):
    return x, x[:, ::stride, ::stride]


def gradient(split, x, stride, of_parts):
    return jax.vjp(partial(split, stride=stride), x)[1](of_parts)[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(12, 8), (11, 8), (12, 7), (5, 3), (1, 2)])
def test_gradient_is_that_of_slicing_to_the_bit(size, stride, dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(rng.normal(size=(2, *size, 5)), dtype)
        parts = with_strided(x, stride)
        jax.tree.map(np.testing.assert_array_equal, parts, plainly(x, stride))
        of_parts = tuple(jnp.asarray(rng.normal(size=part.shape), dtype) for part in parts)
        found, expected = (gradient(split, x, stride, of_parts) for split in (with_strided, plainly))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found[:, ::stride, ::stride], of_parts[0][:, ::stride, ::stride] + of_parts[1])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_barrier_keeps_the_gradient_of_the_whole_apart(stride):
    x = jnp.zeros((2, 6, 4, 5))

    jaxpr = jax.make_jaxpr(partial(gradient, with_strided, x, stride))(plainly(x, stride)).jaxpr
    (barrier,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "optimization_barrier")
    assert barrier.invars == jaxpr.invars[:1]
    (added,) = (equation for equation in jaxpr.eqns if barrier.outvars[0] in equation.invars)
    assert added.primitive.name in ("add", "add_any") and added.outvars == jaxpr.outvars
