import shutil

import pytest

from mpanet_jax.datasets.synthetic import write_dataset

TINY = dict(num_train_ids=4, num_test_ids=3, images_per_camera=(2, 3), height=(32, 40))


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory):
    """The three layouts as sound raw data sets of some dozen images; copy before damaging."""
    root = tmp_path_factory.mktemp("tiny")
    for layout in ("sysu_mm01", "regdb", "llcm"):
        sizes = dict(TINY, images_per_camera=None, height=None) if layout == "regdb" else TINY
        write_dataset(layout, root / layout, seed=1, **sizes)
    return root


@pytest.fixture
def copy_of(tiny_sources, tmp_path):
    """`copy_of(layout)`: a copy to damage."""
    return lambda layout: shutil.copytree(tiny_sources / layout, tmp_path / layout)
