"""MPANet: ResNet with MAM after stages 3 and 4, PAM, the BN neck and the three classifiers."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mpanet_jax.models.attention import CBAM, ModalityAlleviation, NonLocal, PatternAlignment, torch_uniform
from mpanet_jax.models.batch_norm import statistics_dtype
from mpanet_jax.models.normalization import BatchNorm
from mpanet_jax.models.resnet import Stage
from mpanet_jax.models.stem import Stem

CHANNEL_MODULES = ("mam", "se", "in", "cbam", "none")
PATTERN_MODULES = ("pam", "non_local", "none")
# The names of the classifiers' kernels: C_v and C_r, which have a mean classifier, and with C all three.
MODALITY_CLASSIFIERS = ("visible_classifier", "infrared_classifier")
CLASSIFIERS = ("classifier", *MODALITY_CLASSIFIERS)


class Outputs(NamedTuple):
    """What one forward pass gives, all in float32.

    Attributes:
      features: f, before the neck: what the center cluster loss sees.
      embedding: g, after the neck: what the classifiers and retrieval see.
      maps: M, the pattern maps over the h·w positions; l = 0 without PAM.
      logits: of C, the identity classifier.
      visible_logits, infrared_logits: of C_v and C_r, each for every image of the batch.
    """

    features: Float[Array, "b d"]
    embedding: Float[Array, "b d"]
    maps: Float[Array, "b positions l"]
    logits: Float[Array, "b n"]
    visible_logits: Float[Array, "b n"]
    infrared_logits: Float[Array, "b n"]


def sum_gradient(gradient: Array, dtype: DTypeLike, axis_name: str) -> Array:
    """The sum of a gradient over the devices of `axis_name`, computed in `dtype`, in the gradient's type."""
    return lax.psum(gradient.astype(dtype), axis_name).astype(gradient.dtype)


def _gather_factors(num_rows: int, num_ids: int, axis_name: str | None) -> bool:
    """Whether gathering the embeddings takes fewer bytes than summing the gradients of the classifiers' kernels.

    Of N devices with b rows each receives (N − 1)·b·d elements in the one case and 2·(N − 1)/N·3·d·n in the other (a
    ring; the gradients of the logits are small). Up to 18 devices on SYSU-MM01 with 128 images on each.
    """
    return axis_name is not None and lax.axis_size(axis_name) * num_rows < 2 * len(CLASSIFIERS) * num_ids


def _linear_forward(embedding, kernel, dtype, axis_name):
    narrow, narrow_kernel = embedding.astype(dtype), kernel.astype(dtype)
    logits = jnp.dot(narrow, narrow_kernel, preferred_element_type=statistics_dtype(embedding))
    # Gathered here and not in the backward pass, because here the losses are left to hide it.
    gather = _gather_factors(*logits.shape, axis_name)
    whole = lax.all_gather(narrow, axis_name, tiled=True) if gather else narrow
    return logits, (whole, narrow_kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(
    embedding: Float[Array, "b d"], kernel: Float[Array, "d n"], dtype: DTypeLike, axis_name: str | None = None
) -> Float[Array, "b n"]:
    """A bias-free linear classifier.

    Args:
      embedding, kernel: in float32, or float64.
      dtype: of the operands of the product and of its gradients' products, the logits' gradient among them; their
        sums are in float32, or float64.
      axis_name: the mapped axis of a multi-device step, None on one device. The kernel's gradient is that of all
        devices: the product of all their embeddings and logits' gradients, or the sum (in dtype) of their products,
        whichever takes fewer bytes.

    Returns:
      The logits, in embedding's type.
    """
    return _linear_forward(embedding, kernel, dtype, None)[0]


def _linear_backward(dtype, axis_name, saved, gradient):
    whole, narrow_kernel = saved
    narrow = gradient.astype(dtype)
    product = partial(jnp.dot, preferred_element_type=gradient.dtype)
    d_embedding = product(narrow, narrow_kernel.T)
    if _gather_factors(*gradient.shape, axis_name):
        return d_embedding, product(whole.T, lax.all_gather(narrow, axis_name, tiled=True))
    d_kernel = product(whole.T, narrow)
    if axis_name is not None:
        d_kernel = sum_gradient(d_kernel, dtype, axis_name)
    return d_embedding, d_kernel


linear.defvjp(_linear_forward, _linear_backward)


class MPANet(nn.Module):
    """The network of figure 2.

    Attributes:
      num_ids: identities that the classifiers tell apart.
      stage_sizes: blocks of the four stages; (3, 4, 6, 3) is ResNet-50.
      width: channels of the stem; 64 is ResNet-50. The last feature map has 32·width channels.
      channel_module: what follows stages 3 and 4: 'mam', or the ablations 'se', 'in', 'cbam', 'none'.
      pattern_module: what makes f: 'pam', or the ablations 'non_local', 'none'.
      num_patterns: l.
      reduction: r of eq. 2.
      dtype: of convolutions and matrix products; statistics and outputs are float32.
      param_dtype: of the parameters: float32, or float64 where dtype is float64.
      axis_name: the mapped axis of a multi-device step: batch norm's statistics are global over it, and so are the
        gradients of batch norm and of the classifiers.
    """

    num_ids: int
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    channel_module: str = "mam"
    pattern_module: str = "pam"
    num_patterns: int = 6
    reduction: int = 16
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Outputs:
        """Maps normalised images (NHWC, ImageNet statistics) to `Outputs`.

        `train` chooses batch statistics over running ones; with it, apply with `mutable=["batch_stats"]`.
        """
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "axis_name": self.axis_name}
        x = Stem(self.width, **common, name="stem")(images.astype(self.dtype), train=train)
        for number, num_blocks in enumerate(self.stage_sizes, start=1):
            # Stage 4 keeps stage 3's resolution.
            stride = 2 if number in (2, 3) else 1
            stage = Stage(num_blocks, self.width * 2 ** (number - 1), stride, **common, name=f"stage{number}")
            x = stage(x, train=train)
            if number >= 3:
                x = self._channel_module(number, x)
        features, maps = self._pattern_module(x, train=train)
        neck = BatchNorm(use_bias=False, axis_name=self.axis_name, param_dtype=self.param_dtype, name="neck")
        embedding = neck(features, train=train)
        shape = (features.shape[-1], self.num_ids)
        kernels = [self.param(name, torch_uniform, shape, self.param_dtype) for name in CLASSIFIERS]
        logits = [linear(embedding, kernel, self.dtype, self.axis_name) for kernel in kernels]
        return Outputs(features, embedding, maps, *logits)

    def _channel_module(self, number: int, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.channel_module == "none":
            return x
        if self.channel_module == "cbam":
            return CBAM(self.reduction, self.param_dtype, name=f"cbam{number}")(x)
        return ModalityAlleviation(self.channel_module, self.reduction, self.param_dtype, name=f"mam{number}")(x)

    def _pattern_module(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> tuple[Float[Array, "b d"], Float[Array, "b positions l"]]:
        if self.pattern_module == "pam":
            return PatternAlignment(self.num_patterns, self.param_dtype, name="pam")(x)
        if self.pattern_module == "non_local":
            x = NonLocal(self.axis_name, self.param_dtype, name="non_local")(x, train=train)
        wide = x.astype(statistics_dtype(x))
        return wide.mean((1, 2)), jnp.zeros((x.shape[0], x.shape[1] * x.shape[2], 0), wide.dtype)
