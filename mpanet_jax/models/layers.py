"""What the networks share, in PyTorch's conventions: batch norm, the linear classifier, and initialisers."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# torchvision's initialiser of every convolution.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for nn.Conv2d and nn.Linear: uniform in ±1/√fan_in.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# The collection in which layers note the parameters whose gradients they sum over the devices themselves.
SUMMED = "summed_gradients"


def mark_gradients_summed(module: nn.Module, *names: str) -> None:
    """Notes that `module` sums the gradients of its parameters `names` over the devices itself.

    A layer calls this in its forward pass. The gradients of all other parameters are summed in `step.py`.
    """
    for name in () if module.is_initializing() else names:
        module.sow(SUMMED, name, ())


def sum_gradient(gradient: Array, dtype: DTypeLike, axis_name: str) -> Array:
    """Sums a gradient over the devices of `axis_name`, in `dtype`, and returns the sum in the gradient's own type."""
    return lax.psum(gradient.astype(dtype), axis_name).astype(gradient.dtype)


def statistics_dtype(x: Array) -> jnp.dtype:
    """The type that statistics of x are computed in: float32, or float64 for float64 input."""
    return jnp.promote_types(x.dtype, jnp.float32)


def linear(x: Float[Array, "b d"], kernel: Float[Array, "d n"], dtype: DTypeLike) -> Float[Array, "b n"]:
    """x·kernel: both are rounded to `dtype`, the products are summed in float32 (float64 for float64 input)."""
    return jnp.dot(x.astype(dtype), kernel.astype(dtype), preferred_element_type=statistics_dtype(x))


class Classifier(nn.Module):
    """A linear layer without bias, from embeddings to the logits of the identities.

    Attributes:
      kernel_name: name of its parameter, float[d, num_ids].
      num_ids: number of identities.
      dtype: of the operands of the product; the logits are float32.
      param_dtype: of the parameter.
      axis_name: the mapped axis of a multi-device step, which only the fused form reads.
      kernel_init: initialiser of the parameter.
    """

    kernel_name: str
    num_ids: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    kernel_init: nn.initializers.Initializer = torch_uniform

    @nn.compact
    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b n"]:
        return linear(embedding, self.kernel(embedding), self.dtype)

    def kernel(self, embedding: Float[Array, "b d"]) -> Float[Array, "d n"]:
        """The parameter, whose size follows from the embedding's."""
        return self.param(self.kernel_name, self.kernel_init, (embedding.shape[-1], self.num_ids), self.param_dtype)


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm2d and BatchNorm1d: unlike flax's, its running variance is the *unbiased* one.

    Attributes:
      use_bias: False fixes the bias at 0, as in the BN neck.
      momentum: weight of the new batch in the running statistics.
      eps: added to the variance.
      axis_name: the mapped axis of a multi-device step; the batch's statistics are taken over all its devices.
      param_dtype: type of scale, bias and running statistics.
      scale_init: initialiser of the scale.
    """

    use_bias: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "*positions c"], *, train: bool) -> Float[Array, "*positions c"]:
        """Normalises x over all axes but the last: in training by the batch's statistics, else by the running ones.

        Training updates the running statistics: apply with `mutable=["batch_stats"]`.
        """
        positions = tuple(range(x.ndim - 1))
        scale, bias, running_mean, running_variance = self.variables_of(x.shape[-1])
        wide = x.astype(statistics_dtype(x))
        if train:
            moments = jnp.stack([wide.mean(positions), jnp.square(wide).mean(positions)])
            count = x.size // x.shape[-1]
            if self.axis_name is not None:
                moments, count = lax.pmean(moments, self.axis_name), count * lax.axis_size(self.axis_name)
            mean, variance = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
            self.update_running_statistics(mean, variance, count)
        else:
            mean, variance = running_mean, running_variance
        return ((wide - mean) * (lax.rsqrt(variance + self.eps) * scale) + bias).astype(x.dtype)

    def variables_of(self, channels: int) -> tuple[Array, Array, Array, Array]:
        """Scale, bias, running mean and running variance, each float[channels]."""
        shape = (channels,)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        running_variance = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype) if self.use_bias else 0 * scale
        return scale, bias, running_mean.value, running_variance.value

    def update_running_statistics(self, mean: Float[Array, "c"], variance: Float[Array, "c"], count: int) -> None:
        """Averages in a batch's mean and *biased* variance, which were taken over `count` positions."""
        if self.is_initializing():
            return
        unbiased = variance * (count / max(count - 1, 1))
        for name, value in (("mean", mean), ("var", unbiased)):
            before = self.get_variable("batch_stats", name)
            self.put_variable("batch_stats", name, (1 - self.momentum) * before + self.momentum * value)
