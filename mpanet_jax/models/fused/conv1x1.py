"""A 1×1 convolution that widens, and the batch norm behind it, as one operation.

The convolution's output y = uW is never written: not for its statistics, which follow from the sums and products of the
convolution's input u, a quarter or half as wide,

    mean(y) = mean(u) W        E[y²]_j = (Wᵀ E[u uᵀ] W)_jj,

not for the normalisation, which is folded into W, and not for the gradients, which are linear in g (the gradient behind
the normalisation) and in u. These layers write two thirds of a ResNet-50's convolution outputs, and a pass over them is
what its training step is made of (docs/performance.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mpanet_jax.models.fused.batch_norm import count_positions, sum_over_devices, sum_overlapped
from mpanet_jax.models.layers import statistics_dtype

EXACT = lax.Precision.HIGHEST


def _convolution(x: Float[Array, "b h w i"], kernel: Float[Array, "i o"]) -> Float[Array, "b h w o"]:
    return lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _product(x: Float[Array, "b h w i"], kernel: Float[Array, "i o"]) -> Float[Array, "b h w o"]:
    """x·kernel. As a convolution, because cuDNN takes the additions and the ReLU behind it along; not so on the CPU."""
    return lax.platform_dependent(x, kernel, cpu=jnp.dot, default=_convolution)


def _sums(x: Float[Array, "b h w c"]) -> Float[Array, "c"]:
    return x.astype(statistics_dtype(x)).sum((0, 1, 2))


def _sums_of_products(x: Float[Array, "b h w i"], y: Float[Array, "b h w o"], precision=None) -> Float[Array, "i o"]:
    """Σ x yᵀ over all positions.

    On the CPU by images first: one long product adds position after position there, and its rounding is the largest of
    the whole network then.
    """
    options = {"precision": precision, "preferred_element_type": statistics_dtype(x)}
    return lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: jnp.einsum("bhwi,bhwo->bio", x, y, **options).sum(0),
        default=lambda x, y: jnp.tensordot(x, y, ((0, 1, 2), (0, 1, 2)), **options),
    )


def conv1x1(
    u: Float[Array, "b h w i"],
    kernel: Float[Array, "i o"],
    offset: Float[Array, "o"],
    residual: Float[Array, "b h w o"] | None,
    relu: bool,
) -> Float[Array, "b h w o"]:
    """u·kernel + residual + offset, then ReLU, in u's type."""
    y = _product(u, kernel)
    if residual is not None:
        y = y + residual
    y = y + offset.astype(u.dtype)
    return (jnp.maximum(y, 0) if relu else y).astype(u.dtype)


def _forward(u, kernel, residual, scale, bias, eps, relu, axis_name):
    count = count_positions(u, axis_name)
    sums_u = _sums(u)
    products_y = jnp.dot(_sums_of_products(u, u, EXACT), kernel, precision=EXACT)  # Σ u yᵀ
    sums_y, squares = jnp.dot(sums_u, kernel, precision=EXACT), (products_y * kernel).sum(0)
    total_u, total_y, total_squares = sum_over_devices((sums_u, sums_y, squares), axis_name)
    mean_u, mean = total_u / count, total_y / count
    variance = jnp.maximum(total_squares / count - mean * mean, 0)
    inverse_deviation = lax.rsqrt(variance + eps)
    folded = (kernel * (inverse_deviation * scale)).astype(u.dtype)
    # Of the rounded kernel: then the mean of the result is the bias, up to the rounding of the offset.
    offset = bias - jnp.dot(mean_u, folded.astype(mean.dtype), precision=EXACT)
    # Without the barrier XLA computes a block's output again, from all earlier blocks, wherever it is read.
    y = lax.optimization_barrier(conv1x1(u, folded, offset, residual, relu))
    saved = (u, kernel, scale, mean, inverse_deviation, mean_u, sums_u, products_y, y if relu else None)
    return (y, mean, variance), (saved, residual is not None)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def conv1x1_batch_norm(
    u: Float[Array, "b h w i"],
    kernel: Float[Array, "i o"],
    residual: Float[Array, "b h w o"] | None,
    scale: Float[Array, "o"],
    bias: Float[Array, "o"],
    eps: float,
    relu: bool,
    axis_name: str | None,
) -> tuple[Float[Array, "b h w o"], Float[Array, "o"], Float[Array, "o"]]:
    """Training-mode batch norm of u·kernel, then `+ residual`, then ReLU.

    Args:
      u: the statistics are taken over all axes but the last and over the devices of `axis_name`.
      kernel: of the 1×1 convolution, in the type of the statistics.
      residual: added after the normalisation; None for none.
      scale, bias, eps, relu, axis_name: as for `batch_norm`. The gradient of the kernel is this device's part.

    Returns:
      The result in u's type, and mean and *biased* variance of u·kernel in float32, through which no gradient flows.
    """
    return _forward(u, kernel, residual, scale, bias, eps, relu, axis_name)[0]


def _backward(eps, relu, axis_name, saved, cotangents):
    (u, kernel, scale, mean, inverse_deviation, mean_u, sums_u, products_y, y), has_residual = saved
    g = cotangents[0]
    if relu:
        # Read by three products and sums and by the shortcut: the barrier has it written once.
        g = lax.optimization_barrier(jnp.where(y > 0, g, 0))
    factor = scale * inverse_deviation
    a = (kernel * factor).astype(u.dtype).T
    # With ŷ = (y − mean)·inverse_deviation, Σ g ŷ follows from Σ u gᵀ, because y is linear in u. Of this device's part:
    sums_g = _sums(g)
    if u.dtype == mean.dtype:
        # A GPU cuts float32 off to TF32 for the product: one-sided errors, which would grow with the mean of u.
        products_g = _sums_of_products(u - mean_u, g) + mean_u[:, None] * sums_g
    else:  # products of bfloat16 are exact in float32
        products_g = _sums_of_products(u, g)
    sums_g_y = ((products_g * kernel).sum(0) - mean * sums_g) * inverse_deviation
    (d_bias, d_scale), g_a = sum_overlapped((sums_g, sums_g_y), jnp.dot(g, a), axis_name)
    count = count_positions(u, axis_name)
    mean_g, slope = d_bias / count, d_scale / count * inverse_deviation

    # dy = factor·(g − mean_g − slope·(y − mean)). So for the kernel …
    d_kernel = factor * (products_g - sums_u[:, None] * (mean_g - slope * mean) - products_y * slope)
    # … and for u: (g − mean_g) a − (u − mean_u) b with a = (kernel·factor)ᵀ and b = kernel·slope a.
    b = jnp.dot((kernel * slope).astype(u.dtype), a)
    mean_part = jnp.dot(mean_u, b.astype(mean.dtype), precision=EXACT)
    mean_part -= jnp.dot(mean_g, a.astype(mean.dtype), precision=EXACT)
    d_u = _product(u, -b) + g_a + mean_part.astype(u.dtype)
    return d_u, d_kernel, g if has_residual else None, d_scale, d_bias


conv1x1_batch_norm.defvjp(_forward, _backward)
