"""Batch normalisation as PyTorch computes it: parameters, running statistics, and the choice of the operation."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.batch_norm import batch_norm, count_positions, statistics_dtype
from mpanet_jax.models.pooling import max_pool, normalize_and_pool
from mpanet_jax.models.projection import project, project_and_normalize


class BatchNorm(nn.Module):
    """BatchNorm2d / BatchNorm1d in PyTorch's conventions: the running variance is the *unbiased* one.

    Attributes:
      relu: apply a ReLU after the normalisation (and after the residual).
      use_bias: False leaves the bias out, i.e. fixes it at 0 (the BN neck).
      momentum: weight of the new batch in the running statistics.
      eps: added to the variance.
      axis_name: the mapped axis over whose devices the statistics are taken and the gradients of scale and bias summed;
        `step.total_gradients` takes it that layers with running statistics do so, and the classifiers, and no others.
      param_dtype: type of scale, bias and running statistics.
      scale_init: how the scale starts.
    """

    relu: bool = False
    use_bias: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*positions c"],
        *,
        train: bool,
        kernel: Float[Array, "c o"] | None = None,
        residual: Float[Array, "*positions o"] | None = None,
        pool: bool = False,
        next_kernel: Array | None = None,
    ) -> Float[Array, "..."] | tuple[Float[Array, "..."], Array]:
        """Normalises x by the batch's statistics (`train`) or by the running ones.

        Args:
          x: any number of leading axes.
          train: with it, apply with `mutable=["batch_stats"]`.
          kernel: x goes through this 1×1 convolution first.
          residual: with a kernel: added before the ReLU.
          pool: without a kernel, with the ReLU: a 3×3 max-pool with stride 2 follows.
          next_kernel: without kernel, residual and pool: as in `batch_norm`; it is returned behind the result.

        Raises ValueError for combinations that no network here needs.
        """
        if (residual is not None and kernel is None) or (pool and (kernel is not None or not self.relu)):
            raise ValueError("residual goes with a kernel, pool with relu=True and without a kernel")
        if next_kernel is not None and (kernel is not None or pool):
            raise ValueError("next_kernel goes without kernel and pool")
        channels = (x.shape[-1] if kernel is None else kernel.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        scale = self.param("scale", self.scale_init, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype) if self.use_bias else 0 * scale
        if train:
            if kernel is not None:
                y, mean, variance = project_and_normalize(
                    x, kernel, residual, scale, bias, self.eps, self.relu, self.axis_name
                )
            elif pool:
                y, mean, variance = normalize_and_pool(x, scale, bias, self.eps, self.axis_name)
            else:
                (y, mean, variance), next_kernel = batch_norm(
                    x, scale, bias, next_kernel, self.eps, self.relu, self.axis_name
                )
            if not self.is_initializing():
                count = count_positions(x, self.axis_name)
                unbiased = variance * (count / max(count - 1, 1))
                running_mean.value = (1 - self.momentum) * running_mean.value + self.momentum * mean
                running_variance.value = (1 - self.momentum) * running_variance.value + self.momentum * unbiased
            return y if next_kernel is None else (y, next_kernel)
        factor = lax.rsqrt(running_variance.value + self.eps) * scale
        if kernel is not None:
            folded = (kernel * factor).astype(x.dtype)
            return project(x, folded, bias - running_mean.value * factor, residual, self.relu)
        y = (x.astype(statistics_dtype(x)) - running_mean.value) * factor + bias
        if self.relu:
            y = jnp.maximum(y, 0)
        y = y.astype(x.dtype)
        if next_kernel is not None:
            return y, next_kernel
        return max_pool(y) if pool else y
