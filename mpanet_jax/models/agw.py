"""AGW's network: a stem for each modality, a shared ResNet with non-local blocks, GeM pooling and the neck.

Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021. CAJ (Ye et al., ICCV 2021)
has the same network.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mpanet_jax.models.layers import BatchNorm, Classifier, statistics_dtype, torch_uniform
from mpanet_jax.models.resnet import BACKBONES, ResNet

# Non-local blocks by stage: behind its last blocks; of ResNet-50 behind 2 and 3 of four, and 3, 4 and 5 of six.
NON_LOCAL_BLOCKS = {2: 2, 3: 3}
GEM_POWER = 3.0
GEM_EPS = 1e-12


class Outputs(NamedTuple):
    """What one forward pass gives, all in float32.

    Attributes:
      features: the pooled features, before the neck: what the triplet loss sees.
      embedding: after the neck: what the classifier and retrieval see.
      logits: of the classifier.
    """

    features: Float[Array, "b d"]
    embedding: Float[Array, "b d"]
    logits: Float[Array, "b n"]


def uniform_by_channels(channels: int) -> nn.initializers.Initializer:
    """U(±1/√channels), PyTorch's start of weight and bias of a layer with so many inputs."""
    bound = channels**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


class NonLocalBlock(nn.Module):
    """z = BN(W y) + x with y = (θᵀφ / N) g over the N positions; θ, φ and g have one channel, and there is no softmax.

    With one channel θᵀφ is an outer product, so y_i = θ_i · mean_j(φ_j g_j). Scale and bias of the batch norm start at
    0, so the block starts as the identity, and at first the batch norm alone gets a gradient.
    """

    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        wide = x.astype(statistics_dtype(x))

        def conv1x1(name: str, y: Array, features: int) -> Array:
            bias_init = uniform_by_channels(y.shape[-1])
            options = {"kernel_init": torch_uniform, "bias_init": bias_init, "param_dtype": self.param_dtype}
            return nn.Dense(features, dtype=wide.dtype, name=name, **options)(y)

        theta, phi, g = (conv1x1(name, wide, 1) for name in ("theta", "phi", "g"))
        y = theta * (phi * g).mean((1, 2), keepdims=True)
        norm = BatchNorm(
            axis_name=self.axis_name, param_dtype=self.param_dtype, scale_init=nn.initializers.zeros, name="bn"
        )
        return (norm(conv1x1("w", y, channels), train=train) + wide).astype(x.dtype)


class ModalityStem(nn.Module):
    """The stem of one modality."""

    backbone: ResNet
    options: dict[str, object]

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b h4 w4 c"]:
        return self.backbone.stem(**self.options)(images, train=train)


def gem(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Generalised-mean pooling of non-negative maps: (mean(x³) + 1e-12)^(1/3)."""
    wide = x.astype(statistics_dtype(x))
    return ((wide**GEM_POWER).mean((1, 2)) + GEM_EPS) ** (1 / GEM_POWER)


class AGW(nn.Module):
    """AGW's network.

    Attributes:
      num_ids: identities that the classifier tells apart.
      backbone: a ResNet; its stem is there once for each modality.
      visible_share: of the images of a training batch, on every device. A stem's batch statistics are those of its own
        modality, so how many images that has must be known.
      dtype: of convolutions and matrix products; statistics and outputs are float32.
      param_dtype: of the parameters: float32, or float64 where dtype is float64.
      axis_name: the mapped axis of a multi-device step: batch norm's statistics are global over it.
    """

    num_ids: int
    backbone: ResNet = BACKBONES["resnet50"]  # type: ignore[assignment]
    visible_share: float = 0.5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], modality: Int[Array, "b"], *, train: bool) -> Outputs:
        """Maps normalised images (NHWC, ImageNet statistics) and their modality (0 visible, 1 infrared) to `Outputs`.

        `train` chooses batch statistics over running ones; with it, apply with `mutable=["batch_stats"]`.
        """
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "axis_name": self.axis_name}
        visible = ModalityStem(self.backbone, common, name="visible")
        infrared = ModalityStem(self.backbone, common, name="infrared")
        images = images.astype(self.dtype)
        # In training each stem sees its own images, visible ones first from there on. Out of it there is no telling how
        # many there are of a modality: both stems see all.
        order = jnp.argsort(modality, stable=True)
        if train:
            number = round(self.visible_share * len(images))
            images = images[order]
            parts = visible(images[:number], train=True), infrared(images[number:], train=True)
            x = jnp.concatenate(parts)
        else:
            is_visible = (modality == 0)[:, None, None, None]
            x = jnp.where(is_visible, visible(images, train=False), infrared(images, train=False))
        for number in (1, 2, 3, 4):
            count = min(NON_LOCAL_BLOCKS.get(number, 0), self.backbone.stage_sizes[number - 1])
            first = self.backbone.stage_sizes[number - 1] - count
            options = {"param_dtype": self.param_dtype, "axis_name": self.axis_name}
            behind = {first + i: NonLocalBlock(name=f"non_local{number}_{i}", **options) for i in range(count)}
            x = self.backbone.stage(number, **common)(x, train=train, behind=behind)
        features = gem(x)
        neck = BatchNorm(
            use_bias=False,
            axis_name=self.axis_name,
            param_dtype=self.param_dtype,
            scale_init=lambda *args: 1 + nn.initializers.normal(0.01)(*args),
            name="neck",
        )
        embedding = neck(features, train=train)
        classifier = Classifier("classifier", self.num_ids, kernel_init=nn.initializers.normal(0.001), **common)
        nn.share_scope(self, classifier)  # its kernel is the parameter `classifier` of the network itself
        outputs = Outputs(features, embedding, classifier(embedding))
        if not train:
            return outputs
        back = jnp.argsort(order)
        return Outputs(*(rows[back] for rows in outputs))
