"""Adam with L2 weight decay, and the schedule of its learning rate."""

from collections.abc import Sequence

import optax


def step_decay(learning_rate: float, milestones: Sequence[int], decay: float, steps_per_epoch: int) -> optax.Schedule:
    """Step decay: `learning_rate`, times `decay` once each of the `milestones` (in epochs) has been trained."""
    boundaries = {epoch * steps_per_epoch: decay for epoch in milestones}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def adam(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """Adam as torch.optim.Adam(weight_decay=…): the decay is *L2*, added to the gradient before the moments.

    It decays every parameter; the BN neck's bias, which is not trained, is not a parameter here.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.scale_by_learning_rate(learning_rate),
    )
