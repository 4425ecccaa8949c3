"""The fused forms of MAM, one affine map per image and channel, and of PAM, one product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpanet_jax.models.attention import ModalityAlleviation, PatternAlignment, instance_statistics
from mpanet_jax.models.fused.batch_norm import two_sums


@jax.custom_vjp
def _affine(
    z: Float[Array, "b h w c"], factor: Float[Array, "b c"], offset: Float[Array, "b c"]
) -> Float[Array, "b h w c"]:
    """factor·z + offset, with one factor and offset per image and channel; one pass computes the gradients of both."""
    return (z * factor[:, None, None] + offset[:, None, None]).astype(z.dtype)


def _affine_forward(z, factor, offset):
    return _affine(z, factor, offset), (z, factor)


def _affine_backward(saved, dy):
    z, factor = saved
    wide = dy.astype(factor.dtype)
    d_factor, d_offset = two_sums(wide * z, wide, (1, 2))
    return (wide * factor[:, None, None]).astype(z.dtype), d_factor, d_offset


_affine.defvjp(_affine_forward, _affine_backward)


def fused_mam(module: ModalityAlleviation, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The fused form of `ModalityAlleviation`: F = (m + (1−m)/σ)·Z − (1−m)·μ/σ, where μ is both g(Z) and IN's mean."""
    mean, inverse_deviation = instance_statistics(z)
    if module.kind == "in":
        return _affine(z, inverse_deviation, -mean * inverse_deviation)
    mask = module.mask(mean)
    if module.kind == "se":
        return _affine(z, mask, jnp.zeros_like(mask))
    rest = (1 - mask) * inverse_deviation
    return _affine(z, mask + rest, -rest * mean)


def fused_pam(
    module: PatternAlignment, feature_map: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b d"], Float[Array, "b positions l"]]:
    """The fused form of `PatternAlignment`: g(F) is a pattern whose map is 1 everywhere, so one product pools all."""
    batch, height, width, channels = feature_map.shape
    flat = feature_map.reshape(batch, height * width, channels)
    maps = module.maps(flat)
    ones = jnp.ones((batch, height * width, 1), maps.dtype)
    weights = jnp.concatenate([maps, ones], axis=-1).astype(flat.dtype)
    pooled = jnp.einsum("bnl,bnc->blc", weights, flat, preferred_element_type=maps.dtype) / (height * width)
    return pooled.reshape(batch, -1), maps
