"""The modality alleviation module, the pattern alignment module, and what the ablations put in their place.

Channel modules (after stages 3 and 4) map b×h×w×c to the same shape: MAM, SE, instance norm, CBAM. Pattern modules
turn the last feature map into the feature f: PAM, the non-local block, plain pooling.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.batch_norm import statistics_dtype, two_sums
from mpanet_jax.models.normalization import BatchNorm

# PyTorch's default for nn.Conv2d and nn.Linear: uniform in ±1/√fan_in.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
INSTANCE_NORM_EPS = 1e-5


class ChannelMask(nn.Module):
    """The two bias-free layers of eq. 2, W₂ δ(W₁ ·), shared by MAM, SE and CBAM; no sigmoid yet."""

    reduction: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, pooled: Float[Array, "b c"]) -> Float[Array, "b c"]:
        channels = pooled.shape[-1]
        squeeze = self.param("w1", torch_uniform, (channels, channels // self.reduction), self.param_dtype)
        excite = self.param("w2", torch_uniform, (channels // self.reduction, channels), self.param_dtype)
        dtype = pooled.dtype
        return jax.nn.relu(pooled @ squeeze.astype(dtype)) @ excite.astype(dtype)


def _instance_statistics(z: Float[Array, "b h w c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean and 1/√(variance + eps) per image and channel, biased variance over h×w (eq. 3)."""
    wide = z.astype(statistics_dtype(z))
    mean = wide.mean((1, 2))
    # In two passes: maps that are nearly constant over an image are common, and E[x²] − E[x]² loses their variance.
    # The variance does not change with the mean that is subtracted, so no gradient has to be computed there.
    variance = jnp.square(wide - lax.stop_gradient(mean)[:, None, None]).mean((1, 2))
    return mean, lax.rsqrt(variance + INSTANCE_NORM_EPS)


@jax.custom_vjp
def _affine(
    z: Float[Array, "b h w c"], factor: Float[Array, "b c"], offset: Float[Array, "b c"]
) -> Float[Array, "b h w c"]:
    """factor·z + offset, with one factor and offset per image and channel; the gradients of both in one pass."""
    return (z * factor[:, None, None] + offset[:, None, None]).astype(z.dtype)


def _affine_forward(z, factor, offset):
    return _affine(z, factor, offset), (z, factor)


def _affine_backward(saved, dy):
    z, factor = saved
    wide = dy.astype(factor.dtype)
    d_factor, d_offset = two_sums(wide * z, wide, (1, 2))
    return (wide * factor[:, None, None]).astype(z.dtype), d_factor, d_offset


_affine.defvjp(_affine_forward, _affine_backward)


class ModalityAlleviation(nn.Module):
    """MAM, eq. 1–3: F = m⊙Z + (1−m)⊙IN(Z) with m = σ(W₂ δ(W₁ g(Z))).

    IN has no parameters and shares its mean with g(Z), so F is one affine map of Z per image and channel:
    F = (m + (1−m)/σ)·Z − (1−m)·μ/σ.

    Attributes:
      kind: 'mam'; 'se' leaves the instance norm out (F = m⊙Z), 'in' leaves the mask out (F = IN(Z)).
      reduction: r of eq. 2.
    """

    kind: str = "mam"
    reduction: int = 16
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        mean, inverse_deviation = _instance_statistics(z)
        if self.kind == "in":
            return _affine(z, inverse_deviation, -mean * inverse_deviation)
        mask = jax.nn.sigmoid(ChannelMask(self.reduction, self.param_dtype, name="mask")(mean))
        if self.kind == "se":
            return _affine(z, mask, jnp.zeros_like(mask))
        rest = (1 - mask) * inverse_deviation
        return _affine(z, mask + rest, -rest * mean)


def _largest(x: Array, axis: int) -> Array:
    """x.max(axis), by index.

    The gradient of jnp.max looks for the entries of x that equal the maximum; where XLA computes x a second time for
    that, rounded otherwise, there are none and the gradient is NaN.
    """
    return jnp.take_along_axis(x, x.argmax(axis, keepdims=True), axis).squeeze(axis)


class CBAM(nn.Module):
    """Channel then spatial attention (Woo et al., ECCV 2018), without biases and batch norm: an ablation of table 4."""

    reduction: int = 16
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        wide = z.astype(statistics_dtype(z))
        positions = wide.reshape(wide.shape[0], -1, wide.shape[-1])
        shared = ChannelMask(self.reduction, self.param_dtype, name="mask")
        channel_mask = jax.nn.sigmoid(shared(positions.mean(1)) + shared(_largest(positions, 1)))
        wide = wide * channel_mask[:, None, None]
        planes = jnp.stack([wide.mean(-1), _largest(wide, -1)], axis=-1)
        conv = nn.Conv(
            1,
            (7, 7),
            padding=3,
            use_bias=False,
            kernel_init=torch_uniform,
            dtype=planes.dtype,
            param_dtype=self.param_dtype,
            name="spatial",
        )
        return (wide * jax.nn.sigmoid(conv(planes))).astype(z.dtype)


class PatternAlignment(nn.Module):
    """PAM, eq. 4–6: pattern maps M = σ(A(F)) and the pooled features of M_k⊙F, then of F itself.

    Returns:
      f: [b, (l+1)·c], pattern-major with the global feature last, in float32.
      maps: [b, h·w, l], float32.
    """

    num_patterns: int = 6
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, feature_map: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b positions l"]]:
        batch, height, width, channels = feature_map.shape
        wide = statistics_dtype(feature_map)
        flat = feature_map.reshape(batch, height * width, channels)
        kernel = self.param("kernel", torch_uniform, (channels, self.num_patterns), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.num_patterns,), self.param_dtype)
        logits = jnp.einsum("bnc,cl->bnl", flat, kernel.astype(flat.dtype), preferred_element_type=wide)
        maps = jax.nn.sigmoid(logits + bias)
        # The global feature g(F) is the pattern whose map is 1 everywhere, so one product pools all of them.
        weights = jnp.concatenate([maps, jnp.ones((batch, height * width, 1), wide)], axis=-1).astype(flat.dtype)
        pooled = jnp.einsum("bnl,bnc->blc", weights, flat, preferred_element_type=wide) / (height * width)
        return pooled.reshape(batch, -1), maps


class NonLocal(nn.Module):
    """Embedded-Gaussian non-local block (Wang et al., CVPR 2018): z = F + BN(W y), y = softmax(θᵀφ)·g."""

    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, feature_map: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        batch, height, width, channels = feature_map.shape
        flat = feature_map.reshape(batch, height * width, channels)

        def project(features: int, name: str, x: Array) -> Array:
            return nn.Dense(
                features, dtype=x.dtype, param_dtype=self.param_dtype, kernel_init=torch_uniform, name=name
            )(x)

        theta, phi, value = (project(channels // 2, name, flat) for name in ("theta", "phi", "g"))
        similarity = jnp.einsum("bnc,bmc->bnm", theta, phi, preferred_element_type=statistics_dtype(flat))
        attended = jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(similarity).astype(flat.dtype), value)
        # The scale starts at 0, so the block starts as the identity (section 4.1 of that paper).
        norm = BatchNorm(
            axis_name=self.axis_name, param_dtype=self.param_dtype, scale_init=nn.initializers.zeros, name="bn"
        )
        return (flat + norm(project(channels, "w", attended), train=train)).reshape(feature_map.shape)
