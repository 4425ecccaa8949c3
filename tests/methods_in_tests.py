"""Small methods for tests: MPANet at toy size, and one of plain flax.linen layers that the package knows nothing of."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpanet_jax.losses import identity_loss
from mpanet_jax.methods.method import Method, compute_dtype
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.settings_base import replace
from mpanet_jax.state import TrainState, create_train_state, init_variables

NO_AUGMENTATION = {"augment.flip_probability": 0.0, "augment.erase_probability": 0.0}
SMALL = {"model.stage_sizes": (1, 1, 1, 1), "model.width": 8}
OFFICIAL = {
    "loss.modality_identity": 1.0,
    "loss.per_modality_identity": False,
    "loss.student_first": True,
    "mean.epochs_at_full": 100,
}


class TwoBlocks:
    """Mixed into a method: its network with blocks in stages 3 and 4 alone, which the settings do not allow.

    Their shortcuts are projected, at stride 2 and at stride 1.
    """

    def network(self, num_ids, axis_name=None):
        network = super().network(num_ids, axis_name)
        return network.clone(backbone=dataclasses.replace(network.backbone, stage_sizes=(0, 0, 1, 1)))


class MPANetOfTwoBlocks(TwoBlocks, MPANet):
    """MPANet's."""


def small_mpanet(**fields: Any) -> MPANet:
    """MPANet of one block a stage; `fields` with "__" for "."."""
    return MPANet(replace(MPANetSettings(), {**SMALL, **{k.replace("__", "."): v for k, v in fields.items()}}))


def drawn_variables(network: nn.Module, height: int, width: int) -> dict[str, Any]:
    """A network's variables, drawn by NumPy: its own draws compile for seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        names = tuple(entry.key for entry in path)
        if len(leaf.shape) > 1:
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif names[-1] == "bias":  # not 0, for some have no gradient, and Adam would follow its rounding
            values = rng.uniform(-0.1, 0.1, leaf.shape)
        else:  # the scale of a non-local block's batch norm begins at 0
            values = np.full(leaf.shape, float(names[-1] in ("scale", "var") and names[-2:] != ("bn", "scale")))
        return jnp.asarray(values, leaf.dtype)

    shapes = jax.eval_shape(lambda key: init_variables(network, key, height, width), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def start(method: Method, num_ids: int, height: int, width: int, steps_per_epoch: int = 10) -> TrainState:
    """The state before the first step, with `drawn_variables`."""
    variables = drawn_variables(method.network(num_ids), height, width)
    if method.settings.dtype == "float64":  # flax.linen's batch norm starts in float32
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    optimizer = method.optimizer(method.learning_rate(steps_per_epoch))
    create = jax.jit(lambda v, key: create_train_state(v, method.averaged(v["params"]), optimizer, key))
    return create(variables, jax.random.key(1))


class LinenOutputs(NamedTuple):
    """Of `LinenNetwork`."""

    embedding: jax.Array
    logits: jax.Array


class LinenNetwork(nn.Module):
    """Nothing but layers of flax.linen, with its own batch norm over the devices."""

    num_ids: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, images, modality, *, train):
        norm = {"use_running_average": not train, "momentum": 0.9, "axis_name": self.axis_name}
        options = {"dtype": self.dtype, "param_dtype": jnp.promote_types(self.dtype, jnp.float32)}
        x = nn.Conv(8, (3, 3), 2, **options)(images)
        x = nn.relu(nn.BatchNorm(**norm, **options)(x))
        # A layer that does not treat both modalities alike.
        x = x * nn.Embed(2, 8, **options)(modality)[:, None, None]
        x = nn.BatchNorm(**norm, **options)(nn.Conv(16, (3, 3), 2, **options)(x)).mean((1, 2))
        return LinenOutputs(x, nn.Dense(self.num_ids, **options)(nn.LayerNorm(**options)(x)))


class LinenMethod(Method):
    """Cross-entropy on `LinenNetwork`."""

    needs_modality = True

    def network(self, num_ids, axis_name=None):
        return LinenNetwork(num_ids, compute_dtype(self.settings.dtype), axis_name)

    def loss_terms(self, outputs, rows, averages, axis_name=None):
        loss = identity_loss(outputs.logits, rows["labels"], rows["modality"], per_modality=False, axis_name=axis_name)
        return {"cross_entropy": loss}

    def loss_weights(self):
        return {"cross_entropy": 1.0}
