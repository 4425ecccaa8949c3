"""MPANet (Wu et al., CVPR 2021): its settings, losses and mean classifiers.

The paper's baseline and its ablations are settings of this method: `model.channel_module`, `model.pattern_module`, and
a loss weight of 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from mpanet_jax import losses
from mpanet_jax.data.augment import normalize
from mpanet_jax.errors import UserError
from mpanet_jax.methods.method import Method, Rows, compute_dtype
from mpanet_jax.models.layers import linear
from mpanet_jax.models.mpanet import CHANNEL_MODULES, MODALITY_CLASSIFIERS, PATTERN_MODULES, Outputs
from mpanet_jax.models.mpanet import MPANet as Network
from mpanet_jax.models.resnet import make_backbone
from mpanet_jax.name_map import NameMap
from mpanet_jax.settings import IMAGENET, MOST_EPOCHS, ModelSettings, Settings, start_setting
from mpanet_jax.settings_base import at_least, between, group, one_of, setting


@dataclass(frozen=True)
class MPANetModelSettings(ModelSettings):
    """The network of figure 2 and its ablations."""

    channel_module: str = setting("mam", "after stages 3 and 4", one_of(*CHANNEL_MODULES))
    pattern_module: str = setting("pam", "what makes the feature f", one_of(*PATTERN_MODULES))
    num_patterns: int = setting(6, "l", between(1, 256))
    reduction: int = setting(16, "r of eq. 2", at_least(1))

    def check(self) -> Iterator[tuple[str, str]]:
        """The mask's hidden layer has a whole number of channels."""
        channels = make_backbone(self.backbone, self.stage_sizes, self.width).channels(3)
        if channels % self.reduction and self.channel_module in ("mam", "se", "cbam"):
            yield "reduction", f"it has to divide the {channels} channels of stage 3"


@dataclass(frozen=True)
class LossSettings:
    """The weights of eq. 14 (0 leaves a term out), the margin, and where the published program's losses differ."""

    identity: float = setting(1.0, "of L_id", at_least(0))
    center_cluster: float = setting(1.0, "of L_cc", at_least(0))
    separation: float = setting(0.5, "λ₁, of L_sep", at_least(0))
    modality_identity: float = setting(0.5, "λ₂, of L_sid", at_least(0))
    mutual_mean: float = setting(2.5, "λ₃, of L_MM", at_least(0))
    margin: float = setting(0.7, "ρ of eq. 13", at_least(0))
    per_modality_identity: bool = setting(True, "L_id as two means, summed; False: one mean over the batch")
    student_first: bool = setting(False, "L_MM as KL(own ‖ mean), one mean; False: eq. 10")


TERMS = ("identity", "center_cluster", "separation", "modality_identity", "mutual_mean")


@dataclass(frozen=True)
class MeanSettings:
    """The mean classifiers, eq. 11."""

    rate: float = setting(0.2, "α", between(0, 1))
    epochs_at_full: int = setting(0, "E > 0: α·min(E/(epoch+1), 1); 0: α is constant", between(0, MOST_EPOCHS))


@dataclass(frozen=True)
class MPANetSettings(Settings):
    """MPANet's settings; the defaults are the paper's recipe on SYSU-MM01."""

    init_from: str = start_setting(IMAGENET)
    model: MPANetModelSettings = group(MPANetModelSettings)
    loss: LossSettings = group(LossSettings)
    mean: MeanSettings = group(MeanSettings)

    def check(self) -> Iterator[tuple[str, str]]:
        """The preset agrees with the other fields, and at least one loss has a weight."""
        official = (not self.loss.per_modality_identity, self.loss.student_first, self.mean.epochs_at_full)
        if self.preset != "paper" and not any(official):
            yield (
                "preset",
                "the other fields are still the paper's; choose a preset after the name of the config file: "
                f"--config=configs/NAME.py:{self.preset}",
            )
        if not any(getattr(self.loss, term) for term in TERMS):
            yield "loss.identity", "all weights are 0, so nothing is learned; give one of them a value"


def mean_rate_schedule(rate: float, epochs_at_full: int, steps_per_epoch: int) -> optax.Schedule:
    """α of eq. 11 by step.

    Args:
      rate: α.
      epochs_at_full: 0 keeps α constant (the paper). A number E gives α·min(E/(epoch+1), 1) with the epoch counted
        from 1 (the published program: E = 100).
      steps_per_epoch: number of steps in an epoch.
    """

    def schedule(step: Any) -> Array:
        if not epochs_at_full:
            return jnp.asarray(rate)
        epoch = step // steps_per_epoch + 1
        return rate * jnp.minimum(epochs_at_full / (epoch + 1.0), 1)

    return schedule


@dataclass(frozen=True)
class MPANet(Method):
    """The network of figure 2, trained with the loss of eq. 14."""

    settings: MPANetSettings

    def network(self, num_ids: int, axis_name: str | None = None) -> Network:
        """The network of `models/mpanet.py`."""
        model = self.settings.model
        return Network(
            num_ids,
            make_backbone(model.backbone, model.stage_sizes, model.width),
            channel_module=model.channel_module,
            pattern_module=model.pattern_module,
            num_patterns=model.num_patterns,
            reduction=model.reduction,
            **self.layer_types(),
            axis_name=axis_name,
        )

    def names(self) -> NameMap:
        """The names in the published program's checkpoints."""
        backbone = super().names()
        return replace(
            backbone,
            rules=(
                (f"^(?={backbone.backbone})", "backbone/"),
                *backbone.rules,
                (r"^averages/(.*)$", r"\1_"),
                (r"^mam(\d)/mask/", r"backbone/MAM\1/channel_attention/"),
                (r"^cbam(\d)/mask/", r"backbone/CBAM\1/mlp/"),
                (r"^cbam(\d)/", r"backbone/CBAM\1/"),
                (r"/w1$", "/0/weight"),
                (r"/w2$", "/2/weight"),
                (r"^pam/", "spatial_attention/"),
                (r"^neck/", "bn_neck/"),
                (r"classifier_?$", r"\g<0>/weight"),
            ),
            linear=r"(visible_|infrared_)?classifier_?\.weight",
            zeros=("bn_neck.bias",),  # the neck's bias is no parameter here: it stays 0
            left_out=r"backbone\.fc\.\w+|fc\.\w+",
        )

    def pattern_maps(
        self,
        network: nn.Module,
        variables: Any,
        images: UInt8[Array, "b h w 3"],
        modality: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b l h2 w2"]:
        """PAM's maps, M of eq. 4.

        Raises:
          UserError: the network has no PAM.
        """
        if self.settings.model.pattern_module != "pam":
            module = self.settings.model.pattern_module
            raise UserError(f"model.pattern_module = {module!r}: there are no pattern maps; 'pam' has them")
        normalised = normalize(images, compute_dtype(self.settings.dtype))
        # The network returns maps over flattened positions; the last stage's output has their height and width.
        last = "stage4"
        outputs, state = network.apply(
            variables,
            normalised,
            modality,
            train=False,
            capture_intermediates=lambda module, _: module.name == last,
            mutable=["intermediates"],
        )
        height, width = state["intermediates"][last]["__call__"][0].shape[1:3]  # type: ignore[union-attr]
        maps = outputs.maps  # type: ignore[union-attr]
        return maps.reshape(len(maps), height, width, -1).transpose(0, 3, 1, 2)

    def averaged(self, params: Any) -> dict[str, Array]:
        """The kernels θ_v and θ_r; their averages are the mean classifiers."""
        return {name: params[name] for name in MODALITY_CLASSIFIERS}

    def average_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """α of eq. 11."""
        mean = self.settings.mean
        return mean_rate_schedule(mean.rate, mean.epochs_at_full, steps_per_epoch)

    def loss_weights(self) -> Mapping[str, float]:
        """1, 1, λ₁, λ₂ and λ₃ of eq. 14."""
        return {term: getattr(self.settings.loss, term) for term in TERMS}

    def loss_terms(
        self, outputs: Outputs, rows: Rows, averages: dict[str, Array], axis_name: str | None = None
    ) -> dict[str, Float[Array, ""]]:
        """The terms whose weight is not 0."""
        settings, labels, modality = self.settings.loss, rows["labels"], rows["modality"]
        visible, infrared = outputs.visible_logits, outputs.infrared_logits
        terms = {}
        if settings.identity:
            terms["identity"] = losses.identity_loss(
                outputs.logits, labels, modality, per_modality=settings.per_modality_identity, axis_name=axis_name
            )
        if settings.center_cluster:
            terms["center_cluster"] = losses.center_cluster_loss(
                outputs.features,
                images_per_id=self.settings.data.images_per_id,
                margin=settings.margin,
                axis_name=axis_name,
            )
        if settings.separation:
            terms["separation"] = losses.separation_loss(outputs.maps, axis_name=axis_name)
        if settings.modality_identity:
            terms["modality_identity"] = losses.modality_identity_loss(
                visible, infrared, labels, modality, axis_name=axis_name
            )
        if settings.mutual_mean:
            # No gradient reaches the features through the mean classifiers' predictions.
            embedding, dtype = lax.stop_gradient(outputs.embedding), compute_dtype(self.settings.dtype)
            mean_visible, mean_infrared = (linear(embedding, averages[name], dtype) for name in MODALITY_CLASSIFIERS)
            terms["mutual_mean"] = losses.mutual_mean_loss(
                visible,
                infrared,
                mean_visible,
                mean_infrared,
                modality,
                student_first=settings.student_first,
                axis_name=axis_name,
            )
        return terms
