"""One iteration, whole: augment → network → losses → gradients → Adam → mean classifiers.

The functions are pure and SPMD: what one device does with its share of the batch. With `axis_name` set they run under
`jax.pmap` or `jax.shard_map`, and N devices compute what one device computes with the whole batch.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from mpanet_jax import losses
from mpanet_jax.data.augment import AugmentSettings, augment, normalize
from mpanet_jax.losses import LossSettings
from mpanet_jax.models.mpanet import CLASSIFIERS, MODALITY_CLASSIFIERS, MPANet, Outputs, linear, sum_gradient
from mpanet_jax.state import TrainState, modality_classifiers

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


def loss_terms(
    outputs: Outputs,
    mean_classifiers: dict[str, Array],
    batch: Batch,
    *,
    settings: LossSettings,
    images_per_id: int,
    dtype: DTypeLike,
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """This device's share of every loss term whose weight is not 0, under the names of `LossSettings`."""
    labels, modality = batch["labels"], batch["modality"]
    terms = {}
    if settings.identity:
        terms["identity"] = losses.identity_loss(
            outputs.logits, labels, modality, per_modality=settings.per_modality_identity, axis_name=axis_name
        )
    if settings.center_cluster:
        terms["center_cluster"] = losses.center_cluster_loss(
            outputs.features, images_per_id=images_per_id, margin=settings.margin, axis_name=axis_name
        )
    if settings.separation:
        terms["separation"] = losses.separation_loss(outputs.maps, axis_name=axis_name)
    visible, infrared = outputs.visible_logits, outputs.infrared_logits
    if settings.modality_identity:
        terms["modality_identity"] = losses.modality_identity_loss(
            visible, infrared, labels, modality, axis_name=axis_name
        )
    if settings.mutual_mean:
        # No gradient reaches the features through the mean classifiers' predictions.
        embedding = lax.stop_gradient(outputs.embedding)
        mean_visible, mean_infrared = (
            linear(embedding, mean_classifiers[name], dtype) for name in MODALITY_CLASSIFIERS
        )
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


def _accuracy_share(logits: Float[Array, "b n"], labels: Array, axis_name: str | None) -> Float[Array, ""]:
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return (logits.argmax(-1) == labels).mean() / devices


def total_gradients(gradients: Any, batch_stats: Any, dtype: DTypeLike, axis_name: str) -> Any:
    """The gradients of the whole batch from those of every device's share.

    Args:
      gradients: of the parameters. Those of batch norm and of the classifiers are sums over the devices already and
        stay as they are.
      batch_stats: the running statistics: a layer that has some is a batch norm.
      dtype: the others are summed in it. Most come out of products in this type; those that come in float32 are rounded
        to bfloat16, which halves the bytes that the devices exchange.
      axis_name: the mapped axis.

    Returns:
      The sums, in the types of `gradients`.
    """
    batch_norms = {path[:-1] for path in flatten_dict(batch_stats)}

    def total(path: tuple[str, ...], gradient: Array) -> Array:
        if path[0] in CLASSIFIERS or path[:-1] in batch_norms:
            return gradient
        return sum_gradient(gradient, dtype, axis_name)

    return path_aware_map(total, gradients)


def train_step(
    state: TrainState,
    batch: Batch,
    image_cache: UInt8[Array, "n h w 3"] | None = None,
    *,
    model: MPANet,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    mean_rate: optax.Schedule,
    loss_settings: LossSettings,
    augment_settings: AugmentSettings | None,
    images_per_id: int,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One training step.

    Args:
      state: the state, replicated over the devices.
      batch: this device's share of the train batch (DESIGN: "Train batch"): `labels`, `modality` and `images`, or
        `index` into `image_cache` in place of `images`. Whole identities only.
      image_cache: the resized training set in device memory, or None.
      model: the network; its `axis_name` is the step's.
      optimizer: the optax chain; `learning_rate` is its schedule, for the log.
      mean_rate: α of eq. 11 by step.
      loss_settings: weights and preset of the losses.
      augment_settings: None only normalises.
      images_per_id: K.
      axis_name: the mapped axis, None on one device.

    Returns:
      The next state, and scalars of the global batch: every loss term, `loss`, `accuracy` (of C, on the augmented
      images) and `learning_rate`.
    """
    images = batch["images"] if image_cache is None else image_cache[batch["index"]]
    if augment_settings is None:
        images = normalize(images, model.dtype)
    else:
        # fold_in by step and by place in the global batch: the draws depend on neither the devices nor the history.
        first = 0 if axis_name is None else lax.axis_index(axis_name) * len(images)
        key = jax.random.fold_in(state.rng, state.step)
        images = augment(key, images, augment_settings, dtype=model.dtype, first_index=first)

    # Eq. 11, before the loss reads E; the same as after every optimiser step.
    mean_classifiers = optax.incremental_update(
        modality_classifiers(state.params), state.mean_classifiers, mean_rate(state.step)
    )

    def loss_share(params: Any) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, mutated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        terms = loss_terms(
            outputs,
            mean_classifiers,
            batch,
            settings=loss_settings,
            images_per_id=images_per_id,
            dtype=model.dtype,
            axis_name=axis_name,
        )
        loss = losses.total_loss(terms, loss_settings)
        accuracy = _accuracy_share(outputs.logits, batch["labels"], axis_name)
        return loss, ({**terms, "loss": loss, "accuracy": accuracy}, mutated["batch_stats"])

    gradients, (metrics, batch_stats) = jax.grad(loss_share, has_aux=True)(state.params)
    if axis_name is not None:
        gradients = total_gradients(gradients, batch_stats, model.dtype, axis_name)
        metrics = lax.psum(metrics, axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
    next_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        mean_classifiers=mean_classifiers,
    )
    return next_state, metrics


def train_steps(
    state: TrainState, batches: Batch, image_cache: UInt8[Array, "n h w 3"] | None = None, **settings: Any
) -> tuple[TrainState, dict[str, Float[Array, " steps"]]]:
    """Several training steps as one program, which leaves no gaps between them on the device.

    Args:
      state: as for `train_step`.
      batches: the batches of the steps, stacked: arrays [steps, b, …].
      image_cache: as for `train_step`.
      **settings: the keyword arguments of `train_step`.

    Returns:
      The state after the last step, and every step's metrics, stacked.
    """
    step = partial(train_step, **settings)
    if len(batches["labels"]) > 1:
        return lax.scan(lambda state, batch: step(state, batch, image_cache), state, batches)
    # A loop of one would cost more than it saves: on CPU, XLA runs convolutions inside loops on one thread.
    state, metrics = step(state, {name: rows[0] for name, rows in batches.items()}, image_cache)
    return state, {name: value[None] for name, value in metrics.items()}


def embed_step(variables: Any, images: UInt8[Array, "b h w 3"], *, model: MPANet) -> Float[Array, "b d"]:
    """Embeddings g (after the neck, running statistics, not L2-normalised) of resized bytes, in float32."""
    return model.apply(variables, normalize(images, model.dtype), train=False).embedding
