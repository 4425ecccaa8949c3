"""Batch norm whose arithmetic is fused with its neighbours', with the parameters and statistics of the plain layer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import lax
from jaxtyping import Array, Float

from mpanet_jax.models.fused.batch_norm import batch_norm, count_positions
from mpanet_jax.models.layers import BatchNorm, mark_gradients_summed, statistics_dtype

Vector = Float[Array, "c"]
ByBatch = Callable[[Vector, Vector], tuple[Array, Vector, Vector]]
ByRunning = Callable[[Vector, Vector, Vector], Array]


def normalize_with(
    norm: BatchNorm, channels: int, count: int, by_batch: ByBatch, by_running: ByRunning, *, train: bool
) -> Array:
    """Computes a batch norm with one of two functions, and in training updates its running statistics.

    Args:
      norm: has the parameters and the running statistics.
      channels: of the array that is normalised.
      count: number of positions, on all devices together, over which the batch's statistics are taken.
      by_batch: for training, (scale, bias) → (result, mean, *biased* variance of the batch). It must give gradients of
        scale and bias that are sums over all devices.
      by_running: for evaluation, (mean, factor, bias) → result, where (x − mean)·factor + bias is the normalised array.
      train: which of the two is called.

    Returns:
      The result.
    """
    scale, bias, running_mean, running_variance = norm.variables_of(channels)
    if not train:
        return by_running(running_mean, lax.rsqrt(running_variance + norm.eps) * scale, bias)
    mark_gradients_summed(norm, *(("scale", "bias") if norm.use_bias else ("scale",)))
    result, mean, variance = by_batch(scale, bias)
    norm.update_running_statistics(mean, variance, count)
    return result


class FusedBatchNorm(BatchNorm):
    """A `BatchNorm` that is called with the arguments of `normalize_with` instead of an array."""

    @nn.compact
    def __call__(
        self, channels: int, count: int, by_batch: ByBatch, by_running: ByRunning, *, train: bool
    ) -> Float[Array, "..."]:
        return normalize_with(self, channels, count, by_batch, by_running, train=train)


def fused_batch_norm(norm: BatchNorm, x: Float[Array, "*positions c"], *, train: bool) -> Float[Array, "*positions c"]:
    """The fused form of a `BatchNorm` whose neighbours are not fused with it."""

    def by_batch(scale: Vector, bias: Vector) -> tuple[Array, Vector, Vector]:
        outputs: Any = batch_norm(x, scale, bias, None, norm.eps, False, norm.axis_name)  # custom_vjp loses the type
        return outputs[0]

    def by_running(mean: Vector, factor: Vector, bias: Vector) -> Array:
        return affine(x, mean, factor, bias)

    return normalize_with(norm, x.shape[-1], count_positions(x, norm.axis_name), by_batch, by_running, train=train)


def affine(x: Array, mean: Vector, factor: Vector, bias: Vector) -> Array:
    """(x − mean)·factor + bias, in x's type."""
    return ((x.astype(statistics_dtype(x)) - mean) * factor + bias).astype(x.dtype)
