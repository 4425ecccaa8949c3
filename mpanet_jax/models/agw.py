"""AGW's network: a stem for each modality, a shared ResNet with non-local blocks, GeM pooling and the neck.

Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021. CAJ (Ye et al., ICCV 2021)
has the same network.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mpanet_jax.modality import VISIBLE
from mpanet_jax.models.layers import BatchNorm, Classifier, statistics_dtype, torch_uniform
from mpanet_jax.models.resnet import BACKBONES, ResNet

# Stage → number of non-local blocks, which follow its last blocks: in ResNet-50 blocks 2 and 3 (counted from 0) of
# stage 2, and blocks 3, 4 and 5 of stage 3.
NON_LOCAL_BLOCKS = {2: 2, 3: 3}
GEM_POWER = 3.0
GEM_EPS = 1e-12


class Outputs(NamedTuple):
    """The results of a forward pass, in float32 (float64 where the network computes in float64).

    Attributes:
      features: the pooled features, before the neck; input of the triplet loss.
      embedding: after the neck; input of the classifier and of retrieval.
      logits: of the classifier.
    """

    features: Float[Array, "b d"]
    embedding: Float[Array, "b d"]
    logits: Float[Array, "b n"]


def uniform_by_channels(channels: int) -> nn.initializers.Initializer:
    """U(±1/√channels), PyTorch's default for the weight and the bias of a layer with `channels` inputs."""
    bound = channels**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


class NonLocalBlock(nn.Module):
    """z = BN(W y) + x with y = (θᵀφ / N) g over the N positions; θ, φ and g have one channel, and there is no softmax.

    With one channel θᵀφ is an outer product, so y_i = θ_i · mean_j(φ_j g_j). Scale and bias of the batch norm start at
    0, so the block starts as the identity, and in the first step only the batch norm gets a gradient.
    """

    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        wide = x.astype(statistics_dtype(x))

        def conv1x1(x: Array, features: int, name: str) -> Array:
            bias_init = uniform_by_channels(x.shape[-1])
            options = {"kernel_init": torch_uniform, "bias_init": bias_init, "param_dtype": self.param_dtype}
            return nn.Dense(features, dtype=x.dtype, name=name, **options)(x)

        theta, phi, g = (conv1x1(wide, 1, name) for name in ("theta", "phi", "g"))
        y = theta * (phi * g).mean((1, 2), keepdims=True)
        norm = BatchNorm(
            axis_name=self.axis_name, param_dtype=self.param_dtype, scale_init=nn.initializers.zeros, name="bn"
        )
        return (norm(conv1x1(y, channels, "w"), train=train) + wide).astype(x.dtype)


class ModalityStem(nn.Module):
    """The stem of one modality: `backbone`'s stem, made with `options`."""

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
      num_ids: number of training identities, the classes of the classifier.
      backbone: a ResNet. Each modality has a stem of its own, and both share the stages.
      visible_share: the share of visible images in a training batch, on every device. It fixes how many images each
        stem gets, and over how many it takes its batch statistics.
      dtype: of convolutions and matrix products; statistics and outputs are float32.
      param_dtype: of the parameters: float32, or float64 where dtype is float64.
      axis_name: the mapped axis of a multi-device step, over which batch norm takes its statistics; None on one device.
    """

    num_ids: int
    backbone: ResNet = BACKBONES["resnet50"]  # type: ignore[assignment]
    visible_share: float = 0.5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], modality: Int[Array, "b"], *, train: bool) -> Outputs:
        """Runs the network.

        Args:
          images: NHWC, normalised with ImageNet's statistics.
          modality: 0 visible, 1 infrared.
          train: batch norm uses the batch's statistics and updates the running ones (apply with
            `mutable=["batch_stats"]`); otherwise it uses the running ones.
        """
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "axis_name": self.axis_name}
        visible = ModalityStem(self.backbone, common, name="visible")
        infrared = ModalityStem(self.backbone, common, name="infrared")
        images = images.astype(self.dtype)
        # In training each stem gets the images of its modality, and from here on the visible ones come first. In
        # evaluation it is not known how many images each modality has, so both stems get all images.
        order = jnp.argsort(modality, stable=True)
        if train:
            number = round(self.visible_share * len(images))
            images = images[order]
            parts = visible(images[:number], train=True), infrared(images[number:], train=True)
            x = jnp.concatenate(parts)
        else:
            is_visible = (modality == VISIBLE)[:, None, None, None]
            x = jnp.where(is_visible, visible(images, train=False), infrared(images, train=False))
        for number in (1, 2, 3, 4):
            count = min(NON_LOCAL_BLOCKS.get(number, 0), self.backbone.stage_sizes[number - 1])
            first = self.backbone.stage_sizes[number - 1] - count
            options = {"param_dtype": self.param_dtype, "axis_name": self.axis_name}
            non_local = {first + i: NonLocalBlock(name=f"non_local{number}_{i}", **options) for i in range(count)}
            x = self.backbone.stage(number, **common)(x, train=train, after_block=non_local)
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
        original_order = jnp.argsort(order)
        return Outputs(*(rows[original_order] for rows in outputs))
