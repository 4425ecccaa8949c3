"""ResNet-50 as torchvision defines it (v1.5: the stride sits on the 3×3 convolution), NHWC."""

from functools import partial

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.normalization import BatchNorm

# torchvision's initialisation of every convolution when no weights are loaded.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class PointwiseKernel(nn.Module):
    """The parameter of a 1×1 convolution that `BatchNorm` does together with the normalisation."""

    width: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "c o"]:
        return self.param("kernel", kaiming_fan_out, (1, 1, x.shape[-1], self.width), self.param_dtype)[0, 0]


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
        conv = partial(
            nn.Conv, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=kaiming_fan_out
        )
        norm = partial(BatchNorm, axis_name=self.axis_name, param_dtype=self.param_dtype)
        out = 4 * self.width
        strides = (self.stride, self.stride)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != out:
            shortcut = x[:, :: self.stride, :: self.stride]
            kernel = PointwiseKernel(out, self.param_dtype, name="downsample_conv")(shortcut)
            shortcut = norm(name="downsample_bn")(shortcut, train=train, kernel=kernel)
        y = conv(self.width, (1, 1), padding=0, name="conv1")(x)
        y = norm(relu=True, name="bn1")(y, train=train)
        y = conv(self.width, (3, 3), strides, padding=1, name="conv2")(y)
        y = norm(relu=True, name="bn2")(y, train=train)
        kernel = PointwiseKernel(out, self.param_dtype, name="conv3")(y)
        return norm(relu=True, name="bn3")(y, train=train, kernel=kernel, residual=shortcut)


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
