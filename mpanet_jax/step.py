"""One training step: augment → network → losses → gradients → optimiser → averages.

The functions are pure and SPMD: they are what one device does with its share of the batch. With an `axis_name` they run
under `jax.pmap` or `jax.shard_map`, and N devices compute what one device would compute with the whole batch.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from mpanet_jax.methods.method import Method, compute_dtype
from mpanet_jax.models.layers import SUMMED, sum_gradient
from mpanet_jax.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


def _accuracy_share(logits: Float[Array, "b n"], labels: Array, axis_name: str | None) -> Float[Array, ""]:
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    of_label = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return (of_label == logits.max(1)).mean(dtype=logits.dtype) / devices


def total_gradients(gradients: Any, summed: Any, dtype: DTypeLike, axis_name: str) -> Any:
    """Sums the gradients of all devices' shares to those of the whole batch.

    Args:
      gradients: of this device's share, a tree like the parameters.
      summed: a tree of the gradients that their layers have already summed over the devices, as
        `layers.mark_gradients_summed` notes them; these stay as they are.
      dtype: the type in which the others are summed. Most come out of products of this type; with bfloat16, those of
        float32 are rounded to it, which halves the bytes that the devices exchange.
      axis_name: the mapped axis.

    Returns:
      The sums, in the types of `gradients`.
    """
    names = set(flatten_dict(summed))
    return path_aware_map(
        lambda path, gradient: gradient if path in names else sum_gradient(gradient, dtype, axis_name), gradients
    )


def train_step(
    state: TrainState,
    batch: Batch,
    image_cache: UInt8[Array, "n h row"] | None = None,
    *,
    method: Method,
    network: nn.Module,
    steps_per_epoch: int,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One training step.

    Args:
      state: the state, replicated over the devices.
      batch: this device's share of the train batch (docs/method.md, "A train batch"): `labels`, `modality` and
        `images`, or `index` into `image_cache` in place of `images`. Whole identities only.
      image_cache: the resized training set in device memory, [N, height, width·3], or None.
      method: says the losses, the augmentation, the optimiser, and which parameters are averaged.
      network: the method's, built for `axis_name`.
      steps_per_epoch: for the schedules.
      axis_name: the mapped axis, None on one device.

    Returns:
      The next state, and scalars of the global batch: every loss term, `loss`, `accuracy` (on the augmented images)
      and `learning_rate`; with settings.train.on_nonfinite = 'skip' also `skipped`: 1 where the loss, the new weights
      or the new moments are not finite, and the state stays as it was but for its step.
    """
    images = batch["images"] if image_cache is None else _cached_images(image_cache, batch["index"])
    rows = {name: batch[name] for name in ("labels", "modality")}
    # The keys depend on the step and on the place in the global batch, so neither on the devices nor on the history.
    first = 0 if axis_name is None else lax.axis_index(axis_name) * len(images)
    images, rows = method.views(jax.random.fold_in(state.rng, state.step), images, rows, first)

    # The averages are updated before the loss reads them (eq. 11), which is the same as after each optimiser step.
    averages = optax.incremental_update(
        method.averaged(state.params), state.averages, method.average_rate(steps_per_epoch)(state.step)
    )
    weights = method.loss_weights()

    def loss_share(params: Any) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        with method.matmul_precision():
            outputs, noted = network.apply(
                variables, images, rows["modality"], train=True, mutable=["batch_stats", SUMMED]
            )
            terms = method.loss_terms(outputs, rows, averages, axis_name)
        loss = sum((weights[name] * terms[name] for name in terms if name in weights), jnp.zeros(()))
        accuracy = _accuracy_share(outputs.logits, rows["labels"], axis_name)
        return loss, ({**terms, "loss": loss, "accuracy": accuracy}, noted)

    gradients, (metrics, noted) = jax.grad(loss_share, has_aux=True)(state.params)
    if axis_name is not None:
        dtype = compute_dtype(method.settings.dtype)
        gradients = total_gradients(gradients, noted.get(SUMMED, {}), dtype, axis_name)
        metrics = lax.psum(metrics, axis_name)
    learning_rate = method.learning_rate(steps_per_epoch)
    updates, opt_state = method.optimizer(learning_rate).update(gradients, state.opt_state, state.params)
    metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
    # flax.linen's own batch norm has float32 statistics, whatever the network's type is.
    batch_stats = jax.tree.map(lambda new, old: new.astype(old.dtype), noted.get("batch_stats", {}), state.batch_stats)
    next_state = state.replace(
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        averages=averages,
    )
    if method.settings.train.on_nonfinite == "skip":
        finite = _all_finite((metrics["loss"], next_state.params, next_state.batch_stats, next_state.opt_state))
        next_state = jax.tree.map(lambda new, old: lax.select(finite, new, old), next_state, state)
        metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    return next_state.replace(step=state.step + 1), metrics


def _cached_images(image_cache: UInt8[Array, "n h row"], index: Int[Array, " b"]) -> UInt8[Array, "b h w 3"]:
    images = image_cache[index]
    return images.reshape(*images.shape[:2], -1, 3)


def _all_finite(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
    # The least of them, found by sorting: XLA would compute `.all()` of them anew for every array that is chosen by it,
    # and on a CPU compile four times as long.
    return lax.sort(finite)[0]


def train_steps(
    state: TrainState, batches: Batch, image_cache: UInt8[Array, "n h row"] | None = None, **options: Any
) -> tuple[TrainState, dict[str, Float[Array, " steps"]]]:
    """Several training steps as one program, so that the device does not wait between them.

    Args:
      state: as for `train_step`.
      batches: the batches of the steps, stacked: arrays [steps, b, …].
      image_cache: as for `train_step`.
      **options: the keyword arguments of `train_step`.

    Returns:
      The state after the last step, and every step's metrics, stacked.
    """
    step = partial(train_step, **options)
    if len(batches["labels"]) > 1:
        return lax.scan(lambda state, batch: step(state, batch, image_cache), state, batches)
    # One step needs no loop, and on CPUs XLA would run the convolutions inside it on one thread.
    state, metrics = step(state, {name: rows[0] for name, rows in batches.items()}, image_cache)
    return state, {name: value[None] for name, value in metrics.items()}
