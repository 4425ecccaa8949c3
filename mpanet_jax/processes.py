"""The processes of a run over several hosts: how they start together, wait for one another, and share numbers."""

import itertools
import secrets
import textwrap
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

# After so long without a sign of life a process counts as lost, and the others are stopped.
HEARTBEAT_SECONDS = 20
# How long processes wait for a slower one, at the start and later.
WAIT_SECONDS = 1800

_wait_seconds = WAIT_SECONDS  # as `start_processes` was told
_waits = itertools.count()  # numbers the barriers; all processes count alike


def start_processes(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    wait_seconds: int = WAIT_SECONDS,
) -> None:
    """Joins the processes of a run over several hosts; call this before anything else uses JAX.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many processes there are.
      process_id: which one this is, from 0. None, for any of the three, takes the value of the cluster's scheduler
        (Slurm, Open MPI, Kubernetes, cloud TPU).
      wait_seconds: how long this process waits for the others, here and in `wait_for_all_processes`. JAX itself gives
        them an hour to join.

    Raises:
      UserError: an argument is missing, process 0 cannot be reached, or a process does not arrive in time.
    """
    global _wait_seconds
    _wait_seconds = wait_seconds
    filter_standard_error(process_id)
    # The service would catch SIGTERM, with which schedulers end a run, and wait for somebody to react.
    jax.config.update("jax_enable_preemption_service", False)
    join = partial(
        jax.distributed.initialize,
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=wait_seconds + HEARTBEAT_SECONDS,  # at this one JAX aborts the process
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
    """Waits until every process has come here; call this after unequal work and before a collective operation.

    Args:
      place: the name of this place in the message.

    Raises:
      UserError: another process has not come within the `wait_seconds` of `start_processes`.
    """
    if jax.process_count() == 1:
        return
    # A barrier of JAX's coordination service. Processes cannot wait in a collective operation, such as
    # multihost_utils.sync_global_devices: on CPUs the first one of a group of devices fails if the processes come to it
    # more than 30 s apart, and no option changes that. JAX has no public function for the barrier; orbax has one.
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
    """Replaces an error of JAX that means that another process is lost; returns for any other error.

    Raises:
      AbsentProcessError: `error` means that.
    """
    if jax.process_count() > 1 and means_lost_process(error):
        reason = textwrap.shorten(first_line(error), 100, placeholder=" …")
        raise AbsentProcessError(
            f"process {jax.process_index()} ends because another process was lost ({reason}); see what that "
            f"one printed, and {GO_ON}"
        ) from error


def _in_thread(function: Callable[[], None], seconds: float | None = None) -> None:
    """Calls a function that waits outside of Python in a thread, so that Ctrl-C can end the program meanwhile.

    Raises:
      TimeoutError: it takes more than `seconds`; it is left running.
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
    """Collects a number from every process; all of them have to call this.

    Args:
      value: of this process.
      what: what the number is, for the message if a process does not come.

    Returns:
      The values, in the order of the processes.
    """
    if jax.process_count() == 1:
        return [value]
    wait_for_all_processes(what)
    return multihost_utils.process_allgather(np.array(value)).tolist()


def share_of_process(rows: np.ndarray) -> np.ndarray:
    """This process's share of an array [n, …]: ceil(n / processes) consecutive rows.

    The last row is repeated until all shares are full; `gather_shares` drops the copies.
    """
    count = jax.process_count()
    missing = -len(rows) % count
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
    return padded.reshape(count, -1, *rows.shape[1:])[jax.process_index()]


def gather_shares(share: np.ndarray, num_rows: int, what: str) -> np.ndarray:
    """The inverse of `share_of_process`; all processes have to call this.

    Args:
      share: of this process, [ceil(num_rows / processes), …].
      num_rows: of the whole array.
      what: as in `gather`.

    Returns:
      The whole array, [num_rows, …].
    """
    if jax.process_count() == 1:
        return share
    wait_for_all_processes(what)
    return np.asarray(multihost_utils.process_allgather(share)).reshape(-1, *share.shape[1:])[:num_rows]


def is_first_process() -> bool:
    """Whether this process writes the files that a run writes once, such as logs, config.json and metrics.json."""
    return jax.process_index() == 0


def check_same_workdir(workdir: Path) -> None:
    """Checks that `workdir` is the same folder for all processes; otherwise the run would fail at its first save.

    Raises:
      UserError: names the processes that do not see a file that process 0 writes there.
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
    """Whether `file` appears within ten seconds; a network drive may take a while to show it."""
    deadline = time.monotonic() + 10
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
