"""ResNet's stem: 7×7 convolution with stride 2, batch norm, ReLU, 3×3 max-pool with stride 2.

Both operations are torchvision's. They are computed in another way than `nn.Conv` and `nn.max_pool` do, because the
stem works on the largest arrays with the fewest channels, where the library calls waste most (docs/performance.md).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.normalization import BatchNorm, statistics_dtype
from mpanet_jax.models.resnet import kaiming_fan_out

# The nine places of a 3×3 window in PyTorch's order: of equal maxima the first takes the gradient.
TAPS = [(row, column) for row in range(3) for column in range(3)]


def stem_convolution(
    images: Float[Array, "b h w 3"], kernel: Float[Array, "7 7 3 c"], dtype: DTypeLike
) -> Float[Array, "b h2 w2 c"]:
    """The 7×7 convolution with stride 2 and padding 3, in `dtype`.

    For even sizes it is computed as a 4×4 convolution with stride 1 over 2×2 blocks of pixels: 12 channels, filled up
    to 16, instead of 3. The kernel gets a first row and a first column of zeros, so that its 8×8 taps are 4×4 blocks.
    """
    batch, height, width, _ = images.shape
    images, kernel = images.astype(dtype), kernel.astype(dtype)
    layout = ("NHWC", "HWIO", "NHWC")
    if height % 2 or width % 2:
        return lax.conv_general_dilated(images, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=layout)
    blocks = images.reshape(batch, height // 2, 2, width // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(batch, height // 2, width // 2, 12)
    taps = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, 3, -1).transpose(0, 2, 1, 3, 4, 5)
    taps = taps.reshape(4, 4, 12, -1)
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, 0), (0, 4)))
    taps = jnp.pad(taps, ((0, 0), (0, 0), (0, 4), (0, 0)))
    # Output row i reads the pixel rows 2i−4 … 2i+3, the first of them with weight 0: blocks i−2 … i+1.
    return lax.conv_general_dilated(blocks, taps, (1, 1), ((2, 1), (2, 1)), dimension_numbers=layout)


@jax.custom_vjp
def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3×3 max-pool with stride 2 and padding 1. The backward pass gathers, where XLA's own one scatters."""
    return _max_pool_forward(x)[0]


def _max_pool_forward(x):
    height, width = x.shape[1:3]
    rows, columns = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    windows = [padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i, j in TAPS]
    largest, place = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for tap, candidate in enumerate(windows[1:], start=1):
        larger = candidate > largest
        largest = jnp.where(larger, candidate, largest)
        place = jnp.where(larger, jnp.uint8(tap), place)
    # The input's size travels in the shape of an array without elements.
    return largest, (place, jnp.empty((0, height, width)))


def _windows_over(size: int, windows: int, second: int) -> tuple[Array, Array, Array]:
    """Which window covers each of `size` positions, at which of its three taps, and whether there is one.

    Odd positions lie in two windows: `second` = 0 names the later one, 1 the earlier; even positions lie in one.
    """
    position = jnp.arange(size)
    odd = position % 2
    window = (position + 1) // 2 - second * odd
    exists = (window < windows) & ((odd == 1) | (second == 0))
    return jnp.minimum(window, windows - 1), position + 1 - 2 * window, exists


def _max_pool_backward(saved, dy):
    place, size = saved
    height, width = size.shape[1:]
    total = 0
    for second_row in (0, 1):
        rows, row_taps, row_exists = _windows_over(height, dy.shape[1], second_row)
        for second_column in (0, 1):
            columns, column_taps, column_exists = _windows_over(width, dy.shape[2], second_column)
            tap = (3 * row_taps[:, None] + column_taps).astype(jnp.uint8)[..., None]
            exists = (row_exists[:, None] & column_exists)[..., None]
            chosen = exists & (place[:, rows][:, :, columns] == tap)
            total += jnp.where(chosen, dy[:, rows][:, :, columns], 0).astype(statistics_dtype(dy))
    # Read by the two passes of batch norm's backward pass: the barrier keeps it from being gathered twice.
    return (lax.optimization_barrier(total.astype(dy.dtype)),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


class StemConvolution(nn.Module):
    """The parameter of `stem_convolution`, stored as the 7×7 kernel that ResNet-50 files hold."""

    width: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        kernel = self.param("kernel", kaiming_fan_out, (7, 7, 3, self.width), self.param_dtype)
        return stem_convolution(images, kernel, self.dtype)


class Stem(nn.Module):
    """From images to a quarter of their resolution and `width` channels."""

    width: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b h4 w4 c"]:
        x = StemConvolution(self.width, self.dtype, self.param_dtype, name="conv1")(images)
        norm = BatchNorm(relu=True, axis_name=self.axis_name, param_dtype=self.param_dtype, name="bn1")
        # The barrier keeps the nine reads of a window from computing batch norm nine times.
        return max_pool(lax.optimization_barrier(norm(x, train=train)))
