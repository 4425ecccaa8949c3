"""Training-mode batch normalisation with the ReLU that follows it, and functions that other fused forms share.

A ResNet's speed is bound by memory traffic, so the forward and backward passes are written by hand. This form stores
only the convolution's output, the layer's output and two vectors with a value a channel. Two other forms store less:
`conv1x1.py`, for 1×1 convolutions that widen, not the convolution's output; `pooling.py`, for the stem, not the
normalised array.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mpanet_jax.models.layers import statistics_dtype

PSUM_FROM = 8  # devices; a gather was measured to be faster on two and on four


def sum_over_devices(values: tuple[Array, ...], axis_name: str | None) -> tuple[Array, ...]:
    """Sums vectors over the devices of `axis_name`, all in one message; with axis_name None, returns them as they are.

    On fewer than `PSUM_FROM` devices the vectors are gathered and added instead of summed by `psum`: a step makes about
    a hundred such sums, the latency of each is all that it costs, and for vectors this short a gather has less of it
    (docs/performance.md). But each device receives the vectors of all others, so its cost grows with their number.
    """
    return sum_overlapped(values, None, axis_name)[0]


def sum_overlapped(values: tuple[Array, ...], work: Any, axis_name: str | None) -> tuple[tuple[Array, ...], Any]:
    """`sum_over_devices(values)`, and has the device compute `work` while the sums travel.

    XLA would compute `work` at the end of the step, and the device would idle until the sums arrive. Therefore
    everything that uses the sums is made to wait for `work` too.

    Args:
      values: vectors to sum.
      work: arrays to compute that do not depend on the sums, or None.
      axis_name: the mapped axis of a multi-device step, None on one device.

    Returns:
      The sums, and `work`.
    """
    if axis_name is None:
        return values, work
    joined = jnp.concatenate(values)
    gather = lax.axis_size(axis_name) < PSUM_FROM
    received = lax.all_gather(joined, axis_name) if gather else lax.psum(joined, axis_name)
    if work is not None:
        received, work = lax.optimization_barrier((received, work))
    totals = received.sum(0) if gather else received
    return tuple(jnp.split(totals, np.cumsum([value.size for value in values[:-1]]))), work


def _sums_apart(first: Array, second: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    return first.sum(axes), second.sum(axes)


def _sums_together(first: Array, second: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    zero = jnp.zeros((), first.dtype)
    return lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)


def two_sums(first: Array, second: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The sums of both arrays over `axes`.

    On a GPU one reduction of two operands saves a kernel and a pass. On the CPU it is slower and rounds worse than two
    reductions, and elsewhere it was not measured.
    """
    together = partial(_sums_together, axes=axes)
    return lax.platform_dependent(first, second, cuda=together, rocm=together, default=partial(_sums_apart, axes=axes))


def channel_sums(first: Array, second: Array) -> tuple[Array, Array]:
    """The sums of both arrays over all axes but the last."""
    return two_sums(first, second, tuple(range(first.ndim - 1)))


def count_positions(x: Array, axis_name: str | None) -> int:
    """The number of positions, on all devices together, over which the statistics of x are taken."""
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return x.size // x.shape[-1] * devices


def batch_statistics(x: Float[Array, "*positions c"], axis_name: str | None) -> tuple[Array, Array]:
    """Mean and *biased* variance of each channel over all positions of all devices, in float32."""
    wide = x.astype(statistics_dtype(x))
    total, total_squared = sum_over_devices(channel_sums(wide, wide * wide), axis_name)
    count = count_positions(x, axis_name)
    mean = total / count
    return mean, jnp.maximum(total_squared / count - mean * mean, 0)


def input_gradient(
    x: Float[Array, "*positions c"],
    gradient: Float[Array, "*positions c"],
    totals: tuple[Array, Array],
    mean: Float[Array, "c"],
    inverse_deviation: Float[Array, "c"],
    scale: Float[Array, "c"],
    axis_name: str | None,
) -> Float[Array, "*positions c"]:
    """The gradient of batch norm's input.

    Args:
      x: the input; x̂ is x normalised.
      gradient: of batch norm's output.
      totals: Σ gradient and Σ gradient·x̂ of each channel over all devices, which are the gradients of bias and scale.
      mean, inverse_deviation: of the batch, by channel.
      scale: of the layer.
      axis_name: the mapped axis of a multi-device step, None on one device.

    Returns:
      The gradient of x, in x's type.
    """
    total_gradient, total_product = totals
    count = count_positions(x, axis_name)
    normalised = (x.astype(mean.dtype) - mean) * inverse_deviation
    dx = (gradient - total_gradient / count - normalised * (total_product / count)) * (inverse_deviation * scale)
    return dx.astype(x.dtype)


@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _forward(x, scale, bias, eps, relu, axis_name):
    mean, variance = batch_statistics(x, axis_name)
    inverse_deviation = lax.rsqrt(variance + eps)
    y = (x.astype(mean.dtype) - mean) * (inverse_deviation * scale) + bias
    if relu:
        y = jnp.maximum(y, 0)
    return (y.astype(x.dtype), mean, variance), (x, mean, inverse_deviation, scale, bias)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_norm(
    x: Float[Array, "*positions c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    next_kernel: Array | None,
    eps: float,
    relu: bool,
    axis_name: str | None,
) -> tuple[tuple[Float[Array, "*positions c"], Float[Array, "c"], Float[Array, "c"]], Array | None]:
    """Training-mode batch norm over all axes but the last, then ReLU.

    Args:
      x: any number of leading axes; the statistics are taken over them and over the devices of `axis_name`.
      scale, bias: one value a channel. Their gradients are sums over all devices.
      next_kernel: the kernel of the convolution that follows, or None. It is returned unchanged, so that the backward
        pass computes its gradient while the devices exchange their sums.
      eps: added to the variance.
      relu: whether a ReLU follows.
      axis_name: the mapped axis of a multi-device step, None on one device.

    Returns:
      (y, mean, variance), next_kernel: y in x's type; the batch's mean and *biased* variance in float32, through which
      no gradient flows; and the kernel, which the convolution must take from here.
    """
    return _forward(x, scale, bias, eps, relu, axis_name)[0], next_kernel


def _forward_with_kernel(x, scale, bias, next_kernel, eps, relu, axis_name):
    outputs, saved = _forward(x, scale, bias, eps, relu, axis_name)
    return (outputs, next_kernel), saved


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _backward(eps, relu, axis_name, saved, cotangents):
    x, mean, inverse_deviation, scale, bias = saved
    (gradient, *_), d_next_kernel = cotangents
    centred = x.astype(mean.dtype) - mean
    if relu:
        # The ReLU's mask is computed from x, which is read anyway, and not from y.
        gradient = jnp.where(centred * (inverse_deviation * scale) + bias > 0, gradient, 0)
    gradient = gradient.astype(mean.dtype)
    sums = channel_sums(gradient, gradient * (centred * inverse_deviation))
    (d_bias, d_scale), d_next_kernel = sum_overlapped(sums, d_next_kernel, axis_name)
    dx = input_gradient(x, gradient, (d_bias, d_scale), mean, inverse_deviation, scale, axis_name)
    return dx, d_scale, d_bias, d_next_kernel


batch_norm.defvjp(_forward_with_kernel, _backward)
