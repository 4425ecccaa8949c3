import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mpanet_jax.optim import adam, step_decay


def test_learning_rate_drops_after_the_milestone_epochs():
    schedule = step_decay(3.5e-4, (80, 120), 0.1, steps_per_epoch=10)
    for step, expected in [(0, 3.5e-4), (799, 3.5e-4), (800, 3.5e-5), (1199, 3.5e-5), (1200, 3.5e-6)]:
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)


def test_adam_with_l2_equals_torch():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3))
    gradients = rng.normal(size=(6, 4, 3))
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.Adam([theirs], lr=1e-2, weight_decay=5e-4)
    with jax.enable_x64(True):
        optimizer = adam(1e-2, 5e-4)
        ours = jnp.asarray(start)
        state = optimizer.init(ours)
        for gradient in gradients:
            theirs.grad = torch.tensor(gradient)
            reference.step()
            updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
            ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)
