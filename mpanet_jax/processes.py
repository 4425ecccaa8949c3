"""The processes of a run over several hosts: how they start together, and what they tell one another."""

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from mpanet_jax.errors import AbsentProcessError, ArgumentError, UserError, first_line
from mpanet_jax.lost_process import GO_ON, filter_standard_error, means_lost_process
from mpanet_jax.progress import quiet

# A process that is lost is noticed after this long; the others are then stopped.
HEARTBEAT_SECONDS = 20
# How long processes wait for one that is slower, at the start and later.
WAIT_SECONDS = 1800

_wait_seconds = WAIT_SECONDS  # as `start_processes` was told
_waits = itertools.count()  # every process counts the same


def start_processes(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    wait_seconds: int = WAIT_SECONDS,
) -> None:
    """Joins the processes of a run over several hosts; to be called before anything else touches JAX.

    Args:
      coordinator_address: HOST:PORT of process 0; None, as for the others, takes what the cluster's scheduler says
        (Slurm, Open MPI, Kubernetes, cloud TPU).
      num_processes: how many there are.
      process_id: which one this is, from 0.
      wait_seconds: how long this process waits for the others, here and in `wait_for_all_processes`. JAX itself lets
        them join within an hour.

    Raises:
      UserError: not enough is known, process 0 cannot be reached, or a process does not come in time.
    """
    global _wait_seconds
    _wait_seconds = wait_seconds
    filter_standard_error(process_id)
    # It would catch SIGTERM, by which schedulers end a run, and wait for somebody to act on it.
    jax.config.update("jax_enable_preemption_service", False)
    join = partial(
        jax.distributed.initialize,
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=wait_seconds + HEARTBEAT_SECONDS,  # at which it would abort the process
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    try:
        _in_thread(join, wait_seconds)
    except TimeoutError as error:
        raise AbsentProcessError(
            f"waited {wait_seconds} s for all processes to join; start each of them, with the "
            "coordinator_address and num_processes of the others, and see whether they reach process 0 there; "
            "where they only take longer, raise process_timeout"
        ) from error
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        raise UserError(
            f"the processes cannot be joined ({first_line(error)}); give coordinator_address="
            "HOST:PORT of process 0, num_processes and process_id to every process, or start them by a scheduler "
            "that JAX knows (Slurm, Open MPI)"
        ) from error
    if not is_first_process():
        quiet()
    wait_for_all_processes("the start")


def wait_for_all_processes(place: str) -> None:
    """Returns when every process has come here; to be called between unequal work and a collective.

    Args:
      place: what the message calls it.

    Raises:
      UserError: another process has not come within the `wait_seconds` of `start_processes`.
    """
    if jax.process_count() == 1:
        return
    # A barrier of JAX's coordination service. Collectives, multihost_utils.sync_global_devices among them, are no place
    # to wait: on CPUs the first one of a group of devices fails when processes come to it more than 30 s apart, and no
    # option changes that. JAX has no public function for the barrier; orbax has this one.
    barrier = multihost.get_barrier_sync_fn()
    key, milliseconds = f"mpanet_jax {next(_waits)}: {place}", _wait_seconds * 1000
    try:
        _in_thread(partial(barrier, key=key, timeout_ms=milliseconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise_lost_process(error)
            raise
        raise AbsentProcessError(
            f"process {jax.process_index()} waited {_wait_seconds} s at {place} for a process that has not come; see "
            "what the others print, and where they only take longer, raise process_timeout"
        ) from error


def raise_lost_process(error: Exception) -> None:
    """Raises what is to be said instead of `error` where that means that another process is lost.

    Raises:
      AbsentProcessError: it does.
    """
    if jax.process_count() > 1 and means_lost_process(error):
        raise AbsentProcessError(
            f"process {jax.process_index()} ends, for another process was lost ({first_line(error)[:100]}); see what "
            f"that printed, and {GO_ON}"
        ) from error


def _in_thread(function: Callable[[], None], seconds: float | None = None) -> None:
    """Calls what waits outside of Python, in a thread, so that Ctrl-C ends the program meanwhile.

    Raises:
      TimeoutError: it takes more than so many seconds; it is left running.
    """
    raised: list[Exception] = []

    def call() -> None:
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    for error in raised:
        raise error


def gather(value: int, what: str) -> list[int]:
    """This number of every process; `what` it is, for the message where one does not come."""
    if jax.process_count() == 1:
        return [value]
    wait_for_all_processes(what)
    return multihost_utils.process_allgather(np.array(value)).tolist()


def share_of_process(rows: np.ndarray) -> np.ndarray:
    """This process's consecutive part of [n, …]: ceil(n / processes) rows.

    Where n does not divide, the last row is repeated; `gather_shares` drops the copies.
    """
    count = jax.process_count()
    missing = -len(rows) % count
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
    return padded.reshape(count, -1, *rows.shape[1:])[jax.process_index()]


def gather_shares(share: np.ndarray, num_rows: int, what: str) -> np.ndarray:
    """The [num_rows, …] whose `share_of_process` every process holds; to be called by all. `what`: as in `gather`."""
    if jax.process_count() == 1:
        return share
    wait_for_all_processes(what)
    return np.asarray(multihost_utils.process_allgather(share)).reshape(-1, *share.shape[1:])[:num_rows]


def is_first_process() -> bool:
    """Whether this process writes what is written once: logs, config.json, metrics.json."""
    return jax.process_index() == 0


def check_same_workdir(workdir: Path) -> None:
    """Refuses a `workdir` that is not one folder for all processes, in which the run would stop at its first save.

    Raises:
      UserError: names the processes that do not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    file = workdir / f".process-0-{gather(secrets.randbelow(2**31), 'the check of the workdir')[0]}"
    if is_first_process():
        workdir.mkdir(parents=True, exist_ok=True)
        file.touch()
    wait_for_all_processes("the check of the workdir")
    seen_by = gather(int(_appears(file)), "the check of the workdir")
    blind = [process for process, seen in enumerate(seen_by) if not seen]
    if is_first_process():
        file.unlink()
    if blind:
        raise ArgumentError(
            "workdir",
            f"= {workdir} of process 0: another folder for process {', '.join(map(str, blind))}; "
            "name a folder on a disk that all hosts share",
        )


def _appears(file: Path) -> bool:
    """Whether `file` is there; a network drive may take a while to show it."""
    deadline = time.monotonic() + 10
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
