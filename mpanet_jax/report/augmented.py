"""Shows images of a training batch before and after augmentation, as the training step sees them."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from mpanet_jax import datasets
from mpanet_jax.data.decode import pixels_of
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import ArgumentError
from mpanet_jax.log_pictures import denormalize
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method
from mpanet_jax.modality import MODALITY_NAMES
from mpanet_jax.report.figures import WIDTH_MM, new_figure, save_figure
from mpanet_jax.run_files import load_settings
from mpanet_jax.settings_base import replace
from mpanet_jax.state import random_keys

NUM_SHOWN = 8  # images of the batch


@dataclass(frozen=True)
class AugmentedBatch:
    """A training batch before and after augmentation.

    Attributes:
      rows: int[b], the images' rows in the split.
      images: the images, resized.
      views: the v views of each image that the network sees (one or more), with the normalisation undone.
    """

    rows: np.ndarray
    images: UInt8[np.ndarray, "b h w 3"]
    views: UInt8[np.ndarray, "v b h w 3"]


def augmented_batch(method: Method, split: Split, step: int) -> AugmentedBatch:
    """Load the batch of a training step, and augment it with that step's own random draws.

    Args:
      method: the run's method.
      split: the training images.
      step: the step, from 0, of training on one device.

    Raises:
      ArgumentError: the training has no such step.
    """
    settings = method.settings
    plan = method.batch_plan(split.pids, split.modality, settings.data.num_ids_per_batch)
    total = plan.steps_per_epoch * settings.train.num_epochs
    if not 0 <= step < total:
        raise ArgumentError("step", f"= {step}: the training has steps 0 to {total - 1}")
    epoch, place = divmod(step, plan.steps_per_epoch)
    rows = plan.epoch(epoch)[place]
    images = np.stack([pixels_of(split, int(row), settings.data) for row in rows])
    known = {"labels": jnp.asarray(split.labels[rows]), "modality": jnp.asarray(split.modality[rows])}
    key = jax.random.fold_in(random_keys(settings.seed)[1], step)  # as `step.train_step`
    views, _ = method.views(key, jnp.asarray(images), known, 0)
    return AugmentedBatch(rows, images, denormalize(views).reshape(-1, *images.shape))


def draw_augmentation(
    workdir: str | Path, folder: str | os.PathLike, *, step: int = 0, data_dir: str | None = None
) -> list[Path]:
    """Draw augmentation.png and .svg: images of a training batch, and below each what the network sees of it.

    Args:
      workdir: the run's folder; only its settings and its data set are used.
      folder: the folder to write to.
      step: the training step, from 0.
      data_dir: where the prepared data set is now; None: where the settings say.

    Returns:
      The paths of the two files.

    Raises:
      UserError: there is no config.json or no data set, or matplotlib is not installed.
      ArgumentError: the training has no such step.
    """
    settings = load_settings(workdir)
    if data_dir is not None:
        settings = replace(settings, {"dataset.data_dir": data_dir, "dataset.source": ""})
    split = datasets.open_split(settings.dataset, "train")
    batch = augmented_batch(make_method(settings), split, step)
    # The first few images of each modality, so that both are shown.
    modality = split.modality[batch.rows]
    chosen = np.sort(np.concatenate([np.flatnonzero(modality == m)[: NUM_SHOWN // 2] for m in MODALITY_NAMES]))
    cell = (WIDTH_MM - 3.5) / len(chosen)
    height, width = batch.images.shape[1:3]
    lines = 1 + len(batch.views)
    with new_figure(8 + lines * cell * height / width) as figure:
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
        axes = figure.subplots(lines, len(chosen), squeeze=False)
        names = ["image", *([f"view {n + 1}" for n in range(lines - 1)] if lines > 2 else ["seen"])]
        for column, image in enumerate(chosen):
            pictures = [batch.images[image], *batch.views[:, image]]
            for line, picture in enumerate(pictures):
                axes[line, column].imshow(picture)
                axes[line, column].set(xticks=[], yticks=[])
            axes[0, column].set_title(MODALITY_NAMES[int(modality[image])], fontsize=6, pad=2)
        for line, name in enumerate(names):
            axes[line, 0].set_ylabel(name, fontsize=6, labelpad=2)
        figure.suptitle(f"step {step}: images of the batch, and what the network sees of them")
        return save_figure(figure, folder, "augmentation")
