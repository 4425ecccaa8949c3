"""Batch normalisation as PyTorch computes it, with the residual addition and the ReLU that follow it.

The forward and backward passes are written by hand because they decide the speed of the step: a ResNet is bound by
memory traffic, and this form keeps only the convolution's output, the layer's output and two vectors per channel.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def statistics_dtype(x: Array) -> jnp.dtype:
    """The type that statistics of x are computed in: float32, or float64 for float64 input."""
    return jnp.promote_types(x.dtype, jnp.float32)


def sum_over_devices(values: tuple[Array, ...], axis_name: str | None) -> tuple[Array, ...]:
    """The sums of `values` over the devices of `axis_name`, in one message; `values` on one device (axis_name None)."""
    return values if axis_name is None else lax.psum(values, axis_name)


def _sums_apart(first: Array, second: Array) -> tuple[Array, Array]:
    axes = tuple(range(first.ndim - 1))
    return first.sum(axes), second.sum(axes)


def _sums_together(first: Array, second: Array) -> tuple[Array, Array]:
    zero = jnp.zeros((), first.dtype)
    axes = tuple(range(first.ndim - 1))
    return lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)


def _channel_sums(first: Array, second: Array) -> tuple[Array, Array]:
    """The sums of both over all axes but the last.

    One reduction of two operands saves a GPU a kernel a layer; on the CPU it is slower and rounds worse than two.
    """
    return lax.platform_dependent(first, second, cpu=_sums_apart, default=_sums_together)


def _count(x: Array, axis_name: str | None) -> int:
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return x.size // x.shape[-1] * devices


def _forward(x, residual, scale, bias, eps, relu, axis_name):
    wide = x.astype(statistics_dtype(x))
    total, total_squared = sum_over_devices(_channel_sums(wide, wide * wide), axis_name)
    count = _count(x, axis_name)
    mean = total / count
    variance = jnp.maximum(total_squared / count - mean * mean, 0)
    inverse_deviation = lax.rsqrt(variance + eps)
    y = (wide - mean) * (inverse_deviation * scale) + bias
    if residual is not None:
        y = y + residual
    if relu:
        y = jnp.maximum(y, 0)
    y = y.astype(x.dtype)
    if residual is not None:
        # Without the barrier XLA computes a block's output again, from all earlier blocks, wherever it is read.
        y = lax.optimization_barrier(y)
    return y, mean, variance, inverse_deviation


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_norm(
    x: Float[Array, "*positions c"],
    residual: Float[Array, "*positions c"] | None,
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    eps: float,
    relu: bool,
    axis_name: str | None,
) -> tuple[Float[Array, "*positions c"], Float[Array, "c"], Float[Array, "c"]]:
    """Training-mode batch norm over all axes but the last, then `+ residual`, then ReLU.

    Args:
      x: any number of leading axes; the statistics are taken over them and over the devices of `axis_name`.
      residual: of x's shape, added after the normalisation; None for none.
      scale, bias: one value a channel.
      eps: added to the variance.
      relu: whether a ReLU follows.
      axis_name: the mapped axis of a multi-device step, None on one device.

    Returns:
      y in x's type, and the batch's mean and *biased* variance in float32; no gradient flows through these two.
    """
    y, mean, variance, _ = _forward(x, residual, scale, bias, eps, relu, axis_name)
    return y, mean, variance


def _batch_norm_forward(x, residual, scale, bias, eps, relu, axis_name):
    y, mean, variance, inverse_deviation = _forward(x, residual, scale, bias, eps, relu, axis_name)
    # With a residual the ReLU's mask is read back from y, which the next layer keeps anyway; without one it is computed
    # again from x, which the backward pass reads in any case.
    output = y if relu and residual is not None else None
    saved = (x, mean, inverse_deviation, scale, bias, output, residual is not None)
    return (y, mean, variance), saved


def _batch_norm_backward(eps, relu, axis_name, saved, cotangents):
    x, mean, inverse_deviation, scale, bias, y, has_residual = saved
    dy = cotangents[0]
    centred = x.astype(mean.dtype) - mean
    gradient = dy
    if relu:
        positive = y > 0 if has_residual else centred * (inverse_deviation * scale) + bias > 0
        gradient = jnp.where(positive, gradient, 0)
    if has_residual:
        # The shortcut takes this gradient too: written once, it is read by the sums and by dx instead of its parts.
        gradient = lax.optimization_barrier(gradient)
    d_residual = gradient if has_residual else None
    gradient = gradient.astype(mean.dtype)
    normalised = centred * inverse_deviation
    d_bias, d_scale = _channel_sums(gradient, gradient * normalised)
    count = _count(x, axis_name)
    total_gradient, total_product = sum_over_devices((d_bias, d_scale), axis_name)
    dx = (gradient - total_gradient / count - normalised * (total_product / count)) * (inverse_deviation * scale)
    return dx.astype(x.dtype), d_residual, d_scale, d_bias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


class BatchNorm(nn.Module):
    """BatchNorm2d / BatchNorm1d in PyTorch's conventions: the running variance is the *unbiased* one.

    Attributes:
      relu: apply a ReLU after the normalisation (and after the residual).
      use_bias: False leaves the bias out, i.e. fixes it at 0 (the BN neck).
      momentum: weight of the new batch in the running statistics.
      axis_name: the mapped axis over whose devices the statistics are taken.
      param_dtype: type of scale, bias and running statistics.
    """

    relu: bool = False
    use_bias: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "*positions c"], residual: Float[Array, "*positions c"] | None = None, *, train: bool
    ) -> Float[Array, "*positions c"]:
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        scale = self.param("scale", self.scale_init, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype) if self.use_bias else 0 * scale
        if train:
            y, mean, variance = batch_norm(x, residual, scale, bias, self.eps, self.relu, self.axis_name)
            if not self.is_initializing():
                count = _count(x, self.axis_name)
                unbiased = variance * (count / max(count - 1, 1))
                running_mean.value = (1 - self.momentum) * running_mean.value + self.momentum * mean
                running_variance.value = (1 - self.momentum) * running_variance.value + self.momentum * unbiased
            return y
        wide = x.astype(statistics_dtype(x))
        y = (wide - running_mean.value) * (lax.rsqrt(running_variance.value + self.eps) * scale) + bias
        if residual is not None:
            y = y + residual
        if self.relu:
            y = jnp.maximum(y, 0)
        return y.astype(x.dtype)
