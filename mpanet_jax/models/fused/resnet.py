"""The fused forms of the stem and the bottleneck: convolutions with the batch norms, ReLUs and shortcuts after them."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.fused.batch_norm import batch_norm, count_positions
from mpanet_jax.models.fused.conv1x1 import conv1x1, conv1x1_batch_norm
from mpanet_jax.models.fused.normalization import FusedBatchNorm
from mpanet_jax.models.fused.pooling import max_pool, normalize_and_pool
from mpanet_jax.models.layers import kaiming_fan_out
from mpanet_jax.models.resnet import Bottleneck, Stem


class Kernel(nn.Module):
    """The kernel of a size × size convolution from `channels` to `width` channels. It does not convolve."""

    size: int
    width: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, channels: int) -> Float[Array, "s s c o"]:
        return self.param("kernel", kaiming_fan_out, (self.size, self.size, channels, self.width), self.param_dtype)


def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "s s c o"], stride: int = 1) -> Float[Array, "b h2 w2 o"]:
    """A convolution without bias, with padding s // 2 as in torchvision's ResNet."""
    padding = len(kernel) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def add_and_relu(convolved: Float[Array, "b h w c"], offset: Float[Array, "c"]) -> Float[Array, "b h w c"]:
    """Adds an offset and applies the ReLU; cuDNN does both within the convolution."""
    return jnp.maximum(convolved + offset.astype(convolved.dtype), 0)


def stem_convolution(
    images: Float[Array, "b h w 3"], kernel: Float[Array, "7 7 3 c"], dtype: DTypeLike
) -> Float[Array, "b h2 w2 c"]:
    """The 7×7 convolution with stride 2 and padding 3, in `dtype`.

    For images of even height and width it is computed as a 4×4 convolution with stride 1 over 2×2 blocks of pixels; a
    fourth channel of zeros gives these 16 channels. The kernel gets a first row and a first column of zeros, so that
    its 8×8 taps are 4×4 blocks.
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
    # Output row i reads pixel rows 2i−4 … 2i+3, the first with weight 0: these are blocks i−2 … i+1.
    return lax.conv_general_dilated(blocks, taps, (1, 1), ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def fused_stem(module: Stem, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b h4 w4 c"]:
    """The fused form of `Stem`: the normalised array, the largest of the network, is never stored."""
    kernel = Kernel(7, module.width, module.param_dtype, name="conv1")(images.shape[-1])
    norm = FusedBatchNorm(axis_name=module.axis_name, param_dtype=module.param_dtype, name="bn1")

    def by_batch(scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        x = stem_convolution(images, kernel, module.dtype)
        return normalize_and_pool(x, scale, bias, norm.eps, module.axis_name)

    def by_running(mean: Array, factor: Array, bias: Array) -> Array:
        y = stem_convolution(images, kernel * factor, module.dtype)
        return max_pool(add_and_relu(y, bias - mean * factor))

    count = count_positions(images[:, ::2, ::2], module.axis_name)
    return norm(module.width, count, by_batch, by_running, train=train)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def with_strided(x: Float[Array, "b h w c"], stride: int) -> tuple[Float[Array, "b h w c"], Float[Array, "b h2 w2 c"]]:
    """x for the first convolution, and those of its positions that the shortcut's convolution reads.

    A barrier keeps that convolution's gradient apart. So the padding of the shortcut's gradient fuses into the addition
    of the two; without it, the gradient is written with its zeros, for cuDNN to read and add.
    """
    return x, x[:, ::stride, ::stride]


def _with_strided_forward(x, stride):
    return with_strided(x, stride), None


def _with_strided_backward(stride, _, cotangents):
    whole, strided = cotangents
    whole = lax.optimization_barrier(whole)
    (padded,) = jax.linear_transpose(lambda x: x[:, ::stride, ::stride], whole)(strided)
    return (whole + padded,)


with_strided.defvjp(_with_strided_forward, _with_strided_backward)


def fused_bottleneck(module: Bottleneck, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 c2"]:
    """The fused form of `Bottleneck`; `conv1x1_batch_norm` computes the 1×1 convolutions that widen."""
    axis_name, dtype, stride = module.axis_name, module.dtype, module.stride
    kernel = partial(Kernel, param_dtype=module.param_dtype)
    norm = partial(FusedBatchNorm, axis_name=axis_name, param_dtype=module.param_dtype)
    out = module.expansion * module.width

    def widen(u: Array, names: tuple[str, str], residual: Array | None) -> Array:
        """1×1 convolution and batch norm; with a residual, adds it and applies the ReLU."""
        weights, bn, relu = kernel(1, out, name=names[0])(u.shape[-1])[0, 0], norm(name=names[1]), residual is not None

        def by_running(mean: Array, factor: Array, bias: Array) -> Array:
            return conv1x1(u, (weights * factor).astype(u.dtype), bias - mean * factor, residual, relu)

        return bn(
            out,
            count_positions(u, axis_name),
            lambda scale, bias: conv1x1_batch_norm(u, weights, residual, scale, bias, bn.eps, relu, axis_name),
            by_running,
            train=train,
        )

    def narrow(
        x: Array, weights: Array, cast: Array, stride: int, name: str, next_kernel: Any = None
    ) -> tuple[Array, Any]:
        """Convolution by weights (`cast`: in dtype), batch norm, ReLU; also `next_kernel`, as `batch_norm` gives it."""
        bn, count = norm(name=name), count_positions(x[:, ::stride, ::stride], axis_name)

        def by_batch(scale: Array, bias: Array) -> tuple[Array, Array, Array]:
            nonlocal next_kernel
            convolved = convolve(x, cast, stride)
            outputs: Any = batch_norm(convolved, scale, bias, next_kernel, bn.eps, True, axis_name)  # has lost the type
            normalised, next_kernel = outputs
            return normalised

        def by_running(mean: Array, factor: Array, bias: Array) -> Array:
            y = convolve(x, (weights * factor).astype(dtype), stride)
            return add_and_relu(y, bias - mean * factor)

        return bn(module.width, count, by_batch, by_running, train=train), next_kernel

    shortcut = x
    if stride != 1 or x.shape[-1] != out:
        parts: Any = with_strided(x, stride)  # custom_vjp loses the type
        x, strided = parts
        shortcut = widen(strided, ("downsample_conv", "downsample_bn"), None)
    conv1 = kernel(1, module.width, name="conv1")(x.shape[-1])
    conv2 = kernel(3, module.width, name="conv2")(module.width)
    # conv2's gradient is computed while bn1's sums travel. bn2 has no such work: conv3's gradient is done by then.
    y, cast2 = narrow(x, conv1, conv1.astype(dtype), 1, "bn1", conv2.astype(dtype))
    y, _ = narrow(y, conv2, cast2, stride, "bn2")
    return widen(y, ("conv3", "bn3"), shortcut)
