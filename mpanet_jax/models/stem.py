"""ResNet's stem: 7×7 convolution with stride 2, batch norm, ReLU, 3×3 max-pool with stride 2.

All are torchvision's. They are computed in another way than `nn.Conv` and `nn.max_pool` do, because the stem works on
the largest arrays with the fewest channels, where the library calls waste most (docs/performance.md).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.normalization import BatchNorm
from mpanet_jax.models.resnet import Kernel, convolve


def stem_convolution(
    images: Float[Array, "b h w 3"], kernel: Float[Array, "7 7 3 c"], dtype: DTypeLike
) -> Float[Array, "b h2 w2 c"]:
    """The 7×7 convolution with stride 2 and padding 3, in `dtype`.

    For even sizes it is computed as a 4×4 convolution with stride 1 over 2×2 blocks of pixels: with a fourth channel of
    zeros that makes 16 channels instead of 3. The kernel gets a first row and a first column of zeros, so that its 8×8
    taps are 4×4 blocks.
    """
    batch, height, width, _ = images.shape
    images, kernel = images.astype(dtype), kernel.astype(dtype)
    if height % 2 or width % 2:
        return convolve(images, kernel, 2)
    images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)))
    blocks = images.reshape(batch, height // 2, 2, width // 2, 2, 4).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(batch, height // 2, width // 2, 16)
    taps = jnp.pad(kernel, ((1, 0), (1, 0), (0, 1), (0, 0))).reshape(4, 2, 4, 2, 4, -1).transpose(0, 2, 1, 3, 4, 5)
    taps = taps.reshape(4, 4, 16, -1)
    # Output row i reads the pixel rows 2i−4 … 2i+3, the first of them with weight 0: blocks i−2 … i+1.
    return lax.conv_general_dilated(blocks, taps, (1, 1), ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Stem(nn.Module):
    """From images to a quarter of their resolution and `width` channels."""

    width: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b h4 w4 c"]:
        kernel = Kernel(7, self.width, self.param_dtype, name="conv1")(images)
        x = stem_convolution(images, kernel, self.dtype)
        norm = BatchNorm(relu=True, axis_name=self.axis_name, param_dtype=self.param_dtype, name="bn1")
        return norm(x, train=train, pool=True)
