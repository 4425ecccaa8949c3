"""Adam with L2 weight decay, and the schedules of learning rate and mean-classifier rate."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array


def step_decay(learning_rate: float, milestones: Sequence[int], decay: float, steps_per_epoch: int) -> optax.Schedule:
    """Step decay: `learning_rate`, times `decay` once each of the `milestones` (in epochs) has been trained."""
    boundaries = {epoch * steps_per_epoch: decay for epoch in milestones}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def mean_rate_schedule(rate: float, epochs_at_full: int | None, steps_per_epoch: int) -> optax.Schedule:
    """α of eq. 11 by step.

    Args:
      rate: α.
      epochs_at_full: None keeps α constant (the paper). A number E gives α·min(E/(epoch+1), 1) with the epoch counted
        from 1 (the published program: E = 100).
      steps_per_epoch: steps of an epoch.
    """

    def schedule(step: Any) -> Array:
        if epochs_at_full is None:
            return jnp.asarray(rate)
        epoch = step // steps_per_epoch + 1
        return rate * jnp.minimum(epochs_at_full / (epoch + 1.0), 1)

    return schedule


def adam(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """Adam as torch.optim.Adam(weight_decay=…): the decay is *L2*, added to the gradient before the moments.

    It decays every parameter; the BN neck's bias, which is not trained, is not a parameter here.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.scale_by_learning_rate(learning_rate),
    )
