"""The linear classifier: instead of summing its kernel's gradient, devices may gather what they compute it from."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.layers import Classifier, mark_gradients_summed, statistics_dtype, sum_gradient

# The number of classifiers on one embedding that is assumed below: MPANet's three.
CLASSIFIERS = 3


def _gather_factors(logits: Float[Array, "b n"], axis_name: str | None) -> bool:
    """Whether gathering the embeddings takes fewer bytes than summing the gradients of the classifiers' kernels.

    With N devices and b rows on each, a device receives (N − 1)·b·d elements if embeddings are gathered and
    2·(N − 1)/N·3·d·n if gradients are summed in a ring (the gradients of the logits are small). On SYSU-MM01 with 128
    images a device, gathering takes fewer bytes up to 18 devices.
    """
    num_rows, num_ids = logits.shape
    return axis_name is not None and lax.axis_size(axis_name) * num_rows < 2 * CLASSIFIERS * num_ids


def _linear_forward(embedding, kernel, dtype, axis_name):
    narrow, narrow_kernel = embedding.astype(dtype), kernel.astype(dtype)
    logits = jnp.dot(narrow, narrow_kernel, preferred_element_type=statistics_dtype(embedding))
    # Gathered here and not in the backward pass: the losses, which come next, hide the exchange.
    gather = _gather_factors(logits, axis_name)
    whole = lax.all_gather(narrow, axis_name, tiled=True) if gather else narrow
    return logits, (whole, narrow_kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(
    embedding: Float[Array, "b d"], kernel: Float[Array, "d n"], dtype: DTypeLike, axis_name: str | None = None
) -> Float[Array, "b n"]:
    """A linear classifier without bias.

    Args:
      embedding, kernel: in float32 or float64.
      dtype: the operands of this product and of the products of its gradients are rounded to it; the products are
        summed in float32 or float64.
      axis_name: the mapped axis of a multi-device step, None on one device. The kernel's gradient is of all devices'
        images: the product of their gathered embeddings and logits' gradients, or the sum (in `dtype`) of every
        device's product, whichever exchanges fewer bytes.

    Returns:
      The logits, in embedding's type.
    """
    return _linear_forward(embedding, kernel, dtype, None)[0]


def _linear_backward(dtype, axis_name, saved, gradient):
    whole, narrow_kernel = saved
    narrow = gradient.astype(dtype)
    product = partial(jnp.dot, preferred_element_type=gradient.dtype)
    d_embedding = product(narrow, narrow_kernel.T)
    if _gather_factors(gradient, axis_name):
        return d_embedding, product(whole.T, lax.all_gather(narrow, axis_name, tiled=True))
    d_kernel = product(whole.T, narrow)
    if axis_name is not None:
        d_kernel = sum_gradient(d_kernel, dtype, axis_name)
    return d_embedding, d_kernel


linear.defvjp(_linear_forward, _linear_backward)


def fused_classifier(module: Classifier, embedding: Float[Array, "b d"]) -> Float[Array, "b n"]:
    """The fused form of `Classifier`."""
    mark_gradients_summed(module, module.kernel_name)
    return linear(embedding, module.kernel(embedding), module.dtype, module.axis_name)
