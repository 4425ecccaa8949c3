"""grain pipelines: training batches by the P×K plan in three feeding modes, and padded evaluation batches.

A batch is a pure function of (seed, step): element i of the random-access source is batch i of the whole training, so
a pipeline that starts at i yields the same bits as one that has come to i. The three modes (`config.data.cache`)
differ only in where the pixels of a batch come from.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from mpanet_jax.cpus import available_cpus
from mpanet_jax.data.cache import choose_cache, decoding_threads, open_cache, resized_images
from mpanet_jax.data.decode import decode_and_resize
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import UserError

Batch = dict[str, np.ndarray]

# Processes that `num_workers` = -1 starts at most; copying their batches keeps the feeding process busy by then.
MAX_WORKERS = 16


@dataclass(frozen=True)
class TrainFeed:
    """What the training loop reads.

    Attributes:
      batches: a checkpointable iterator of dicts `labels int32[b]`, `modality int32[b]`, `index int32[b]` (the images'
        place in the split) and, unless the images are on the device, `images uint8[b, height, width, 3]`, where
        b = P·K / process_count; identity-major, visible before infrared. Ends after `num_epochs`.
      steps_per_epoch: batches in an epoch.
      images: uint8[N, height, width, 3] on the accelerator, to be indexed with a batch's `index`; None in the
        other modes.
      cache: the mode in use: 'device', 'host' or 'none'.
    """

    batches: grain.DatasetIterator
    steps_per_epoch: int
    images: jax.Array | None
    cache: str


def train_feed(
    split: Split,
    *,
    height: int,
    width: int,
    num_ids_per_batch: int,
    images_per_id: int,
    seed: int,
    num_epochs: int,
    cache: str = "auto",
    cache_dir: str | os.PathLike | None = None,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    put_images: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> TrainFeed:
    """The training batches of `num_epochs` epochs, bit-identical whatever `cache` and `num_workers` are.

    Args:
      split: the training split.
      height, width: of the images, in pixels.
      num_ids_per_batch, images_per_id: P and K of the whole batch over all processes.
      seed: of the plan.
      num_epochs: the batches end after them.
      cache: 'device' (all resized images in accelerator memory, a batch is indices), 'host' (memory-mapped from
        `cache_dir`), 'none' (decoded and resized as they are needed) or 'auto' (see `choose_cache`).
      cache_dir: where the resized images are kept between runs; None keeps them in RAM only, and so does 'device'
        where there is no room.
      num_workers: processes that decode with `cache` = 'none'; 0 decodes in threads of this process; -1 chooses
        (see `choose_num_workers`).
      process_index, process_count: each of several hosts gets P / process_count consecutive identity slots.
      put_images: how `cache` = 'device' places the images, so that they can be replicated over several devices.

    Raises `UserError` for an impossible plan (`BatchPlan`), an unknown `cache`, a P that process_count does not
    divide, too little shared memory for `num_workers`, an image that can't be decoded, and, with 'host', a `cache_dir`
    that can't be written.
    """
    plan = BatchPlan(split.pids, split.modality, num_ids_per_batch, images_per_id, seed)
    if num_ids_per_batch % process_count:
        raise UserError(
            f"config.data.num_ids_per_batch={num_ids_per_batch} must be a multiple of the {process_count} processes; "
            f"the next is {-(-num_ids_per_batch // process_count) * process_count}"
        )
    size = num_ids_per_batch * images_per_id // process_count
    share = slice(process_index * size, (process_index + 1) * size)
    source = _TrainSource(plan, split.labels, split.modality.astype(np.int32), num_epochs, share)
    built = open_cache(split, height, width, cache_dir) is not None
    cache = choose_cache(cache, len(split) * height * width * 3, cache_dir, built=built)

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
        chosen_workers = choose_num_workers(num_workers, size * height * width * 3)
    batches = ResumableBatches(dataset, plan.signature, num_threads, chosen_workers)
    return TrainFeed(batches, plan.steps_per_epoch, images, cache)


def choose_num_workers(num_workers: int, batch_bytes: int) -> int:
    """How many processes decode: `num_workers`, or for -1 what suits this machine.

    Below 8 CPUs threads (0) are as fast, and start at once. From there on they wait for each other, and half the CPUs
    get a process each, at most MAX_WORKERS; the rest is for the feeding process and the system. Workers hand over
    their batches of `batch_bytes` in shared memory, of which containers often have only 64 MiB: where it is short, -1
    stays with threads and says so on stderr, and a number of processes that was asked for raises `UserError`.
    """
    chosen = num_workers
    if num_workers < 0:
        chosen = min(available_cpus() // 2, MAX_WORKERS) if available_cpus() >= 8 else 0
    # Of each worker four batches at most: in its hand, in its queue, and the same again where grain receives them.
    needed, free = chosen * 4 * batch_bytes, _free_shared_memory()
    if needed <= free:
        return chosen
    short = f"{chosen} processes that decode need {needed >> 20} MiB of shared memory, {free >> 20} are free"
    if num_workers < 0:
        print(f"images: decoded in threads, for {short} in /dev/shm (docker run --shm-size)", file=sys.stderr)
        return 0
    raise UserError(
        f"config.data.num_workers = {num_workers}: {short} in /dev/shm; enlarge it (docker run --shm-size), or use 0"
    )


def eval_batches(
    split: Split,
    indices: np.ndarray,
    *,
    height: int,
    width: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Batches of the images `indices` of `split`, in that order.

    Yields dicts `images uint8[b, height, width, 3]`, `pids`, `camids`, `index int32[b]` and `mask bool[b]` with
    b = batch_size always: the last batch is filled up with zeros where `mask` is False. Raises `UserError` for an image
    that can't be decoded.
    """
    source = _EvalSource(split, np.asarray(indices), batch_size)
    decode = _Decode(split.encoded, split.paths, height, width)
    dataset = grain.MapDataset.source(source).map(decode).map(_Pad(batch_size))
    batches = iter(dataset.to_iter_dataset(_read_options(decoding_threads())))
    try:
        yield from batches
    finally:
        batches.close()


class ResumableBatches(grain.DatasetIterator):
    """An iterator over a `MapDataset` of batches, whose state is the number of the next one.

    grain's own state also holds how the work is spread over processes; this one does not, so a checkpoint resumes with
    another number of workers or in another feeding mode. It does hold the plan's signature: `set_state` raises
    `UserError` where the number would mean a batch of another plan.
    """

    def __init__(self, dataset: grain.MapDataset, plan: str, num_threads: int, num_workers: int = 0):
        super().__init__()
        self._dataset = dataset
        self._plan = plan
        self._num_threads = num_threads
        self._num_workers = num_workers
        self._next_index = 0
        self._running = []  # grain's iterator; made for the first element asked for, so that set_state costs nothing
        # Also at exit, before the interpreter takes apart what grain's own clean-up needs.
        weakref.finalize(self, self._stop, self._running, num_workers)

    def __next__(self) -> Batch:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._running[0])
        self._next_index += 1
        # A worker's arrays lie in shared memory. The caller gets arrays of its own: what is alive when the program ends
        # (a traceback holds a batch) would be reported as leaked.
        return {name: np.array(a) for name, a in batch.items()} if self._num_workers else batch

    def start_prefetch(self) -> None:
        """Start work on the first batches before they are asked for."""
        if not self._running:
            rest = self._dataset[self._next_index :]
            if self._num_workers:
                if not flags.FLAGS.is_parsed():  # in a notebook or a test; grain's workers read absl flags
                    flags.FLAGS.mark_as_parsed()
                rest = rest.to_iter_dataset(_read_options(1)).mp_prefetch(
                    grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=1), _start_worker
                )
            else:
                rest = rest.to_iter_dataset(_read_options(self._num_threads))
            self._running.append(iter(rest))
            self._running[0].start_prefetch()

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next_index, "plan": self._plan}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["plan"] != self._plan:
            raise UserError(
                f"the checkpoint's batches are those of ({state['plan']}), this run's of ({self._plan}); resume with "
                "the same config.data, config.seed and data set (and as many devices, with config.batch_scale="
                "per_device), or start in a new workdir"
            )
        if not 0 <= state["next_index"] <= len(self._dataset):
            raise UserError(
                f"the checkpoint stands before batch {state['next_index']}, this run has {len(self._dataset)}; "
                "raise config.train.num_epochs, or start in a new workdir"
            )
        self._stop(self._running, self._num_workers)
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Stop threads and worker processes."""
        self._closed = True
        self._stop(self._running, self._num_workers)

    @staticmethod
    def _stop(running: list[grain.DatasetIterator], num_workers: int) -> None:
        if running:
            running.pop().close()
            gc.collect()  # grain's iterators hold each other in a circle, and the last batches' shared memory with them
            if num_workers:
                # grain unlinks that in a thread of its own, which the end of the program would cut off.
                time.sleep(0.2)

    def __str__(self) -> str:
        return f"ResumableBatches(next_index={self._next_index} of {len(self._dataset)})"


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

    def __getitem__(self, step: int) -> Batch:
        epoch, step_in_epoch = divmod(int(step), self.plan.steps_per_epoch)
        index = self.plan.epoch(epoch)[step_in_epoch, self.share].copy()
        return {"labels": self.labels[index], "modality": self.modality[index], "index": index}


@dataclass(frozen=True)
class _EvalSource:
    """Batch i of an evaluation, without its images; the last one may be short."""

    split: Split
    indices: np.ndarray
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        index = self.indices[i * self.batch_size : (i + 1) * self.batch_size].astype(np.int32)
        return {
            "pids": self.split.pids[index].astype(np.int32),
            "camids": self.split.camids[index].astype(np.int32),
            "index": index,
            "mask": np.ones(len(index), bool),
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
        for image, i in zip(images, batch["index"], strict=True):
            decode_and_resize(self.encoded[int(i)], self.paths[i], self.height, self.width, out=image)
        return batch | {"images": images}


@dataclass(frozen=True)
class _Pad(grain.transforms.Map):
    """Fills a batch up with zeros to one size."""

    batch_size: int

    def map(self, batch: Batch) -> Batch:
        missing = self.batch_size - len(batch["index"])
        return {name: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for name, a in batch.items()}


def _read_options(num_threads: int) -> grain.ReadOptions:
    """Enough batches in flight to keep every thread busy, and no more: one of them holds some 20 MB."""
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Runs first in each worker process."""
    del worker_index, worker_count
    # Nothing here computes with JAX. Should something ever do, it must not claim the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent's end is this one's

    def end_with_parent() -> None:
        """Even if that was killed."""
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _free_shared_memory() -> int:
    """Bytes; where there is no /dev/shm, shared memory has no limit of its own."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize
