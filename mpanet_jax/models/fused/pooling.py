"""3×3 max-pool with stride 2 and padding 1, alone and as one operation with the batch norm and ReLU before it.

The backward pass gathers, while XLA's own one scatters, which is slow. As in PyTorch, the first of several equal maxima
takes the gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from mpanet_jax.models.fused.batch_norm import (
    batch_statistics,
    channel_sums,
    input_gradient,
    sum_over_devices,
)
from mpanet_jax.models.layers import statistics_dtype

# The nine places of a 3×3 window, in PyTorch's order.
TAPS = [(row, column) for row in range(3) for column in range(3)]


def max_pool_with_places(
    x: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b h2 w2 c"], UInt8[Array, "b h2 w2 c"]]:
    """The maximum of every window, and its place in the window: an index into `TAPS`."""
    height, width = x.shape[1:3]
    rows, columns = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    windows = [padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i, j in TAPS]
    largest, place = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for tap, candidate in enumerate(windows[1:], start=1):
        larger = candidate > largest
        largest = jnp.where(larger, candidate, largest)
        place = jnp.where(larger, jnp.uint8(tap), place)
    return largest, place


def max_unpool(
    place: UInt8[Array, "b h2 w2 c"], values: Float[Array, "b h2 w2 c"], height: int, width: int
) -> Float[Array, "b {height} {width} c"]:
    """The transpose of max-pooling: adds each window's value, in float32, to the position of the window's maximum.

    Row 2i of the result is the middle row of the windows in row i. Row 2i+1 is the last row of these windows and the
    first row of those in row i+1. The same holds for columns.

    Args:
      place: of the maxima, from `max_pool_with_places`.
      values: one for each window.
      height, width: of the pooled array.
    """
    batch, rows, columns, channels = place.shape
    odd_row = jnp.arange(2, dtype=jnp.uint8).reshape(1, 1, 2, 1, 1, 1)
    odd_column = odd_row.reshape(1, 1, 1, 1, 2, 1)
    total = 0
    for next_row in (0, 1):
        for next_column in (0, 1):
            # The windows (i + next_row, j + next_column); beyond the last one the value is 0.
            ahead = ((0, 0), (0, next_row), (0, next_column), (0, 0))
            place_there, value_there = (
                jnp.pad(a[:, next_row:, next_column:], ahead)[:, :, None, :, None] for a in (place, values)
            )
            row_tap, column_tap = (1 - next_row) * (1 + odd_row), (1 - next_column) * (1 + odd_column)
            covers = (odd_row >= next_row) & (odd_column >= next_column)
            chosen = covers & (place_there == 3 * row_tap + column_tap)
            total += jnp.where(chosen, value_there, 0).astype(statistics_dtype(values))
    return total.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3×3 max-pool with stride 2 and padding 1. Only for evaluation: its gradient is a slow scatter."""
    return max_pool_with_places(x)[0]


def _forward(x, scale, bias, eps, axis_name):
    mean, variance = batch_statistics(x, axis_name)
    inverse_deviation = lax.rsqrt(variance + eps)
    # Batch norm is monotonic: a window's largest y comes from its largest x, or where the scale is negative from its
    # smallest. Only these are normalised.
    sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
    chosen, place = max_pool_with_places(x * sign)
    chosen *= sign
    y = jnp.maximum((chosen.astype(mean.dtype) - mean) * (inverse_deviation * scale) + bias, 0)
    return (y.astype(x.dtype), mean, variance), (x, chosen, place, mean, inverse_deviation, scale, bias)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_and_pool(
    x: Float[Array, "b h w c"], scale: Float[Array, "c"], bias: Float[Array, "c"], eps: float, axis_name: str | None
) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "c"], Float[Array, "c"]]:
    """Training-mode batch norm, ReLU and 3×3 max-pool.

    The normalised array, four times as large as the result, is never stored, and the sums of the backward pass run only
    over the chosen positions, as the gradient is 0 at all others. Where the scale is 0, or too small to change the
    bias, all entries of a window are equal after batch norm; then the largest x takes the gradient, not the first.

    Args:
      x: the convolution's output.
      scale, bias, eps, axis_name: as for `batch_norm`.

    Returns:
      The result in x's type, and the batch's mean and *biased* variance in float32, through which no gradient flows.
    """
    return _forward(x, scale, bias, eps, axis_name)[0]


def _backward(eps, axis_name, saved, cotangents):
    x, chosen, place, mean, inverse_deviation, scale, bias = saved
    centred = chosen.astype(mean.dtype) - mean
    gradient = jnp.where(centred * (inverse_deviation * scale) + bias > 0, cotangents[0], 0)
    wide = gradient.astype(mean.dtype)
    d_bias, d_scale = sum_over_devices(channel_sums(wide, wide * (centred * inverse_deviation)), axis_name)
    unpooled = max_unpool(place, gradient, *x.shape[1:3])
    dx = input_gradient(x, unpooled, (d_bias, d_scale), mean, inverse_deviation, scale, axis_name)
    return dx, d_scale, d_bias


normalize_and_pool.defvjp(_forward, _backward)
