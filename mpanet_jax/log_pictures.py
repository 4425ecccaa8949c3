"""The pictures that TensorBoard shows at every evaluation: a batch, pattern maps, and a histogram of distances.

They need Pillow and tensorboardX only. They show few images, and their programs are compiled once, so they cost little
whatever the data set is.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from mpanet_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from mpanet_jax.data.decode import pixels_of
from mpanet_jax.datasets.schema import Split
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError, first_line
from mpanet_jax.methods.method import Method
from mpanet_jax.metric_log import MetricLog
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.row_norms import l2_normalize
from mpanet_jax.state import random_keys

NUM_BATCH = 16  # images of the augmented batch
NUM_PEOPLE = 4  # people whose pattern maps are shown, with a visible and an infrared image each
MAX_DISTANCES = 1000  # the most images whose distances are counted


def denormalize(normalised: Any) -> UInt8[np.ndarray, "b h w 3"]:
    """Undoes `augment.normalize`, and rounds to uint8."""
    pixels = np.asarray(normalised, np.float32) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def tile_images(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Puts images into one, row by row of `columns` images, with white lines between them; empty places are white."""
    number, height, width, _ = images.shape
    rows = -(-number // columns)
    sheet = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + 2), place % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    return sheet


def overlay_maps(
    images: UInt8[np.ndarray, "n h w 3"], maps: Float[np.ndarray, "n l h2 w2"]
) -> UInt8[np.ndarray, "n2 h w 3"]:
    """Each image, followed by l copies of it that its maps light: M_k ⊙ image, with M_k scaled to 0.15 … 1."""
    height, width = images.shape[1:3]
    shown = []
    for image, own in zip(images, maps, strict=True):
        shown.append(image)
        for one in own:
            low, high = one.min(), one.max()
            scaled = (one - low) / (high - low if high > low else 1)
            rows = np.arange(height) * one.shape[0] // height
            columns = np.arange(width) * one.shape[1] // width
            shown.append(np.round(image * (0.15 + 0.85 * scaled[rows][:, columns, None])).astype(np.uint8))
    return np.stack(shown)


def choose_people(split: Split, seed: int) -> np.ndarray:
    """Draws up to `NUM_PEOPLE` identities, and a visible and an infrared image of each.

    Args:
      split: the images.
      seed: of the draws.

    Returns:
      int[2n]: the images' rows; visible, infrared, visible, …
    """
    generator = np.random.default_rng(seed)
    of = {modality: split.modality == modality for modality in (VISIBLE, INFRARED)}
    both = np.intersect1d(split.pids[of[VISIBLE]], split.pids[of[INFRARED]])
    pids = np.sort(generator.choice(both, min(NUM_PEOPLE, len(both)), replace=False))
    rows = [generator.choice(np.flatnonzero(of[m] & (split.pids == pid))) for pid in pids for m in (VISIBLE, INFRARED)]
    return np.array(rows, np.int64)


def cross_modality_distances(embeddings: Embeddings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The distances, 1 − cosine, between visible and infrared images.

    If there are more than `MAX_DISTANCES` images, so many are drawn by the seed.

    Returns:
      The distances of pairs of one identity, and those of pairs of two: float[number of pairs] each.
    """
    number = len(embeddings)
    rows = np.arange(number)
    if number > MAX_DISTANCES:
        rows = np.sort(np.random.default_rng(seed).choice(number, MAX_DISTANCES, replace=False))
    some = embeddings.take(rows)
    features = l2_normalize(some.features)
    modality = np.full(len(some), -1) if some.modality is None else some.modality
    visible, infrared = modality == VISIBLE, modality == INFRARED
    distances = 1 - features[visible] @ features[infrared].T
    same = some.pids[visible][:, None] == some.pids[infrared]
    return distances[same], distances[~same]


class LogPictures:
    """Writes a run's pictures, one set at each evaluation.

    Args:
      log: the log that they are written to.
      method: of the run.
      train_split: the training images.
      rows: step (from 0) → int[b], the rows of the images in its batch.
      watched: the split whose people are shown: the test images, or the validation identities'. The people and their
        images are drawn once, by the run's seed.
    """

    def __init__(
        self,
        log: MetricLog,
        method: Method,
        train_split: Split,
        rows: Callable[[int], np.ndarray],
        watched: Split,
    ):
        self._log, self._method, self._train, self._rows_of, self._watched = log, method, train_split, rows, watched
        seed = method.settings.seed
        self._key = random_keys(seed)[1]
        self._people = choose_people(watched, seed)
        self._views = jax.jit(lambda key, images, known: method.views(key, images, known, 0)[0])
        self._maps = jax.jit(partial(method.pattern_maps, method.build(train_split.num_ids)))

    def write(self, step: int, variables: Any, embeddings: Embeddings) -> None:
        """Writes the pictures of a step. If that fails, a line on stderr says so, and training goes on.

        Args:
          step: how many steps are done.
          variables: {params, batch_stats} after them.
          embeddings: of the images that are evaluated.
        """
        try:
            self._write(step, variables, embeddings)
        except Exception as error:  # such as a damaged image, which a run with a cache would not notice
            print(f"no pictures at step {step}: {first_line(error)}", file=sys.stderr, flush=True)

    def _write(self, step: int, variables: Any, embeddings: Embeddings) -> None:
        self._log.picture("batch_after_augmentation", self._batch(step - 1), step)
        if (sheet := self._pattern_maps(variables)) is not None:
            self._log.picture("pattern_maps", sheet, step)
        same, different = cross_modality_distances(embeddings, self._method.settings.seed)
        self._log.histogram("distance/one_identity", same, step)
        self._log.histogram("distance/two_identities", different, step)

    def _batch(self, step: int) -> np.ndarray:
        """The first images of a step's batch as the network saw them: whole identities, about `NUM_BATCH` images."""
        data = self._method.settings.data
        rows = self._rows_of(step)[: max(1, NUM_BATCH // data.images_per_id) * data.images_per_id]
        images = np.stack([pixels_of(self._train, int(row), data) for row in rows])
        known = {"labels": self._train.labels[rows], "modality": self._train.modality[rows]}
        views = self._views(jax.random.fold_in(self._key, step), images, known)  # the key as in `step.train_step`
        return tile_images(denormalize(views), data.images_per_id)

    def _pattern_maps(self, variables: Any) -> np.ndarray | None:
        """The people and their pattern maps; None if the network makes no maps, or there are no people."""
        if not len(self._people):
            return None
        data = self._method.settings.data
        images = np.stack([pixels_of(self._watched, int(row), data) for row in self._people])
        try:
            maps = self._maps(variables, images, self._watched.modality[self._people])
        except UserError:
            return None
        return tile_images(overlay_maps(images, np.asarray(maps, np.float32)), 1 + maps.shape[1])
