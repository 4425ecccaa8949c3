"""The L2 normalisation against float64, for rows whose squares float32 cannot hold too."""

import numpy as np
import pytest

from mpanet_jax.row_norms import l2_normalize


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_rows_of_any_scale_get_length_one(scale):
    rows = (np.random.default_rng(0).standard_normal((300, 7)) * scale).astype(np.float32)
    exact = rows.astype(np.float64)
    exact /= np.sqrt((exact**2).sum(1, keepdims=True))
    found = l2_normalize(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_zero_rows_stay_zero():
    rows = np.array([[0, 0, 0], [3, 0, 4]])
    np.testing.assert_allclose(l2_normalize(rows), [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-7)
