"""The batches: training batches by the P×K plan in three feeding modes, and padded evaluation batches.

A batch is a pure function of (seed, step): element i of the random-access source is batch i of the whole training, so
a pipeline that starts at i yields the same bits as one that has come to i. The three modes (`data.cache`) differ only
in where the pixels of a batch come from.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np

from mpanet_jax.data.cache import CACHE_MODES, choose_cache, decoding_threads, open_cache, resized_images
from mpanet_jax.data.decode import decode_and_resize
from mpanet_jax.data.grain_batches import Batch, ResumableBatches, choose_num_workers, read_options
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import UserError
from mpanet_jax.processes import gather, is_first_process
from mpanet_jax.settings import DataSettings


@dataclass(frozen=True)
class TrainFeed:
    """What the training loop reads.

    Attributes:
      batches: a checkpointable iterator of dicts `labels int32[b]`, `modality int32[b]`, `index int32[b]` (the images'
        place in the split) and, unless the images are on the device, `images uint8[b, height, width, 3]`, where
        b = P·K / process_count; identity-major, visible before infrared. Ends after `num_epochs`.
      steps_per_epoch: batches in an epoch.
      batch_size: P·K, of all processes.
      images: uint8[N, height, width, 3] on the accelerator, to be indexed with a batch's `index`; None in the
        other modes.
      cache: the mode in use: 'device', 'host' or 'none'.
    """

    batches: grain.DatasetIterator
    steps_per_epoch: int
    batch_size: int
    images: jax.Array | None
    cache: str


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
      data: the images' size; the cache: 'device' (all resized images in accelerator memory, a batch is indices), 'host'
        (memory-mapped from `cache_dir`), 'none' (decoded and resized as they are needed) or 'auto' (see
        `choose_cache`); and the number of processes that decode where there is none (see `choose_num_workers`).
      num_epochs: the batches end after them.
      cache_dir: where the resized images are kept between runs; None keeps them in RAM only, and so does 'device'
        where there is no room.
      process_index, process_count: each of several hosts gets P / process_count consecutive identity slots.
      put_images: how the cache 'device' places the images, so that they can be replicated over several devices.

    Raises `UserError` for a P that process_count does not divide, too little shared memory for `num_workers`, an image
    that can't be decoded, and, with 'host', a `cache_dir` that can't be written.
    """
    if plan.num_ids_per_batch % process_count:
        raise UserError(
            f"config.data.num_ids_per_batch={plan.num_ids_per_batch} must be a multiple of the {process_count} "
            f"processes; the next is {-(-plan.num_ids_per_batch // process_count) * process_count}"
        )
    height, width = data.height, data.width
    size = plan.num_ids_per_batch * plan.images_per_id // process_count
    share = slice(process_index * size, (process_index + 1) * size)
    source = _TrainSource(plan, split.labels, split.modality.astype(np.int32), num_epochs, share)
    built = open_cache(split, height, width, cache_dir) is not None
    chosen = choose_cache(data.cache, len(split) * height * width * 3, cache_dir, built=built)
    # All processes run the same program, so the one with least room decides.
    cache = CACHE_MODES[max(gather(CACHE_MODES.index(chosen), "the choice of data.cache"))]
    if cache != chosen and is_first_process():
        print(f"images: cache={cache}, for another process has less room", file=sys.stderr)

    dataset = grain.MapDataset.source(source)
    images = None
    num_threads, chosen_workers = 1, 0
    if cache == "device":
        # The file only saves the next run the work, so a disk without room for it does not stop this one.
        images = put_images(resized_images(split, height, width, cache_dir, must_keep=False))
    elif cache == "host":
        dataset = dataset.map(_Gather(resized_images(split, height, width, cache_dir)))
    else:
        dataset = dataset.map(_Decode(split.encoded, split.paths, height, width))
        num_threads = decoding_threads()
        chosen_workers = choose_num_workers(data.num_workers, size * height * width * 3)
    batches = ResumableBatches(dataset, plan.signature, num_threads, chosen_workers)
    return TrainFeed(batches, plan.steps_per_epoch, size * process_count, images, cache)


def eval_batches(
    split: Split,
    indices: np.ndarray,
    *,
    height: int,
    width: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Batches of the images `indices` of `split`, in that order.

    Yields dicts `images uint8[b, height, width, 3]`, `pids`, `camids`, `modality`, `index int32[b]` and `mask bool[b]`
    with b = batch_size always: the last batch is filled up with zeros where `mask` is False. Raises `UserError` for an
    image that can't be decoded.
    """
    source = _EvalSource(split, np.asarray(indices), batch_size)
    decode = _Decode(split.encoded, split.paths, height, width)
    dataset = grain.MapDataset.source(source).map(decode).map(_Pad(batch_size))
    batches = iter(dataset.to_iter_dataset(read_options(decoding_threads())))
    try:
        yield from batches
    finally:
        batches.close()


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
class _EvalSource:
    """Batch i of an evaluation, without its images; the last one may be short."""

    split: Split
    indices: np.ndarray
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        rows = self.indices[index * self.batch_size : (index + 1) * self.batch_size].astype(np.int32)
        return {
            "pids": self.split.pids[rows].astype(np.int32),
            "camids": self.split.camids[rows].astype(np.int32),
            "modality": self.split.modality[rows].astype(np.int32),
            "index": rows,
            "mask": np.ones(len(rows), bool),
        }


@dataclass(frozen=True)
class _Gather(grain.transforms.Map):
    """Adds a batch's images from the resized ones."""

    images: np.ndarray

    def map(self, batch: Batch) -> Batch:
        return batch | {"images": self.images[batch["index"]]}


@dataclass(frozen=True)
class _Decode(grain.transforms.Map):
    """Adds a batch's images from their files."""

    encoded: Any
    paths: np.ndarray
    height: int
    width: int

    def map(self, batch: Batch) -> Batch:
        images = np.empty((len(batch["index"]), self.height, self.width, 3), np.uint8)
        for image, i in zip(images, map(int, batch["index"]), strict=True):
            decode_and_resize(self.encoded[i], self.paths[i], self.height, self.width, out=image)
        return batch | {"images": images}


@dataclass(frozen=True)
class _Pad(grain.transforms.Map):
    """Fills a batch up with zeros to one size."""

    batch_size: int

    def map(self, batch: Batch) -> Batch:
        missing = self.batch_size - len(batch["index"])
        return {name: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for name, a in batch.items()}
