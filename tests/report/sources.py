"""A small network and some people for the tests of the figures."""

import functools

import jax
import numpy as np
from PIL import Image

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.model import Model
from mpanet_jax.report.sources import Source
from mpanet_jax.settings_base import replace
from tests.methods_in_tests import drawn_variables

HEIGHT, WIDTH = 64, 32
FIELDS = {
    **{"model.backbone": "resnet18", "model.stage_sizes": (1, 1, 1, 1), "model.width": 8, "model.fused": "off"},
    **{"data.height": HEIGHT, "data.width": WIDTH, "dtype": "float32", "eval.batch_size": 16, "init_from": ""},
}


def model(**fields):
    """An untrained network whose batch norms have statistics that are not those of the start."""
    method = MPANet(replace(MPANetSettings(), FIELDS | fields))
    variables = drawn_variables(method.network(1), HEIGHT, WIDTH)
    generator = np.random.default_rng(0)

    def statistic(path, leaf):
        low, high = (-0.1, 0.1) if path[-1].key == "mean" else (0.5, 1.5)
        return np.asarray(generator.uniform(low, high, leaf.shape), np.float32)

    statistics = jax.tree_util.tree_map_with_path(statistic, variables["batch_stats"])
    return Model(method.settings, variables | {"batch_stats": statistics}, "tests")


@functools.cache
def source(num_ids=4, each=2):
    """`each` visible and infrared images of every identity; one more identity was seen in visible light only."""
    network = model()
    generator = np.random.default_rng(1)
    rows = [(pid, modality, n) for pid in range(num_ids) for modality in (0, 1) for n in range(each)]
    rows.append((num_ids, 0, 0))
    pids, modality, _ = np.array(rows).T
    paths = np.array([f"{pid}/{'vi'[m]}{n}.png" for pid, m, n in rows])
    pictures = {
        str(path): Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for path in paths
    }
    features = network.embed(list(pictures.values()), normalize=False)
    names = np.array([f"person {pid}" for pid in pids])
    embeddings = Embeddings(features, pids, modality + 1, paths, modality, names)
    return Source("tests", embeddings, pictures.get, network)


def known(features, pids, modality):
    """A source of which embeddings alone are known."""
    number = len(features)
    return Source(
        "known", Embeddings(features, pids, modality + 1, np.array(list(map(str, range(number)))), modality), {}.get
    )
