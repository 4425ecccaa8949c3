"""Changes of the step that have been predicted to gain and not been measured: `scripts/benchmark.py step --try=NAME`.

Each takes a function's place for as long as it is applied; nothing of it is in the package before it has gained. The
command measures the step as it is and with each try in turns. Drop from here what did not gain: docs/performance.md
keeps the row.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mpanet_jax.errors import UserError
from mpanet_jax.models import fused
from mpanet_jax.models.attention import PatternAlignment, torch_uniform
from mpanet_jax.models.fused import batch_norm, conv1x1
from mpanet_jax.models.fused import resnet as fused_resnet
from mpanet_jax.models.layers import statistics_dtype


def exact_by_bfloat16() -> Any:
    """The c×c products of float32 by six products of bfloat16 on tensor cores instead of on the float32 cores."""
    exact, sums_of_products = lax.DotAlgorithmPreset.BF16_BF16_F32_X6, conv1x1._sums_of_products

    def sums(x: Array, y: Array, precision: Any = None) -> Array:
        # Products of bfloat16 are exact already.
        return sums_of_products(x, y, lax.Precision.HIGHEST if precision and x.dtype == jnp.bfloat16 else precision)

    return mock.patch.multiple(conv1x1, EXACT=exact, _sums_of_products=sums)


def mask_again() -> Any:
    """The ReLU's mask of bn1 and bn2 computed again behind their sums: XLA does not write the masked gradient then."""

    def backward(eps: float, relu: bool, axis_name: str | None, saved: Any, cotangents: Any) -> Any:
        x, mean, inverse_deviation, scale, bias = saved
        (gradient, *_), d_next_kernel = cotangents

        def masked(x: Array, gradient: Array) -> tuple[Array, Array]:
            centred = x.astype(mean.dtype) - mean
            if relu:
                gradient = jnp.where(centred * (inverse_deviation * scale) + bias > 0, gradient, 0)
            return gradient.astype(mean.dtype), centred

        wide, centred = masked(x, gradient)
        sums = batch_norm.channel_sums(wide, wide * (centred * inverse_deviation))
        totals, d_next_kernel = batch_norm.sum_overlapped(sums, d_next_kernel, axis_name)
        x, gradient, totals = lax.optimization_barrier((x, gradient, totals))
        wide, _ = masked(x, gradient)
        dx = batch_norm.input_gradient(x, wide, totals, mean, inverse_deviation, scale, axis_name)
        return dx, totals[1], totals[0], d_next_kernel

    changed = jax.custom_vjp(batch_norm.batch_norm.fun, nondiff_argnums=(4, 5, 6))
    changed.defvjp(batch_norm._forward_with_kernel, backward)
    return mock.patch.object(fused_resnet, "batch_norm", changed)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_strided(x: Array, stride: int) -> tuple[Array, Array]:
    return x, x[:, ::stride, ::stride]


def _with_strided_backward(stride: int, _: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    whole, strided = gradients
    whole = lax.optimization_barrier(whole)
    sides = [(0, n - 1 - (m - 1) * stride, stride - 1) for n, m in zip(whole.shape, strided.shape, strict=True)]
    sides[0] = sides[-1] = (0, 0, 0)
    return (whole + lax.pad(strided, jnp.zeros((), strided.dtype), sides),)


_with_strided.defvjp(lambda x, stride: (_with_strided(x, stride), None), _with_strided_backward)


def shortcut_padded_late() -> Any:
    """The shortcut's gradient padded where it is added, instead of written with its zeros for cuDNN to read."""
    return mock.patch.object(fused_resnet, "with_strided", _with_strided)


@jax.custom_vjp
def _aligned(flat: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """PAM: pooled features [b, l+1, c] and maps [b, n, l] of flat [b, n, c], kernel [c, l] and bias [l]."""
    return _aligned_forward(flat, kernel, bias)[0]


def _aligned_forward(flat: Array, kernel: Array, bias: Array) -> Any:
    wide = statistics_dtype(flat)
    maps = jax.nn.sigmoid(
        jnp.einsum("bnc,cl->bnl", flat, kernel.astype(flat.dtype), preferred_element_type=wide) + bias
    )
    weights = jnp.concatenate([maps, jnp.ones_like(maps[..., :1])], axis=-1).astype(flat.dtype)
    pooled = jnp.einsum("bnl,bnc->blc", weights, flat, preferred_element_type=wide) / flat.shape[1]
    return (pooled, maps), (flat, kernel, maps, weights)


def _aligned_backward(saved: Any, gradients: Any) -> Any:
    (flat, kernel, maps, weights), (d_pooled, d_maps) = saved, gradients
    dtype, wide = flat.dtype, maps.dtype
    d_pooled = (d_pooled / flat.shape[1]).astype(dtype)
    d_weights = jnp.einsum("bnc,blc->bnl", flat, d_pooled[:, :-1], preferred_element_type=wide)
    d_logits = (d_weights + d_maps) * maps * (1 - maps)
    narrow = d_logits.astype(dtype)
    # Of flat in one product with K = 2l + 1 instead of two, whose results would be written, read and added.
    left = jnp.concatenate([weights, narrow], axis=-1)
    of_kernel = jnp.broadcast_to(kernel.astype(dtype).T, (len(flat), *kernel.T.shape))
    d_flat = jnp.einsum("bnk,bkc->bnc", left, jnp.concatenate([d_pooled, of_kernel], axis=1))
    d_kernel = jnp.einsum("bnc,bnl->cl", flat, narrow, preferred_element_type=wide)
    return d_flat.astype(dtype), d_kernel.astype(kernel.dtype), d_logits.sum((0, 1))


_aligned.defvjp(_aligned_forward, _aligned_backward)


def pam_in_one_product() -> Any:
    """PAM's gradient of the feature map as one product instead of two."""

    def align_patterns(module: PatternAlignment, feature_map: Array) -> tuple[Array, Array]:
        batch, height, width, channels = feature_map.shape
        zeros = jax.nn.initializers.zeros
        kernel = module.param("kernel", torch_uniform, (channels, module.num_patterns), module.param_dtype)
        bias = module.param("bias", zeros, (module.num_patterns,), module.param_dtype)
        pooled, maps = _aligned(feature_map.reshape(batch, height * width, channels), kernel, bias)
        return pooled.reshape(batch, -1), maps

    return mock.patch.dict(fused.FUSED_FORMS, {PatternAlignment: align_patterns})


TRIES = {
    "exact_by_bfloat16": exact_by_bfloat16,
    "mask_again": mask_again,
    "shortcut_padded_late": shortcut_padded_late,
    "pam_in_one_product": pam_in_one_product,
}


@contextlib.contextmanager
def applied(names: Iterable[str]) -> Iterator[None]:
    """The package with some of the TRIES in it, while the block runs.

    Raises:
      UserError: there is no such try.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            if name not in TRIES:
                raise UserError(f"--try={name}: expected one of {', '.join(TRIES)}")
            stack.enter_context(TRIES[name]())
        yield
