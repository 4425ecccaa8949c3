"""ResNet-50 as torchvision defines it (v1.5: the stride sits on the 3×3 convolution), NHWC."""

from functools import partial

import flax.linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.normalization import BatchNorm

# torchvision's initialisation of every convolution when no weights are loaded.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Kernel(nn.Module):
    """The kernel of a convolution without bias, which something else carries out; x gives only its channels."""

    size: int
    width: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "s s c o"]:
        return self.param("kernel", kaiming_fan_out, (self.size, self.size, x.shape[-1], self.width), self.param_dtype)


def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "s s c o"], stride: int = 1) -> Float[Array, "b h2 w2 o"]:
    """A convolution without bias; padding s // 2 as in torchvision's ResNet."""
    padding = len(kernel) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1 with a shortcut; projects the shortcut where the shape changes.

    Attributes:
      width: channels of the 3×3 convolution; the block puts out 4·width.
      stride: of the 3×3 convolution and of the projected shortcut.
    """

    width: int
    stride: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        kernel = partial(Kernel, param_dtype=self.param_dtype)
        norm = partial(BatchNorm, axis_name=self.axis_name, param_dtype=self.param_dtype)
        out = 4 * self.width
        shortcut = x
        if self.stride != 1 or x.shape[-1] != out:
            shortcut = x[:, :: self.stride, :: self.stride]
            downsample = kernel(1, out, name="downsample_conv")(shortcut)
            shortcut = norm(name="downsample_bn")(shortcut, train=train, kernel=downsample[0, 0])
        y = convolve(x, kernel(1, self.width, name="conv1")(x).astype(self.dtype))
        conv2 = kernel(3, self.width, name="conv2")(y).astype(self.dtype)
        # Not so behind bn2: there the product with the kernel's gradient comes before the sums.
        y, conv2 = norm(relu=True, name="bn1")(y, train=train, next_kernel=conv2)
        y = convolve(y, conv2, self.stride)
        y = norm(relu=True, name="bn2")(y, train=train)
        conv3 = kernel(1, out, name="conv3")(y)
        return norm(relu=True, name="bn3")(y, train=train, kernel=conv3[0, 0], residual=shortcut)


class Stage(nn.Module):
    """`num_blocks` bottlenecks named block0, block1, …; the first one has the stride."""

    num_blocks: int
    width: int
    stride: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
        for i in range(self.num_blocks):
            stride = self.stride if i == 0 else 1
            block = Bottleneck(self.width, stride, self.dtype, self.param_dtype, self.axis_name, name=f"block{i}")
            x = block(x, train=train)
        return x
