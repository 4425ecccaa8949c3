"""What MPANet alone has: the rate of its mean classifiers."""

import numpy as np
import pytest

from mpanet_jax.methods.mpanet import mean_rate_schedule


def test_mean_rate_of_the_paper_is_constant():
    schedule = mean_rate_schedule(0.2, 0, steps_per_epoch=10)
    assert float(schedule(0)) == float(schedule(5000)) == pytest.approx(0.2)


def test_mean_rate_of_the_published_program_falls_after_epoch_99():
    # epoch counted from 1: 0.2·min(100/(epoch+1), 1)
    schedule = mean_rate_schedule(0.2, 100, steps_per_epoch=10)
    for epoch, expected in [(1, 0.2), (99, 0.2), (100, 0.2 * 100 / 101), (140, 0.2 * 100 / 141)]:
        first, last = (epoch - 1) * 10, epoch * 10 - 1
        np.testing.assert_allclose([schedule(first), schedule(last)], expected, rtol=1e-6)
