"""The modality alleviation module, the pattern alignment module, and their replacements in the ablations.

Channel modules (after stages 3 and 4) map b×h×w×c to the same shape: MAM, SE, instance norm, CBAM. Pattern modules
turn the last feature map into the feature f: PAM, the non-local block, plain pooling. All compute in the type of their
input, and their statistics in float32 at least.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.layers import BatchNorm, kaiming_fan_out, statistics_dtype, torch_uniform

INSTANCE_NORM_EPS = 1e-5


class ChannelMask(nn.Module):
    """W₂ δ(W₁ ·) of eq. 2, without the sigmoid: two linear layers without bias around a ReLU, for MAM, SE and CBAM.

    The weights are initialised like the backbone's convolutions, as in the published program (docs/method.md).
    """

    reduction: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, pooled: Float[Array, "b c"]) -> Float[Array, "b c"]:
        channels = pooled.shape[-1]
        squeeze = self.param("w1", kaiming_fan_out, (channels, channels // self.reduction), self.param_dtype)
        excite = self.param("w2", kaiming_fan_out, (channels // self.reduction, channels), self.param_dtype)
        dtype = pooled.dtype
        return jax.nn.relu(pooled @ squeeze.astype(dtype)) @ excite.astype(dtype)


def instance_statistics(z: Float[Array, "b h w c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """The mean and 1/√(variance + eps) of each image and channel over h×w, with the biased variance (eq. 3)."""
    wide = z.astype(statistics_dtype(z))
    mean = wide.mean((1, 2))
    # In two passes, because E[x²] − E[x]² loses the variance of maps that are nearly constant, which are common.
    # The derivative of the variance by the subtracted mean is 0, so no gradient has to pass through it.
    variance = jnp.square(wide - lax.stop_gradient(mean)[:, None, None]).mean((1, 2))
    return mean, lax.rsqrt(variance + INSTANCE_NORM_EPS)


class ModalityAlleviation(nn.Module):
    """MAM, eq. 1–3: F = m⊙Z + (1−m)⊙IN(Z) with m = σ(W₂ δ(W₁ g(Z))); IN has no parameters.

    Attributes:
      kind: 'mam'; 'se' leaves the instance norm out (F = m⊙Z), 'in' leaves the mask out (F = IN(Z)).
      reduction: r of eq. 2.
    """

    kind: str = "mam"
    reduction: int = 16
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        wide = z.astype(statistics_dtype(z))
        mean, inverse_deviation = instance_statistics(z)  # g(Z) is the mean
        normalised = (wide - mean[:, None, None]) * inverse_deviation[:, None, None]
        if self.kind == "in":
            return normalised.astype(z.dtype)
        mask = self.mask(mean)[:, None, None]
        alleviated = mask * wide if self.kind == "se" else mask * wide + (1 - mask) * normalised
        return alleviated.astype(z.dtype)

    def mask(self, pooled: Float[Array, "b c"]) -> Float[Array, "b c"]:
        """m of eq. 2, from g(Z)."""
        return jax.nn.sigmoid(ChannelMask(self.reduction, self.param_dtype, name="mask")(pooled))


def _max_by_index(x: Array, axis: int) -> Array:
    """x.max(axis), with a gradient that is never NaN.

    The gradient of jnp.max looks for the entries of x that equal the maximum. XLA may compute x a second time for that
    and round it differently; then no entry is equal, and the gradient is NaN.
    """
    return jnp.take_along_axis(x, x.argmax(axis, keepdims=True), axis).squeeze(axis)


class CBAM(nn.Module):
    """Channel, then spatial attention (Woo et al., ECCV 2018), without biases and batch norm; an ablation."""

    reduction: int = 16
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        wide = z.astype(statistics_dtype(z))
        positions = wide.reshape(wide.shape[0], -1, wide.shape[-1])
        shared = ChannelMask(self.reduction, self.param_dtype, name="mask")
        channel_mask = jax.nn.sigmoid(shared(positions.mean(1)) + shared(_max_by_index(positions, 1)))
        wide = wide * channel_mask[:, None, None]
        planes = jnp.stack([wide.mean(-1), _max_by_index(wide, -1)], axis=-1)
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
    """PAM, eq. 4–6: f = [p₁ … p_l, g(F)] with the pattern maps M = σ(A(F)) and p_k = g(M_k ⊙ F), g average pooling.

    Attributes:
      num_patterns: l.

    Returns:
      f: float32[b, (l+1)·c], one pattern after the other, the global feature last.
      maps: float32[b, h·w, l], M.
    """

    num_patterns: int = 6
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, feature_map: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b positions l"]]:
        batch, height, width, channels = feature_map.shape
        flat = feature_map.reshape(batch, height * width, channels)
        maps = self.maps(flat)
        wide = flat.astype(maps.dtype)
        patterns = jnp.einsum("bnl,bnc->blc", maps, wide) / (height * width)
        pooled = jnp.concatenate([patterns, wide.mean(1, keepdims=True)], axis=1)
        return pooled.reshape(batch, -1), maps

    def maps(self, flat: Float[Array, "b n c"]) -> Float[Array, "b n l"]:
        """M = σ(A(F)). A is a 1×1 convolution with bias, that is, the same matrix at every position."""
        kernel = self.param("kernel", torch_uniform, (flat.shape[-1], self.num_patterns), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.num_patterns,), self.param_dtype)
        kernel = kernel.astype(flat.dtype)
        logits = jnp.einsum("bnc,cl->bnl", flat, kernel, preferred_element_type=statistics_dtype(flat))
        return jax.nn.sigmoid(logits + bias)


class NonLocal(nn.Module):
    """Embedded-Gaussian non-local block (Wang et al., CVPR 2018): z = F + BN(W y), y = softmax(θᵀφ)·g.

    θ, φ, g and W are 1×1 convolutions; θ, φ and g have half of F's channels.
    """

    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, feature_map: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        batch, height, width, channels = feature_map.shape
        flat = feature_map.reshape(batch, height * width, channels)

        def conv1x1(x: Array, features: int, name: str) -> Array:
            return nn.Dense(
                features, dtype=x.dtype, param_dtype=self.param_dtype, kernel_init=torch_uniform, name=name
            )(x)

        theta, phi, value = (conv1x1(flat, channels // 2, name) for name in ("theta", "phi", "g"))
        similarity = jnp.einsum("bnc,bmc->bnm", theta, phi, preferred_element_type=statistics_dtype(flat))
        attended = jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(similarity).astype(flat.dtype), value)
        # With a scale of 0 the block starts as the identity (section 4.1 of that paper).
        norm = BatchNorm(
            axis_name=self.axis_name, param_dtype=self.param_dtype, scale_init=nn.initializers.zeros, name="bn"
        )
        return (flat + norm(conv1x1(attended, channels, "w"), train=train)).reshape(feature_map.shape)
