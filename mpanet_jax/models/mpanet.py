"""MPANet: ResNet with MAM after stages 3 and 4, PAM, the BN neck and the three classifiers."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mpanet_jax.models.attention import CBAM, ModalityAlleviation, NonLocal, PatternAlignment
from mpanet_jax.models.layers import BatchNorm, Classifier, statistics_dtype
from mpanet_jax.models.resnet import BACKBONES, Backbone

CHANNEL_MODULES = ("mam", "se", "in", "cbam", "none")
PATTERN_MODULES = ("pam", "non_local", "none")
# Parameters that are the classifiers' kernels: those of C_v and C_r, which have mean classifiers; all three, C's first.
MODALITY_CLASSIFIERS = ("visible_classifier", "infrared_classifier")
CLASSIFIERS = ("classifier", *MODALITY_CLASSIFIERS)


class Outputs(NamedTuple):
    """The results of a forward pass, in float32 (float64 where the network computes in float64).

    Attributes:
      features: f, before the neck; input of the center cluster loss.
      embedding: g, after the neck; input of the classifiers and of retrieval.
      maps: M, the l pattern maps over the h·w positions of the last feature map; l = 0 without PAM.
      logits: of C, the identity classifier.
      visible_logits, infrared_logits: of C_v and C_r, each for every image of the batch.
    """

    features: Float[Array, "b d"]
    embedding: Float[Array, "b d"]
    maps: Float[Array, "b positions l"]
    logits: Float[Array, "b n"]
    visible_logits: Float[Array, "b n"]
    infrared_logits: Float[Array, "b n"]


class MPANet(nn.Module):
    """The network of figure 2.

    Attributes:
      num_ids: number of training identities, the classes of the classifiers.
      backbone: makes the stem and the four stages.
      channel_module: the module after stages 3 and 4: 'mam', or for ablations 'se', 'in', 'cbam', 'none'.
      pattern_module: the module that computes f: 'pam', or for ablations 'non_local', 'none'.
      num_patterns: l, the number of patterns.
      reduction: r of eq. 2.
      dtype: of convolutions and matrix products; statistics and outputs are float32.
      param_dtype: of the parameters: float32, or float64 where dtype is float64.
      axis_name: the mapped axis of a multi-device step, over which batch norm takes its statistics; None on one device.
    """

    num_ids: int
    backbone: Backbone = BACKBONES["resnet50"]
    channel_module: str = "mam"
    pattern_module: str = "pam"
    num_patterns: int = 6
    reduction: int = 16
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], modality: Int[Array, "b"] | None = None, *, train: bool
    ) -> Outputs:
        """Runs the network.

        Args:
          images: NHWC, normalised with ImageNet's statistics.
          modality: not read, because both modalities take the same path; other methods' networks need it.
          train: batch norm uses the batch's statistics and updates the running ones (apply with
            `mutable=["batch_stats"]`); otherwise it uses the running ones.
        """
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "axis_name": self.axis_name}
        x = self.backbone.stem(**common)(images.astype(self.dtype), train=train)
        for number in (1, 2, 3, 4):
            x = self.backbone.stage(number, **common)(x, train=train)
            if number >= 3:
                x = self._channel_module(number, x)
        features, maps = self._pattern_module(x, train=train)
        neck = BatchNorm(use_bias=False, axis_name=self.axis_name, param_dtype=self.param_dtype, name="neck")
        embedding = neck(features, train=train)
        logits = []
        for name in CLASSIFIERS:
            classifier = Classifier(name, self.num_ids, **common)
            nn.share_scope(self, classifier)  # its kernel is the parameter `name` of the network itself
            logits.append(classifier(embedding))
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
