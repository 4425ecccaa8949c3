"""The training state: what one step hands to the next."""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray


class TrainState(flax.struct.PyTreeNode):
    """The whole state of training.

    Attributes:
      step: optimiser steps done.
      params: the network's trained parameters.
      batch_stats: the running statistics of every batch norm; {} for a network without batch norm.
      opt_state: the state of the optax chain, such as Adam's moments.
      averages: exponential averages of the parameters that the method chooses, in the same tree; {} for none.
      rng: the key from which every step derives its own; it never changes.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    averages: Any
    rng: PRNGKeyArray


def random_keys(seed: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Two keys from a seed: that of the initialisation, and the state's `rng`."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_key, run_key


def init_variables(network: nn.Module, key: PRNGKeyArray, height: int, width: int) -> dict[str, Any]:
    """Draws a network's variables.

    Args:
      network: built without a mapped axis; its fields can be hashed, as tuples can and lists cannot. Equal networks
        are traced once.
      key: of the draws.
      height, width: of the images, in pixels.

    Returns:
      {"params", "batch_stats"}.
    """
    variables = _init(network, key, height, width)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


@partial(jax.jit, static_argnames=("network", "height", "width"))
def _init(network: nn.Module, key: PRNGKeyArray, height: int, width: int) -> Any:
    images, modality = jnp.zeros((2, height, width, 3)), jnp.arange(2, dtype=jnp.int32)
    return network.init(key, images, modality, train=False)


def create_train_state(
    variables: Any, averaged: Any, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step.

    Args:
      variables: {"params", "batch_stats"}.
      averaged: the parameters of which averages are kept; the averages start as copies of them.
      optimizer: the optax chain.
      key: the state's `rng`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        averages=jax.tree.map(jnp.copy, averaged),
        rng=key,
    )


def copy_on_device(tree: Any) -> Any | None:
    """The arrays of a tree in other memory of the same devices, so that the tree may be donated; None without room.

    Args:
      tree: of arrays of this process's devices alone.
    """
    try:
        return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, tree), may_alias=False)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
