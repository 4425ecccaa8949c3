"""Adam and SGD with L2 weight decay, and the learning rate's schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jaxtyping import Array


def step_decay(
    learning_rate: float, milestones: Sequence[int], decay: float, steps_per_epoch: int, warmup_epochs: int = 0
) -> optax.Schedule:
    """The learning rate as a function of the step: step decay, after a linear warm-up.

    Args:
      learning_rate: at the start.
      milestones: after each of these epochs the rate is multiplied by `decay`.
      decay: the factor.
      steps_per_epoch: steps in an epoch.
      warmup_epochs: E; in epoch e < E, counted from 0, the rate is multiplied by (e + 1)/E.
    """
    boundaries = {epoch * steps_per_epoch: decay for epoch in milestones}
    schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
    if not warmup_epochs:
        return schedule

    def warm(step: Any) -> Array:
        return jnp.asarray(schedule(step)) * jnp.minimum((step // steps_per_epoch + 1.0) / warmup_epochs, 1)

    return warm


def adam(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """Adam, as torch.optim.Adam(weight_decay=…): the decay is *L2*, added to the gradient before the moments.

    Every parameter is decayed. The BN neck's bias, which is not trained, is not a parameter here.
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
    """SGD, as torch.optim.SGD(weight_decay=…, momentum=…, nesterov=True), with a learning rate for each parameter.

    The decay is *L2*, added to the gradient before the momentum. The momentum does not contain the learning rate.

    Args:
      learning_rate: a number, or a function of the step.
      weight_decay: of every parameter.
      momentum: Nesterov's.
      rate_factor: path of a parameter → the factor of its learning rate.
    """

    def scale(updates: Any, params: Any = None) -> Any:
        return path_aware_map(lambda path, update: update * rate_factor(path), updates)

    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov=True),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(scale),
    )
