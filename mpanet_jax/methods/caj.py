"""CAJ (Ye et al., ICCV 2021): channel augmentation and the enhanced squared difference, on AGW's network."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from mpanet_jax.data.augment import augment_image, grey, one_channel
from mpanet_jax.losses import batch_mean
from mpanet_jax.methods.agw import AGW, AGWSettings, weighted_distances
from mpanet_jax.methods.method import Rows, compute_dtype
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.settings import AugmentSettings, EvalSettings, TrainSettings
from mpanet_jax.settings_base import group, one_of, setting

CAP = 88.0  # the largest squared difference: e^88 is still a float32

ERASING = {
    "erase_area": (0.02, 0.4),
    "erase_aspect": (0.3, 1 / 0.3),
    "erase_log_aspect": False,
    "erase_attempts": 100,
    "erase_fill": (0.4914, 0.4822, 0.4465),
}


@dataclass(frozen=True)
class CAJSettings(AGWSettings):
    """CAJ's settings; the defaults are its recipe on SYSU-MM01."""

    method: str = setting("caj", "which method the other fields are of", one_of("caj"))
    augment: AugmentSettings = group(AugmentSettings, crop_padding=10, crop_fill=0, **ERASING)
    train: TrainSettings = group(TrainSettings, num_epochs=100)
    eval: EvalSettings = group(EvalSettings, flip=True)


def enhanced_squared_difference(
    features: Float[Array, "b d"], labels: Int[Array, "b"], axis_name: str | None = None
) -> Float[Array, ""]:
    """This device's share of the enhanced squared difference, the batch mean of log(1 + e^(−y s)).

    s = min((d_p − d_n)², 88); y = −1 where d_p > d_n, else 1. `weighted_distances` defines d_p and d_n. No gradient
    passes through y or through an s that is capped.
    """
    d_p, d_n = weighted_distances(features, labels, axis_name)
    squared = jnp.square(d_p - d_n)
    squared = jnp.where(squared < CAP, squared, CAP)
    return batch_mean(jax.nn.softplus(jnp.where(d_p > d_n, squared, -squared)), axis_name)


@dataclass(frozen=True)
class CAJ(AGW):
    """AGW's network, trained with cross-entropy and the enhanced squared difference over three views.

    Every visible image enters a batch twice, with a crop, flip and erasing of its own each time: once in its colours,
    and once with one channel, drawn uniformly, copied over the other two. An infrared image enters once: with
    probability ¼ one channel is copied over the others, else with probability ½ it becomes grey. Colours change after
    erasing, in the erased patch too.
    """

    settings: CAJSettings

    visible_share: ClassVar[float] = 2 / 3

    def views(
        self, key: PRNGKeyArray, images: UInt8[Array, "b h w 3"], rows: Rows, first_index: int | Int[Array, ""]
    ) -> tuple[Float[Array, "v h w 3"], Rows]:
        """The images of the batch, then the second views of its visible images."""
        per_id = self.settings.data.images_per_id
        first_key, second_key, colour_key = jax.random.split(key, 3)
        places = jnp.arange(len(images))
        visible = places.reshape(-1, per_id)[:, : per_id // 2].reshape(-1)  # each identity's visible images come first
        views = self._augmented(first_key, images, first_index + places)
        second = self._augmented(second_key, images[visible], first_index + visible)

        keys = _keys(colour_key, first_index + places)
        changed = jax.vmap(_infrared_colours)(keys, views)
        views = jnp.where((rows["modality"] == INFRARED)[:, None, None, None], changed, views)
        second = jax.vmap(one_channel)(keys[visible], second)
        labels = jnp.concatenate([rows["labels"], rows["labels"][visible]])
        modality = jnp.concatenate([rows["modality"], jnp.full(len(visible), VISIBLE, rows["modality"].dtype)])
        return jnp.concatenate([views, second]), {"labels": labels, "modality": modality}

    def _augmented(
        self, key: PRNGKeyArray, images: UInt8[Array, "b h w 3"], places: Int[Array, "b"]
    ) -> Float[Array, "b h w 3"]:
        settings, dtype = self.settings.augment, compute_dtype(self.settings.dtype)
        return jax.vmap(lambda k, image: augment_image(k, image, settings, dtype))(_keys(key, places), images)

    def triplet(
        self, features: Float[Array, "b d"], labels: Int[Array, "b"], axis_name: str | None
    ) -> Float[Array, ""]:
        """This device's share of the enhanced squared difference."""
        return enhanced_squared_difference(features, labels, axis_name)


def _keys(key: PRNGKeyArray, places: Int[Array, "b"]) -> PRNGKeyArray:
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)


def _infrared_colours(key: PRNGKeyArray, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    exchange_key, grey_key, channel_key = jax.random.split(key, 3)
    exchanged, greyed = jax.random.uniform(exchange_key) < 0.25, jax.random.uniform(grey_key) < 0.5
    return jnp.where(exchanged, one_channel(channel_key, image), jnp.where(greyed, grey(image), image))
