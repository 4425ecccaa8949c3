"""A 1×1 convolution that widens, and the batch norm after it, as one operation.

The output y = uW of the convolution is never stored. Its statistics follow from the convolution's input u, which has a
quarter or half as many channels:

    mean(y) = mean(u) W        E[y²]_j = (Wᵀ E[u uᵀ] W)_jj

The normalisation is folded into W, and the gradients are linear in u and in g, the gradient of the normalised array. In
a ResNet-50 these layers have two thirds of all convolution outputs, and passes over convolution outputs are what limits
the training step (docs/performance.md).
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
    """x·kernel; off the CPU as a convolution, for cuDNN then does the additions and the ReLU after it in one pass."""
    return lax.platform_dependent(x, kernel, cpu=jnp.dot, default=_convolution)


def _sums(x: Float[Array, "b h w c"]) -> Float[Array, "c"]:
    return x.astype(statistics_dtype(x)).sum((0, 1, 2))


def _sums_of_products(x: Float[Array, "b h w i"], y: Float[Array, "b h w o"], precision=None) -> Float[Array, "i o"]:
    """Σ x yᵀ over all positions.

    On the CPU one long product would add position after position, with the largest rounding error of the whole network;
    there each image has its own sum.
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
    """The 1×1 convolution of u, plus residual (None: none) and offset, then with `relu` the ReLU; in u's type."""
    y = _product(u, kernel)
    if residual is not None:
        y = y + residual
    y = y + offset.astype(u.dtype)
    return (jnp.maximum(y, 0) if relu else y).astype(u.dtype)


@partial(jax.jit, static_argnums=(5, 6, 7), inline=True)
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
    # From the rounded kernel, so that the mean of the result is the bias up to the rounding of the offset.
    offset = bias - jnp.dot(mean_u, folded.astype(mean.dtype), precision=EXACT)
    # Without the barrier XLA recomputes a block's output, from all earlier blocks, wherever it is read.
    y = lax.optimization_barrier(conv1x1(u, folded, offset, residual, relu))
    saved = (u, kernel, scale, mean, inverse_deviation, mean_u, sums_u, products_y, y if relu else None)
    return (y, mean, variance), (saved, None if residual is None else ())


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
      u: the convolution's input. The statistics are taken over all axes but the last and over the devices of
        `axis_name`.
      kernel: of the 1×1 convolution, in float32 or float64. Its gradient is this device's part, not the sum.
      residual: added after the normalisation; None for none.
      scale, bias, eps, relu, axis_name: as for `batch_norm`.

    Returns:
      The result in u's type, and mean and *biased* variance of u·kernel in float32, through which no gradient flows.
    """
    return _forward(u, kernel, residual, scale, bias, eps, relu, axis_name)[0]


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _backward(eps, relu, axis_name, saved, cotangents):
    (u, kernel, scale, mean, inverse_deviation, mean_u, sums_u, products_y, y), residual = saved
    g = cotangents[0]
    if relu:
        # Three products and sums and the shortcut read g; the barrier makes XLA store it once.
        g = lax.optimization_barrier(jnp.where(y > 0, g, 0))
    factor = scale * inverse_deviation
    a = (kernel * factor).astype(u.dtype).T
    # y is linear in u, so Σ g ŷ, with ŷ = (y − mean)·inverse_deviation, follows from Σ u gᵀ. This device's part:
    sums_g = _sums(g)
    if u.dtype == mean.dtype:
        # For the product a GPU truncates float32 to TF32; these one-sided errors would grow with the mean of u.
        products_g = _sums_of_products(u - mean_u, g) + mean_u[:, None] * sums_g
    else:  # products of bfloat16 are exact in float32
        products_g = _sums_of_products(u, g)
    sums_g_y = ((products_g * kernel).sum(0) - mean * sums_g) * inverse_deviation
    (d_bias, d_scale), g_a = sum_overlapped((sums_g, sums_g_y), jnp.dot(g, a), axis_name)
    count = count_positions(u, axis_name)
    mean_g, slope = d_bias / count, d_scale / count * inverse_deviation

    # dy = factor·(g − mean_g − slope·(y − mean)), which gives the kernel's gradient …
    d_kernel = factor * (products_g - sums_u[:, None] * (mean_g - slope * mean) - products_y * slope)
    # … and u's: (g − mean_g) a − (u − mean_u) b with a = (kernel·factor)ᵀ and b = kernel·slope a.
    b = jnp.dot((kernel * slope).astype(u.dtype), a)
    mean_part = jnp.dot(mean_u, b.astype(mean.dtype), precision=EXACT)
    mean_part -= jnp.dot(mean_g, a.astype(mean.dtype), precision=EXACT)
    d_u = _product(u, -b) + g_a + mean_part.astype(u.dtype)
    return d_u, d_kernel, None if residual is None else g, d_scale, d_bias


conv1x1_batch_norm.defvjp(_forward, _backward)
