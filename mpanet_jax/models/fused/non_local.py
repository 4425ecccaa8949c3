"""The fused form of AGW's non-local block: its batch norm, of an array of rank one, follows from two numbers."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.agw import NonLocalBlock, uniform_by_channels
from mpanet_jax.models.fused.batch_norm import count_positions
from mpanet_jax.models.layers import BatchNorm, statistics_dtype, torch_uniform


class Weights(nn.Module):
    """Kernel and bias of a 1×1 convolution from `inputs` to `outputs` channels. It does not convolve."""

    inputs: int
    outputs: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "i o"], Float[Array, "o"]]:
        kernel = self.param("kernel", torch_uniform, (self.inputs, self.outputs), self.param_dtype)
        bias = self.param("bias", uniform_by_channels(self.inputs), (self.outputs,), self.param_dtype)
        return kernel, bias


class RankOneBatchNorm(BatchNorm):
    """A `BatchNorm` of y[p, c] = s[p]·w[c] + b[c], given as s, w and b.

    The mean of channel c is w[c]·E s + b[c] and its variance w[c]²·Var s, so y is never written.
    """

    @nn.compact
    def __call__(
        self, s: Float[Array, "b h w 1"], w: Float[Array, "c"], b: Float[Array, "c"], *, train: bool
    ) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Returns factor and offset; the normalised array is s·factor + offset."""
        scale, bias, running_mean, running_variance = self.variables_of(len(w))
        if train:
            moments = jnp.stack([s.mean(), jnp.square(s).mean()])
            if self.axis_name is not None:
                moments = lax.pmean(moments, self.axis_name)
            mean, variance = w * moments[0] + b, jnp.square(w) * jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
            self.update_running_statistics(mean, variance, count_positions(s, self.axis_name))
        else:
            mean, variance = running_mean, running_variance
        factor = lax.rsqrt(variance + self.eps) * scale
        return w * factor, (b - mean) * factor + bias


def fused_non_local(module: NonLocalBlock, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
    """The fused form of `NonLocalBlock`: a pass over x gives θ, φ and g, another adds what follows."""
    channels, param_dtype = x.shape[-1], module.param_dtype
    wide = x.astype(statistics_dtype(x))

    def project(name: str) -> Float[Array, "b h w 1"]:
        kernel, bias = Weights(channels, 1, param_dtype, name=name)()
        # As a sum, not as a product: XLA joins the three sums, and reads x once for them.
        return (wide * kernel[:, 0]).sum(-1, keepdims=True) + bias

    theta, phi, g = (project(name) for name in ("theta", "phi", "g"))
    s = theta * (phi * g).mean((1, 2), keepdims=True)
    kernel, bias = Weights(1, channels, param_dtype, name="w")()
    norm = RankOneBatchNorm(
        axis_name=module.axis_name, param_dtype=param_dtype, scale_init=nn.initializers.zeros, name="bn"
    )
    factor, offset = norm(s, kernel[0], bias, train=train)
    return (wide + (s * factor + offset)).astype(x.dtype)
