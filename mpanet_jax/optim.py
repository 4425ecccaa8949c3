"""Adam and SGD with L2 weight decay, and the schedule of their learning rate."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jaxtyping import Array


def step_decay(
    learning_rate: float, milestones: Sequence[int], decay: float, steps_per_epoch: int, warmup_epochs: int = 0
) -> optax.Schedule:
    """Step decay: `learning_rate`, times `decay` once each of the `milestones` (in epochs) has been trained.

    In epoch e of the first E = `warmup_epochs`, counted from 0, times (e + 1)/E.
    """
    boundaries = {epoch * steps_per_epoch: decay for epoch in milestones}
    schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
    if not warmup_epochs:
        return schedule

    def warm(step: Any) -> Array:
        return jnp.asarray(schedule(step)) * jnp.minimum((step // steps_per_epoch + 1.0) / warmup_epochs, 1)

    return warm


def adam(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """Adam as torch.optim.Adam(weight_decay=…): the decay is *L2*, added to the gradient before the moments.

    It decays every parameter; the BN neck's bias, which is not trained, is not a parameter here.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    momentum: float,
    rate_factor: Callable[[Sequence[Any]], float] = lambda path: 1.0,
) -> optax.GradientTransformation:
    """SGD as torch.optim.SGD(weight_decay=…, momentum=…, nesterov=True), with a rate for every parameter.

    The decay is *L2*, added to the gradient before the momentum; the rate does not enter the momentum.

    Args:
      learning_rate: by step.
      weight_decay: of every parameter.
      momentum: Nesterov's.
      rate_factor: by the path of a parameter, a factor of the learning rate.
    """

    def scale(updates: Any, params: Any = None) -> Any:
        return path_aware_map(lambda path, update: update * rate_factor(path), updates)

    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov=True),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(scale),
    )
