"""The batches: training batches by the P×K plan, in three feeding modes, and padded evaluation batches.

A batch is a pure function of (seed, step): element i of the random-access source is batch i of the whole training. So a
pipeline that starts at batch i yields the same bits as one that has come that far. The three modes (`data.cache`)
differ only in where the pixels of a batch come from.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import jax
import numpy as np

from mpanet_jax.background import InBackground
from mpanet_jax.data.cache import open_images
from mpanet_jax.data.cache_check import CacheCheck, CacheFile
from mpanet_jax.data.decode import SplitPixels, pixels_of, sent_of
from mpanet_jax.data.grain_batches import Batch, ResumableBatches, choose_num_workers
from mpanet_jax.data.reading import Pixels, decoding_threads, image_bytes, read_parts
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.data.sent_images import pack, sends_decoded
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.settings import DataSettings


@dataclass(frozen=True)
class TrainFeed:
    """What the training loop reads.

    Attributes:
      batches: an iterator over this process's batches, whose position a checkpoint can hold; it ends after
        `num_epochs`. A batch is a dict of `labels` int32[b], `modality` int32[b], `index` int32[b] (the images' rows in
        the split) and, unless the images are on the device, `images` uint8[b, height, width, 3] or, if the device
        resizes, what `pack` gives, with b = P·K / process_count. The order is identity by identity, visible before
        infrared.
      steps_per_epoch: batches in an epoch.
      batch_size: P·K, over all processes.
      shapes: shapes and types of a batch's arrays once its images are resized.
      image_set: shape and type of `images`, or None.
      uploaded: `images`, on their way.
      cache: the mode: 'device', 'host' or 'none'.
      plan: which images are in which batch, over all processes.
      check: the check of the cache file, in the background once it is started; None if no file is read.
    """

    batches: ResumableBatches
    steps_per_epoch: int
    batch_size: int
    shapes: dict[str, jax.ShapeDtypeStruct]
    image_set: jax.ShapeDtypeStruct | None
    uploaded: InBackground[jax.Array] | None
    cache: str
    plan: BatchPlan
    check: CacheCheck | None

    @property
    def images(self) -> jax.Array | None:
        """uint8[N, height, width·3] on the accelerator, to be indexed by a batch's `index`; waits for them.

        None in the modes 'host' and 'none'. The channels have no axis of their own, because a TPU pads the last axis to
        128.
        """
        return None if self.uploaded is None else self.uploaded.result()

    @property
    def sent_bytes(self) -> int:
        """How many bytes the resized images of a batch of this process have; 0 if the device holds them all."""
        return math.prod(self.shapes["images"].shape) if "images" in self.shapes else 0

    def rows(self, step: int) -> np.ndarray:
        """int[P·K]: the split's rows that make up batch `step` of the whole training (from 0), over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.plan.epoch(epoch)[place]

    def start_check(self) -> None:
        """Starts the check of the cache file, unless it has been started."""
        if self.check is not None:
            self.check.start()

    def require_sound_images(self) -> None:
        """Waits for the check of the cache file.

        Raises:
          UserError: the cache is damaged.
        """
        if self.check is not None:
            self.check.require()


def train_feed(
    split: Split,
    plan: BatchPlan,
    data: DataSettings,
    *,
    num_epochs: int,
    cache_dir: str | os.PathLike | None = None,
    process_index: int = 0,
    process_count: int = 1,
    put_images: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> TrainFeed:
    """Makes the training batches; they are bit-identical for every `data.cache` and `data.num_workers`.

    Args:
      split: the training split.
      plan: which images make up the batches, over all processes.
      data: the images' size and filter; the cache; and `num_workers`, for the mode 'none' (see `choose_num_workers`).
        The cache is 'device' (all resized images in accelerator memory; a batch is their indices), 'host'
        (memory-mapped from `cache_dir`), 'none' (decoded and resized for every batch) or 'auto' (see `choose_cache`).
      num_epochs: how many epochs of batches there are.
      cache_dir: where the resized images are kept between runs; None: they are in RAM only.
      process_index, process_count: this process gets P / process_count consecutive identities of each batch.
      put_images: puts the images of the cache 'device' on the devices.

    Raises:
      UserError: process_count does not divide P, shared memory is too small for `num_workers`, an image cannot be
        decoded, or, with 'host', `cache_dir` cannot be written.
    """
    if plan.num_ids_per_batch % process_count:
        raise SettingsError(
            f"data.num_ids_per_batch = {plan.num_ids_per_batch} must be a multiple of the {process_count} "
            f"processes; the next is {-(-plan.num_ids_per_batch // process_count) * process_count}"
        )
    size = plan.num_ids_per_batch * plan.images_per_id // process_count
    share = slice(process_index * size, (process_index + 1) * size)
    dataset = grain.MapDataset.source(_TrainSource(plan, split.labels, split.modality, num_epochs, share))
    cache, images = open_images(split, data, cache_dir)
    num_threads, num_workers, image_set, uploaded = 1, 0, None, None
    shapes = {name: jax.ShapeDtypeStruct((size,), np.int32) for name in ("labels", "modality", "index")}
    check = CacheCheck(Path(images.filename or "")) if isinstance(images, np.memmap) else None
    if cache != "device":
        shapes["images"] = jax.ShapeDtypeStruct((size, data.height, data.width, 3), np.uint8)
    if images is None:
        sent = sends_decoded(data, size)
        dataset = dataset.map(_Decode(split, data, sent))
        num_threads = decoding_threads()
        num_workers = choose_num_workers(data.num_workers, size * image_bytes(data, sent=sent))
    elif cache == "host":
        dataset = dataset.map(_Gather(CacheFile(images).rows if isinstance(images, np.memmap) else images.__getitem__))
    else:
        rows = images.reshape(*images.shape[:2], -1)
        image_set = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
        uploaded = InBackground(partial(put_images, rows), cut_off=False)
        uploaded.start()
    batches = ResumableBatches(dataset, plan.signature, num_threads, num_workers)
    return TrainFeed(
        batches, plan.steps_per_epoch, size * process_count, shapes, image_set, uploaded, cache, plan, check
    )


def split_batches(split: Split, indices: np.ndarray, data: DataSettings, batch_size: int) -> Iterator[Batch]:
    """The `eval_batches` of some images of a prepared split, with their modality.

    Args:
      split: the split.
      indices: int[N], the images' rows, in the order of the batches.
      data: the images' size and filter; `resize_on`; and `num_workers`, for `processes_for`.
      batch_size: images in a batch.

    Raises:
      UserError: an image cannot be decoded; the message names its path.
    """
    columns = {"pids": split.pids, "camids": split.camids, "modality": split.modality}
    indices = np.asarray(indices, np.int64)
    rows = {name: column[indices] for name, column in columns.items()} | {"index": indices}
    sent = sends_decoded(data, batch_size)
    return eval_batches(rows, SplitPixels(split, indices, data, sent), data, batch_size, sent=sent)


def eval_batches(
    rows: Mapping[str, np.ndarray],
    pixels: Pixels,
    data: DataSettings,
    batch_size: int,
    on_fault: Callable[[int, UserError], object] | None = None,
    *,
    num_workers: int | None = None,
    sent: bool = False,
) -> Iterator[Batch]:
    """Eval batches (docs/method.md, "An eval batch") of N images, which are read ahead of their use (`read_parts`).

    Args:
      rows: what a batch says of each image: int[N] arrays `pids`, `camids`, `index` and, if it is known, `modality`.
      pixels, data, num_workers, sent: as for `read_parts`.
      batch_size: b of every batch; the last one is filled up with zeros, whose `mask` is False.
      on_fault: called with the row and the error if `pixels` raises a `UserError`; the image's row is then zeros, with
        `mask` False. It may raise to stop. None: the error itself stops the batches.

    Yields:
      Dicts of the arrays of `rows` as int32[b], `mask` bool[b], and `images` uint8[b, height, width, 3] or what `pack`
      gives.
    """
    read = read_parts(pixels, len(rows["index"]), data, size=batch_size, num_workers=num_workers, sent=sent)
    with contextlib.closing(read) as parts:
        for part in parts:
            if on_fault is None:
                part.require_sound()
            else:
                for row, reason in sorted(part.faults):
                    on_fault(row, UserError(reason))
            batch: Batch = {name: np.zeros(batch_size, np.int32) for name in rows}
            for name, column in rows.items():
                batch[name][part.mask] = column[part.rows.start + np.flatnonzero(part.mask)]
            yield batch | {"mask": part.mask} | part.arrays


@dataclass(frozen=True)
class _TrainSource:
    """Element i is batch i of the whole training: labels, modalities and the images' rows in the split."""

    plan: BatchPlan
    labels: np.ndarray
    modality: np.ndarray
    num_epochs: int
    share: slice  # of the batch, for this process

    def __len__(self) -> int:
        return self.num_epochs * self.plan.steps_per_epoch

    def __getitem__(self, index: int) -> Batch:
        epoch, step = divmod(int(index), self.plan.steps_per_epoch)
        rows = self.plan.epoch(epoch)[step, self.share].copy()
        return {"labels": self.labels[rows], "modality": self.modality[rows], "index": rows}


@dataclass(frozen=True)
class _Gather(grain.transforms.Map):
    """Adds the images to a batch, from the resized ones."""

    rows: Callable[[np.ndarray], np.ndarray]

    def map(self, batch: Batch) -> Batch:
        return batch | {"images": self.rows(batch["index"])}


@dataclass(frozen=True)
class _Decode(grain.transforms.Map):
    """Adds the images to a batch, decoded from their files."""

    split: Split
    data: DataSettings
    sent: bool

    def map(self, batch: Batch) -> Batch:
        rows = batch["index"].tolist()
        if self.sent:
            return batch | pack([sent_of(self.split, i, self.data) for i in rows])
        return batch | {"images": np.stack([pixels_of(self.split, i, self.data) for i in rows])}
