"""What this project needs of grain beside its interface: a position that any layout of work can resume, clean workers.

Each workaround says here what it is for; the rest of the package uses grain as it is.
"""

import atexit
import gc
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import weakref
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain._src.python.ipc import shared_memory_array

from mpanet_jax.cpus import available_cpus
from mpanet_jax.errors import SettingsError, UserError

Batch = dict[str, np.ndarray]

# Processes that `num_workers` = -1 starts at most; copying their batches keeps the feeding process busy by then.
MAX_WORKERS = 16


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
    raise SettingsError(
        f"data.num_workers = {num_workers}: {short} in /dev/shm; enlarge it (docker run --shm-size), or use 0"
    )


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
        stop = weakref.finalize(self, self._stop, self._running, num_workers)
        # At exit too, and before multiprocessing ends the threads and processes that are waited for. Left to itself a
        # finalizer may run after that: its turn depends on what was imported first.
        stop.atexit = False
        atexit.register(stop)

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
                "the same data.*, seed and data set (and as many devices, with batch_scale = "
                "'per_device'), or start in a new workdir"
            )
        if not 0 <= state["next_index"] <= len(self._dataset):
            raise UserError(
                f"the checkpoint stands before batch {state['next_index']}, this run has {len(self._dataset)}; "
                "raise train.num_epochs, or start in a new workdir"
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
            # grain's iterators hold each other in a circle, and the last batches' shared memory with them:
            # https://github.com/google/grain/issues/398
            gc.collect()
            if num_workers:
                _wait_until_shared_memory_is_unlinked()

    def __str__(self) -> str:
        return f"ResumableBatches(next_index={self._next_index} of {len(self._dataset)})"


def _read_options(num_threads: int) -> grain.ReadOptions:
    """Enough batches in flight to keep every thread busy, and no more: one of them holds some 20 MB."""
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Runs first in each worker process."""
    del worker_index, worker_count
    # Nothing here computes with JAX. Should something ever do, it must not claim the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    # Ctrl-C goes to all, and so do the signals of some schedulers; the parent's end is this one's.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one

    def end_with_parent() -> None:
        """Even if that was killed."""
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _wait_until_shared_memory_is_unlinked() -> None:
    """grain unlinks a dropped batch in a thread, one batch after the other; the end of the program would cut it off.

    See https://github.com/google/grain/issues/1031.
    """
    pool = shared_memory_array.SharedMemoryArray._del_thread_pool
    if pool is not None:
        pool.apply(int)  # done when all that was asked of the thread before is done


def _free_shared_memory() -> int:
    """Bytes; where there is no /dev/shm, shared memory has no limit of its own."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize
