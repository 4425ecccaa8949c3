"""MATLAB 5 files as scipy writes and reads them."""

import numpy as np
import pytest
import scipy.io

from mpanet_jax.datasets.mat_file import read_variable


def cell(items, shape):
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def same(a, b):
    if a.dtype.kind == "O":
        return a.shape == b.shape and all(map(same, a.ravel(), b.ravel()))
    return a.shape == b.shape and (a.size == 0 or a.dtype == b.dtype) and np.array_equal(a, b)


@pytest.mark.parametrize("compressed", [False, True])
def test_cells_and_numbers_are_scipys(tmp_path, compressed):
    rng = np.random.default_rng(0)
    kinds = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
    numbers = [rng.integers(0, 100, size=(rng.integers(1, 4), rng.integers(1, 9))).astype(kind) for kind in kinds]
    inner = cell([*numbers, np.zeros((0, 0)), np.array([[7]], "u1")], (4, 3))
    path = tmp_path / "file.mat"
    variables = {"first": np.eye(3), "wanted": cell([inner, cell(numbers, (10, 1))], (2, 1)), "last": np.ones((1, 1))}
    scipy.io.savemat(path, variables, do_compression=compressed)
    for name in variables:
        assert same(read_variable(path, name), scipy.io.loadmat(path)[name])
    with pytest.raises(ValueError, match="no variable another"):
        read_variable(path, "another")


def test_other_classes_are_refused(tmp_path):
    scipy.io.savemat(tmp_path / "file.mat", {"text": "abc", "complex": np.array([[1 + 2j]])})
    for name in ("text", "complex"):
        with pytest.raises(ValueError, match="a matrix of"):
            read_variable(tmp_path / "file.mat", name)
