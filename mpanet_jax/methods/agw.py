"""AGW (Ye et al., TPAMI 2021): its settings, batches, losses and optimiser.

It is the usual baseline of this field. CAJ (`methods/caj.py`) shares its network, batches and optimiser.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.losses import batch_mean, identity_loss
from mpanet_jax.methods.method import Method, Rows, l2_normalize
from mpanet_jax.models.agw import AGW as Network
from mpanet_jax.models.agw import Outputs
from mpanet_jax.models.resnet import BACKBONES, ResNet, make_backbone
from mpanet_jax.name_map import NameMap
from mpanet_jax.optim import sgd, step_decay
from mpanet_jax.settings import (
    IMAGENET,
    MOST_EPOCHS,
    POSITIVE,
    RISING,
    AugmentSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    Settings,
    TrainSettings,
    start_setting,
)
from mpanet_jax.settings_base import at_least, between, group, one_of, setting

HEAD = ("neck", "classifier")  # the modules that learn at the full rate


@dataclass(frozen=True)
class AGWModelSettings(ModelSettings):
    """The network: a ResNet with two stems, non-local blocks and GeM."""

    def check(self) -> Iterator[tuple[str, str]]:
        """The non-local blocks go between the blocks of a ResNet."""
        if not isinstance(BACKBONES[self.backbone], ResNet):
            yield "backbone", "AGW and CAJ need a ResNet; take 'resnet50'"


@dataclass(frozen=True)
class AGWLossSettings:
    """Weights of the loss terms; 0 leaves a term out."""

    identity: float = setting(1.0, "of the cross-entropy", at_least(0))
    triplet: float = setting(1.0, "of the term on the pooled features", at_least(0))

    def check(self) -> Iterator[tuple[str, str]]:
        """At least one term has a weight."""
        if not self.identity and not self.triplet:
            yield "identity", "both weights are 0, so nothing is learned; give one of them a value"


@dataclass(frozen=True)
class SGDSettings(OptimSettings):
    """SGD with Nesterov momentum, a warm-up, and a smaller rate for all but neck and classifier."""

    learning_rate: float = setting(0.1, "of neck and classifier, after the warm-up", POSITIVE)
    milestones: tuple[int, ...] = setting((20, 50), "epochs after which the rate is multiplied by `decay`", RISING)
    warmup_epochs: int = setting(10, "E: epoch e, from 0, has (e + 1)/E of the rate; 0: none", between(0, MOST_EPOCHS))
    momentum: float = setting(0.9, "Nesterov's", between(0, 1))
    body_rate: float = setting(
        0.1, "the rate of all other parameters, as a share of that of neck and classifier", at_least(0)
    )


@dataclass(frozen=True)
class AGWSettings(Settings):
    """AGW's settings; the defaults are its recipe on SYSU-MM01."""

    method: str = setting("agw", "which method the other fields are of", one_of("agw"))
    init_from: str = start_setting(IMAGENET)
    data: DataSettings = group(DataSettings, height=288, width=144, num_ids_per_batch=8, resize="lanczos")
    augment: AugmentSettings = group(AugmentSettings, crop_padding=10, crop_fill=0, erase_probability=0.0)
    model: AGWModelSettings = group(AGWModelSettings)
    optim: SGDSettings = group(SGDSettings)
    train: TrainSettings = group(TrainSettings, num_epochs=81)
    loss: AGWLossSettings = group(AGWLossSettings)


@dataclass(frozen=True, eq=False)
class RandomBatchPlan(BatchPlan):
    """Draws P identities for every batch, without replacement, and their images at random.

    Each identity gets K/2 visible and K/2 infrared images, drawn with replacement. An epoch has floor(N / (P·K/2)) + 1
    batches, where N is the number of images of the modality that has more.
    """

    @cached_property
    def steps_per_epoch(self) -> int:
        """The number of batches in every epoch."""
        larger = max(np.bincount(self.modality, minlength=2))
        return int(larger) // (self.num_ids_per_batch * self.images_per_id // 2) + 1

    @cached_property
    def num_resampled(self) -> int:
        """Always 0: no identity is an exception, because all images are drawn with replacement."""
        return 0

    @cached_property
    def signature(self) -> str:
        """A text that differs between plans that draw different batches."""
        return f"random {super().signature}"

    def epoch(self, epoch: int) -> np.ndarray:
        """The image indices of all batches, int32[steps_per_epoch, P·K], ordered as in `BatchPlan`."""
        return _draw_epoch(self, epoch)


@lru_cache(maxsize=4)  # at the end of an epoch prefetching threads already read the next one
def _draw_epoch(plan: RandomBatchPlan, epoch: int) -> np.ndarray:
    generator = np.random.default_rng(np.random.SeedSequence([plan.seed, epoch]))
    images, half = plan.images_by_identity, plan.images_per_id // 2
    identities = [
        generator.choice(len(images), plan.num_ids_per_batch, replace=False) for _ in range(plan.steps_per_epoch)
    ]
    batches = [
        np.concatenate([generator.choice(of_modality, half) for identity in batch for of_modality in images[identity]])
        for batch in identities
    ]
    drawn = np.array(batches, np.int32)
    drawn.setflags(write=False)  # shared by the cache above
    return drawn


def weighted_distances(
    features: Float[Array, "b d"], labels: Int[Array, "b"], axis_name: str | None
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Weighted mean distances of each anchor to its positives and to its negatives.

    The anchors are this device's images. Distances to all images of the batch, on all devices, are
    d = √max(‖a − b‖², 1e-12). Positives, the anchor itself among them, have weights e^(d−m) / (Σ e^(d−m) + 1e-6), where
    m is the largest d among them; the gradient runs through m too. Negatives have weights e^(−d) / (Σ e^(−d) + 1e-6),
    which sum to less than 1 at large distances, because they are not shifted.

    Returns:
      d_p, d_n: to the positives and to the negatives.
    """
    others, their_labels = features, labels
    if axis_name is not None:
        others, their_labels = (lax.all_gather(rows, axis_name, tiled=True) for rows in (features, labels))
    squared = jnp.square(features[:, None] - others[None]).sum(-1)
    distance = jnp.sqrt(jnp.maximum(squared, 1e-12))
    positive = labels[:, None] == their_labels
    # By index, because the gradient of max looks for the entries that equal the maximum. XLA may compute the distances
    # a second time for that and round them differently; then no entry is equal.
    farthest = jnp.where(positive, distance, 0).argmax(1)
    largest = jnp.take_along_axis(distance, farthest[:, None], axis=1)
    d_p = _weighted_mean(distance, positive, distance - largest)
    d_n = _weighted_mean(distance, ~positive, -distance)
    return d_p, d_n


def _weighted_mean(
    distance: Float[Array, "b n"], counts: Bool[Array, "b n"], logits: Float[Array, "b n"]
) -> Float[Array, "b"]:
    weights = jnp.where(counts, jnp.exp(jnp.where(counts, logits, 0)), 0)
    return (distance * weights).sum(1) / (weights.sum(1) + 1e-6)


def weighted_triplet(
    features: Float[Array, "b d"], labels: Int[Array, "b"], axis_name: str | None = None
) -> Float[Array, ""]:
    """This device's share of the weighted regularised triplet loss, the batch mean of log(1 + e^(d_p − d_n)).

    `weighted_distances` defines d_p and d_n.
    """
    d_p, d_n = weighted_distances(features, labels, axis_name)
    return batch_mean(jax.nn.softplus(d_p - d_n), axis_name)


@dataclass(frozen=True)
class AGW(Method):
    """AGW's network, trained with cross-entropy and the weighted regularised triplet loss."""

    settings: AGWSettings

    needs_modality: ClassVar[bool] = True
    visible_share: ClassVar[float] = 0.5  # share of visible images in what `views` returns

    def network(self, num_ids: int, axis_name: str | None = None) -> Network:
        """The network of `models/agw.py`."""
        model = self.settings.model
        backbone = make_backbone(model.backbone, model.stage_sizes, model.width)
        assert isinstance(backbone, ResNet)  # by the rule of the settings
        return Network(
            num_ids,
            backbone,
            visible_share=self.visible_share,
            **self.layer_types(),
            axis_name=axis_name,
        )

    def names(self) -> NameMap:
        """The names in the published program's checkpoints, which hold three whole ResNets and use a part of each."""
        backbone = super().names()
        return replace(
            backbone,
            rules=(
                (r"^visible/stem/", "visible_module/visible/"),
                (r"^infrared/stem/", "thermal_module/thermal/"),
                (r"^(?=stage\d)", "base_resnet/base/"),
                *backbone.rules,
                (r"^non_local(\d)_(\d)/", r"NL_\1/\2/"),
                (r"(NL_\d/\d)/g/", r"\1/g/0/"),
                (r"(NL_\d/\d)/w/", r"\1/W/0/"),
                (r"(NL_\d/\d)/bn/", r"\1/W/1/"),
                (r"^neck/", "bottleneck/"),
                (r"^classifier$", "classifier/weight"),
            ),
            backbone_rules=((r"^(visible|infrared)/", ""), *backbone.rules),
            backbone=r"((visible|infrared)/stem|stage\d)/",
            zeros=("bottleneck.bias",),  # the neck's bias is no parameter here: it stays 0
            left_out=r"(visible_module\.visible|thermal_module\.thermal)\.(layer\d|fc)\..*"
            r"|base_resnet\.base\.(conv1|bn1|fc)\..*|fc\.\w+",
        )

    def batch_plan(self, pids: np.ndarray, modality: np.ndarray, num_ids_per_batch: int) -> BatchPlan:
        """Draws identities and images anew for every batch."""
        settings = self.settings
        return RandomBatchPlan(pids, modality, num_ids_per_batch, settings.data.images_per_id, settings.seed)

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """The rate of neck and classifier: a linear warm-up by epochs, then step decay."""
        optim = self.settings.optim
        return step_decay(optim.learning_rate, optim.milestones, optim.decay, steps_per_epoch, optim.warmup_epochs)

    def optimizer(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """SGD with Nesterov momentum and L2, and `optim.body_rate` of the rate for all but neck and classifier."""
        optim = self.settings.optim

        def rate_factor(path: Sequence[Any]) -> float:
            return 1.0 if path[0] in HEAD else optim.body_rate

        return sgd(learning_rate, optim.weight_decay, optim.momentum, rate_factor)

    def loss_weights(self) -> Mapping[str, float]:
        """1 and 1 by default."""
        return {"identity": self.settings.loss.identity, "triplet": self.settings.loss.triplet}

    def loss_terms(
        self, outputs: Outputs, rows: Rows, averages: Any, axis_name: str | None = None
    ) -> dict[str, Float[Array, ""]]:
        """The terms whose weight is not 0."""
        settings, labels = self.settings.loss, rows["labels"]
        terms = {}
        if settings.identity:
            terms["identity"] = identity_loss(
                outputs.logits, labels, rows["modality"], per_modality=False, axis_name=axis_name
            )
        if settings.triplet:
            terms["triplet"] = self.triplet(outputs.features, labels, axis_name)
        return terms

    def triplet(
        self, features: Float[Array, "b d"], labels: Int[Array, "b"], axis_name: str | None
    ) -> Float[Array, ""]:
        """This device's share of the term on the pooled features."""
        return weighted_triplet(features, labels, axis_name)

    def embed(
        self, network: nn.Module, variables: Any, images: Array, modality: Array | None = None
    ) -> Float[Array, "b d"]:
        """The neck's output, L2-normalised: AGW compares by the cosine on every data set."""
        return l2_normalize(super().embed(network, variables, images, modality))
