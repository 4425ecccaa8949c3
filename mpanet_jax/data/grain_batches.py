"""Grain's iterator with a position that any number of workers can resume, and with workers that end cleanly.

The workarounds for grain are all here, each with its reason; the rest of the package uses grain as it is.
"""

import atexit
import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing import resource_tracker, spawn
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain._src.python.ipc import shared_memory_array

from mpanet_jax.background import InBackground
from mpanet_jax.cpus import available_cpus
from mpanet_jax.errors import SettingsError, UserError

Batch = dict[str, np.ndarray]

# Ctrl-C, and what some schedulers send, go to all processes of a program.
SIGNALS_TO_ALL = (signal.SIGINT, signal.SIGTERM)
# The most processes that `num_workers` = -1 starts: with more, the feeding process is busy copying their batches.
MAX_WORKERS = 16


def choose_num_workers(num_workers: int, batch_bytes: int, *, quiet: bool = False) -> int:
    """How many processes decode images; 0: threads of this process do.

    For `num_workers` = -1 this depends on the machine. Below 8 CPUs threads are as fast as processes and start at once.
    With more CPUs threads wait for each other; three quarters of the CPUs then get a process each, at most MAX_WORKERS,
    and the others are left to the feeding process and the system.

    Workers hand over their batches in shared memory, and containers often have only 64 MiB of it. If it is short, -1
    chooses threads and says so on stderr.

    Args:
      num_workers: settings.data.num_workers; -1: choose.
      batch_bytes: of one batch's images.
      quiet: do not say why threads were chosen.

    Raises:
      UserError: shared memory is short, and `num_workers` asks for processes.
    """
    chosen = num_workers
    if num_workers < 0:
        chosen = min(available_cpus() * 3 // 4, MAX_WORKERS) if available_cpus() >= 8 else 0
    # A worker has at most four batches in shared memory: two in its hand and its queue, two where grain receives them.
    needed, free = chosen * 4 * batch_bytes, _free_shared_memory()
    if needed <= free:
        return chosen
    short = f"{chosen} processes that decode need {needed >> 20} MiB of shared memory, {free >> 20} are free"
    if num_workers < 0:
        if quiet:
            return 0
        print(f"images: decoded in threads, because {short} in /dev/shm (docker run --shm-size)", file=sys.stderr)
        return 0
    raise SettingsError(
        f"data.num_workers = {num_workers}: {short} in /dev/shm; enlarge it (docker run --shm-size), or use 0"
    )


class ResumableBatches(grain.DatasetIterator):
    """An iterator over a `MapDataset` of batches; its state is the number of the next batch and the plan's signature.

    The state of grain's own iterator depends on how the work is spread over processes. This state does not, so a
    checkpoint resumes with another number of workers or in another feeding mode.

    Args:
      dataset: the batches of the whole training.
      plan: the signature of the plan that they follow.
      num_threads: how many threads read batches ahead.
      num_workers: how many processes do; 0: threads do.
    """

    def __init__(self, dataset: grain.MapDataset, plan: str, num_threads: int, num_workers: int = 0):
        super().__init__()
        self._dataset = dataset
        self._plan = plan
        self._num_threads = num_threads
        self._num_workers = num_workers
        self._next_index = 0
        self._running = []  # a `_GrainReading`, once it is needed: `set_state` before costs nothing
        stop = weakref.finalize(self, self._stop, self._running)
        # It must also run at exit, before multiprocessing ends the threads and processes that it waits for. A finalizer
        # may run later than that, depending on what was imported first.
        stop.atexit = False
        atexit.register(stop)

    def __next__(self) -> Batch:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._running[0])
        self._next_index += 1
        # A worker's arrays lie in shared memory. The caller gets copies: shared memory that is still in use when the
        # program ends (by a batch in a traceback, say) would be reported as leaked.
        return {name: _own(value) for name, value in batch.items()} if self._num_workers else batch

    def start_prefetch(self) -> None:
        """Starts to read the first batches before they are asked for."""
        if not self._running:
            rest = self._dataset[self._next_index :]
            if self._num_workers:
                if not flags.FLAGS.is_parsed():  # as in a notebook or a test; grain's workers read absl flags
                    flags.FLAGS.mark_as_parsed()
                rest = rest.to_iter_dataset(_read_options(1)).mp_prefetch(
                    grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=1), _start_worker
                )
            else:
                rest = rest.to_iter_dataset(_read_options(self._num_threads))
            self._running.append(_GrainReading(iter(rest), in_processes=bool(self._num_workers)))
            self._running[0].start()

    def start_processes(self) -> None:
        """As `start_prefetch`, if processes read: starting them takes seconds, mostly outside of this process."""
        if self._num_workers and self._next_index < len(self._dataset):
            self.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next_index, "plan": self._plan}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["plan"] != self._plan:
            raise UserError(
                f"the checkpoint has batches of the plan ({state['plan']}), this run of ({self._plan}); resume with "
                "the same data.*, seed and data set (and as many devices, with batch_scale = "
                "'per_device'), or start in a new workdir"
            )
        if not 0 <= state["next_index"] <= len(self._dataset):
            raise UserError(
                f"the checkpoint's next batch is {state['next_index']}, but this run has {len(self._dataset)} batches; "
                "raise train.num_epochs, or start in a new workdir"
            )
        self._stop(self._running)
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Stops threads and worker processes."""
        self._closed = True
        self._stop(self._running)

    @staticmethod
    def _stop(running: list["_GrainReading"]) -> None:
        if running:
            running.pop().close()
            # grain's iterators form a reference cycle, which keeps the shared memory of the last batches:
            # https://github.com/google/grain/issues/398
            gc.collect()

    def __str__(self) -> str:
        return f"ResumableBatches(next_index={self._next_index} of {len(self._dataset)})"


class _GrainReading:
    """Grain's iterator, reading ahead."""

    def __init__(self, iterator: grain.DatasetIterator, *, in_processes: bool):
        self._iterator = iterator
        self._first: InBackground[Batch] | None = None
        if in_processes:  # grain starts them when the first batch is asked for
            self._first = InBackground(partial(_first_of_processes, iterator))

    def start(self) -> None:
        if self._first:
            self._first.start()
        else:
            self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        if self._first is None:
            return next(self._iterator)
        batch = self._first.result()
        self._first = None
        return batch

    def close(self) -> None:
        if self._first:  # until then, grain may start processes
            self._first.wait()
        self._iterator.close()


def _first_of_processes(iterator: grain.DatasetIterator) -> Batch:
    with _no_signals_in_children():
        return next(iterator)


@contextlib.contextmanager
def _no_signals_in_children() -> Iterator[None]:
    """Processes that this thread starts are not ended by the signals that go to all, even before `_start_worker`."""
    resource_tracker.ensure_running()  # otherwise the first process starts it, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _own(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value


def _read_options(num_threads: int) -> grain.ReadOptions:
    """Batches of about 20 MB, decoded ones of up to 75: one in every thread, and as many for a call of many steps."""
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Runs first in each worker process."""
    del worker_index, worker_count
    # A worker does not use JAX; if it ever does, it must not claim the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    # A worker ends with its parent.
    for number in SIGNALS_TO_ALL:
        signal.signal(number, signal.SIG_IGN)

    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        """Ends this process when the parent has ended, even if it was killed."""
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _without_the_main_module() -> None:
    """Has grain's processes not run the caller's main module again, as new processes do.

    They need nothing of it. It would run without its `if __name__ == "__main__":`, or train once more if it has none.
    """
    prepare = spawn.get_preparation_data

    def prepare_grain(name: str) -> dict[str, Any]:
        data = prepare(name)
        if name.startswith("grain-process"):
            data = {key: value for key, value in data.items() if not key.startswith("init_main_from")}
        return data

    spawn.get_preparation_data = prepare_grain


def _unlink_where_dropped() -> None:
    """Has the shared memory of a batch unlinked by the thread that drops it.

    grain would leave that to a thread of its own, which the exit would cut off
    (https://github.com/google/grain/issues/1031). And if the batch is in a reference cycle, Python's garbage collector
    closes the shared memory meanwhile; then the thread fails to close it again, and does not unlink it (grain 0.2.18).
    """
    shared_memory_array.SharedMemoryArray.enable_async_del = staticmethod(
        lambda num_threads=1, max_outstanding_requests=50: None
    )


_without_the_main_module()
_unlink_where_dropped()


def _free_shared_memory() -> int:
    """Free bytes of shared memory; without /dev/shm it has no limit of its own."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize
