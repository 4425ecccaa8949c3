"""The batches: training batches by the P×K plan in three feeding modes, and padded evaluation batches.

A batch is a pure function of (seed, step): element i of the random-access source is batch i of the whole training, so
a pipeline that starts at i yields the same bits as one that has come to i. The three modes (`data.cache`) differ only
in where the pixels of a batch come from.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import grain
import jax
import numpy as np

from mpanet_jax.data.cache import decoding_threads, open_images
from mpanet_jax.data.cache_check import CacheCheck, CacheFile
from mpanet_jax.data.decode import pixels_of
from mpanet_jax.data.grain_batches import Batch, ResumableBatches, choose_num_workers
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import SettingsError, UserError
from mpanet_jax.settings import DataSettings

EVAL_BATCHES_IN_FLIGHT = 3


@dataclass(frozen=True)
class TrainFeed:
    """What the training loop reads.

    Attributes:
      batches: a checkpointable iterator of dicts `labels int32[b]`, `modality int32[b]`, `index int32[b]` (the images'
        place in the split) and, unless the images are on the device, `images uint8[b, height, width, 3]`, where
        b = P·K / process_count; identity-major, visible before infrared. Ends after `num_epochs`.
      steps_per_epoch: batches in an epoch.
      batch_size: P·K, of all processes.
      images: uint8[N, height, width·3] on the accelerator, to be indexed with a batch's `index`; None in the other
        modes. No axis of 3 by itself: a TPU pads the last axis to 128.
      cache: the mode in use: 'device', 'host' or 'none'.
      plan: of all processes.
      check: of the images' file, under way in the background; None where no file is read.
    """

    batches: grain.DatasetIterator
    steps_per_epoch: int
    batch_size: int
    images: jax.Array | None
    cache: str
    plan: BatchPlan
    check: CacheCheck | None

    def rows(self, step: int) -> np.ndarray:
        """int[P·K], the images in the split of batch `step` of the whole training (from 0), over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.plan.epoch(epoch)[place]

    def require_sound_images(self) -> None:
        """Returns once the images that the batches come from are known to be what was cached.

        Raises:
          UserError: they are not.
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
    """The training batches of `num_epochs` epochs, bit-identical whatever `data.cache` and `data.num_workers` are.

    Args:
      split: the training split.
      plan: which of its images make up the batches, over all processes.
      data: the images' size and filter; the cache: 'device' (all resized images in accelerator memory, a batch is
        indices), 'host' (memory-mapped from `cache_dir`), 'none' (decoded and resized as they are needed) or 'auto'
        (see `choose_cache`); and the number of processes that decode where there is none (see `choose_num_workers`).
      num_epochs: the batches end after them.
      cache_dir: where the resized images are kept between runs; None keeps them in RAM only, and so does 'device'
        where there is no room.
      process_index, process_count: each of several hosts gets P / process_count consecutive identity slots.
      put_images: how the cache 'device' places the images, so that they can be replicated over several devices.

    Raises `UserError` for a P that process_count does not divide, too little shared memory for `num_workers`, an image
    that can't be decoded, and, with 'host', a `cache_dir` that can't be written.
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
    num_threads, num_workers, on_device = 1, 0, None
    check = CacheCheck(Path(images.filename or "")) if isinstance(images, np.memmap) else None
    if images is None:
        dataset = dataset.map(_Decode(split, data))
        num_threads = decoding_threads()
        num_workers = choose_num_workers(data.num_workers, size * data.height * data.width * 3)
    elif cache == "host":
        dataset = dataset.map(_Gather(CacheFile(images).rows if isinstance(images, np.memmap) else images.__getitem__))
    else:
        on_device = put_images(images.reshape(*images.shape[:2], -1))
    batches = ResumableBatches(dataset, plan.signature, num_threads, num_workers)
    return TrainFeed(batches, plan.steps_per_epoch, size * process_count, on_device, cache, plan, check)


def split_batches(split: Split, indices: np.ndarray, data: DataSettings, batch_size: int) -> Iterator[Batch]:
    """`eval_batches` of the images `indices` of a prepared split, in that order, with their `modality`.

    Raises:
      UserError: an image can't be decoded; names its path.
    """
    columns = {"pids": split.pids, "camids": split.camids, "modality": split.modality}
    indices = np.asarray(indices, np.int64)
    rows = {name: column[indices] for name, column in columns.items()} | {"index": indices}
    return eval_batches(rows, lambda row: pixels_of(split, int(indices[row]), data), data, batch_size)


def eval_batches(
    rows: Mapping[str, np.ndarray],
    pixels: Callable[[int], np.ndarray],
    data: DataSettings,
    batch_size: int,
    on_fault: Callable[[int, UserError], object] | None = None,
) -> Iterator[Batch]:
    """Eval batches (docs/method.md, "An eval batch") of N images, decoded by threads ahead of their use.

    Args:
      rows: what a batch says of each image: int[N] arrays `pids`, `camids`, `index` and, where it is known, `modality`.
      pixels: the resized image of a row, uint8[data.height, data.width, 3]; may raise `UserError`.
      data: the images' size.
      batch_size: b, of every batch: the last is filled up with zeros, where `mask` is False.
      on_fault: told the row and the error of an image that `pixels` raises `UserError` for; its row is zeros then, with
        `mask` False. It may raise, to stop. None: the error stops the batches.
    """
    num_images = len(rows["index"])
    pool = ThreadPoolExecutor(decoding_threads())

    def start(first: int) -> tuple[range, list[Future]]:
        part = range(first, min(first + batch_size, num_images))
        return part, [pool.submit(pixels, row) for row in part]

    firsts = iter(range(0, num_images, batch_size))
    in_flight = deque(map(start, islice(firsts, EVAL_BATCHES_IN_FLIGHT)))
    try:
        while in_flight:
            part, decoded = in_flight.popleft()
            batch: Batch = {name: np.zeros(batch_size, np.int32) for name in rows}
            batch["mask"] = np.zeros(batch_size, bool)
            batch["images"] = np.zeros((batch_size, data.height, data.width, 3), np.uint8)
            for place, (row, future) in enumerate(zip(part, decoded, strict=True)):
                try:
                    batch["images"][place] = future.result()
                except UserError as error:
                    if on_fault is None:
                        raise
                    on_fault(row, error)
                    continue
                batch["mask"][place] = True
                for name, column in rows.items():
                    batch[name][place] = column[row]
            in_flight.extend(map(start, islice(firsts, 1)))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _TrainSource:
    """Batch i of the whole training, as indices."""

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
    """Adds a batch's images from the resized ones."""

    rows: Callable[[np.ndarray], np.ndarray]

    def map(self, batch: Batch) -> Batch:
        return batch | {"images": self.rows(batch["index"])}


@dataclass(frozen=True)
class _Decode(grain.transforms.Map):
    """Adds a batch's images from their files."""

    split: Split
    data: DataSettings

    def map(self, batch: Batch) -> Batch:
        return batch | {"images": np.stack([pixels_of(self.split, i, self.data) for i in map(int, batch["index"])])}
