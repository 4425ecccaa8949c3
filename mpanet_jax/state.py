"""What training carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from mpanet_jax.models.mpanet import MODALITY_CLASSIFIERS, MPANet


@flax.struct.dataclass
class TrainState:
    """The whole state of training.

    Attributes:
      step: optimiser steps done.
      params: the network's trained parameters.
      batch_stats: running mean and (unbiased) variance of every batch norm.
      opt_state: the optax chain's state (Adam's moments).
      mean_classifiers: E[θ_v] and E[θ_r] of eq. 11, under the names of the classifiers they follow.
      rng: the key that every step's randomness is folded from; it never changes.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    mean_classifiers: dict[str, Array]
    rng: PRNGKeyArray


def modality_classifiers(params: Any) -> dict[str, Array]:
    """θ_v and θ_r."""
    return {name: params[name] for name in MODALITY_CLASSIFIERS}


def init_variables(model: MPANet, key: PRNGKeyArray, height: int, width: int) -> Any:
    """Random `{"params", "batch_stats"}` of the model for height × width images."""
    # Statistics need no devices to agree at initialisation, so the mapped axis is left out.
    images = jnp.zeros((2, height, width, 3), model.param_dtype)
    return jax.jit(lambda k: model.clone(axis_name=None).init(k, images, train=False))(key)


def create_train_state(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step: the mean classifiers start as copies of C_v and C_r."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        mean_classifiers=jax.tree.map(jnp.copy, modality_classifiers(params)),
        rng=key,
    )
