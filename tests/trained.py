"""A small MPANet after some steps on drawn people, for tests of what uses a trained model."""

import functools
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mpanet_jax.datasets.synthetic_images import draw_image
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.model import Model
from mpanet_jax.settings_base import replace, to_dict
from mpanet_jax.step import train_step
from mpanet_jax.weights.files import write_state_dict
from tests.methods_in_tests import start

# Maps of 4 × 3 positions: on smaller ones XLA turns a 3 × 3 convolution round, and then computes it slowly.
P, K, HEIGHT, WIDTH, STEPS = 4, 4, 64, 48, 12
FIELDS = {
    **{"model.backbone": "resnet18", "model.stage_sizes": (1, 1, 1, 1), "model.width": 16, "model.fused": "off"},
    **{"data.height": HEIGHT, "data.width": WIDTH, "data.images_per_id": K, "dtype": "float32"},
    **{"augment.flip_probability": 0.0, "augment.erase_probability": 0.0, "eval.batch_size": 8},
    **{"loss.separation": 0.0, "loss.modality_identity": 0.0, "loss.mutual_mean": 0.0},  # which compile for longer
    **{"optim.learning_rate": 2e-3},
}


def person(pid: int, number: int, modality: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """uint8[h, w, 3]: a drawn person; camera 1 sees visible light, camera 2 infrared."""
    camid = 1 + modality
    return np.asarray(draw_image(0, pid, camid=camid, scene=camid, modality=modality, number=number, size=size))


@functools.cache
def trained_model() -> Model:
    """The network, whose batch norm and classifiers have seen the people 0 to P − 1."""
    method = MPANet(replace(MPANetSettings(), FIELDS))
    modality = np.tile(np.repeat([0, 1], K // 2), P).astype(np.int32)
    labels = np.repeat(np.arange(P), K).astype(np.int32)
    images = np.stack(
        [person(p, i, m) for i, (p, m) in enumerate(zip(labels.tolist(), modality.tolist(), strict=True))]
    )
    batch = {"images": images, "labels": labels, "modality": modality}
    state = start(method, P, HEIGHT, WIDTH)
    step = jax.jit(partial(train_step, method=method, network=method.build(P), steps_per_epoch=STEPS))
    for _ in range(STEPS):
        state, _ = step(state, batch)
    variables = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    return Model(method.settings, variables, "trained in tests")


def save_trained(path: Path) -> Path:
    """The network as a .safetensors file with its settings."""
    model = trained_model()
    write_state_dict(path, model.state_dict(), to_dict(model.settings))
    return path
