import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from mpanet_jax.optim import adam, sgd, step_decay


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


def test_warm_up_rises_by_epochs():
    schedule = step_decay(0.1, (20,), 0.1, steps_per_epoch=5, warmup_epochs=10)
    for step, expected in [(0, 0.01), (4, 0.01), (5, 0.02), (49, 0.1), (50, 0.1), (99, 0.1), (100, 0.01)]:
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)


def test_sgd_with_l2_and_groups_equals_torch():
    rng = np.random.default_rng(0)
    start = {"head": rng.normal(size=(4, 3)), "body": rng.normal(size=(5,))}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [{"params": [theirs["head"]], "lr": 0.1}, {"params": [theirs["body"]], "lr": 0.01}]
    reference = torch.optim.SGD(groups, weight_decay=5e-4, momentum=0.9, nesterov=True)
    with jax.enable_x64(True):
        optimizer = sgd(lambda step: jnp.where(step < 3, 0.1, 0.02), 5e-4, 0.9, lambda path: 0.1 ** (path[0] == "body"))
        ours = {name: jnp.asarray(value) for name, value in start.items()}
        state = optimizer.init(ours)
        for step in range(6):
            gradients = {name: rng.normal(size=value.shape) for name, value in start.items()}
            for name, gradient in gradients.items():
                theirs[name].grad = torch.tensor(gradient)
            for group, rate in zip(reference.param_groups, (0.1, 0.01), strict=True):
                group["lr"] = rate if step < 3 else rate / 5
            reference.step()
            updates, state = optimizer.update(gradients, state, ours)
            ours = optax.apply_updates(ours, updates)
        for name in start:
            np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), rtol=1e-12)
