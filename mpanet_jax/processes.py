"""The processes of a run over several hosts: how they start together, and what they tell one another."""

import secrets
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpanet_jax.errors import UserError, first_line

# A process that is lost is noticed after this long; the others are then stopped.
HEARTBEAT_SECONDS = 20


def start_processes(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run over several hosts; to be called before anything else touches JAX.

    Args:
      coordinator_address: HOST:PORT of process 0; None, as for the others, takes what the cluster's scheduler says
        (Slurm, Open MPI, Kubernetes, cloud TPU).
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UserError: not enough is known, or process 0 cannot be reached.
    """
    # It would catch SIGTERM, by which schedulers end a run, and wait for somebody to act on it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        raise UserError(
            f"--distributed: the processes cannot be joined ({first_line(error)}); give --coordinator_address="
            "HOST:PORT of process 0, --num_processes and --process_id to every process, or start them by a scheduler "
            "that JAX knows (Slurm, Open MPI)"
        ) from error


def gather(value: int) -> list[int]:
    """This number of every process."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.array(value)).tolist()


def share_of_process(rows: np.ndarray) -> np.ndarray:
    """This process's consecutive part of [n, …]: ceil(n / processes) rows.

    Where n does not divide, the last row is repeated; `gather_shares` drops the copies.
    """
    count = jax.process_count()
    missing = -len(rows) % count
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
    return padded.reshape(count, -1, *rows.shape[1:])[jax.process_index()]


def gather_shares(share: np.ndarray, num_rows: int) -> np.ndarray:
    """The [num_rows, …] whose `share_of_process` every process holds; to be called by all."""
    if jax.process_count() == 1:
        return share
    return np.asarray(multihost_utils.process_allgather(share)).reshape(-1, *share.shape[1:])[:num_rows]


def is_first_process() -> bool:
    """Whether this process writes what is written once: logs, config.json, metrics.json."""
    return jax.process_index() == 0


def wait_for_all_processes(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_same_workdir(workdir: Path) -> None:
    """Refuses a `workdir` that is not one folder for all processes, in which the run would stop at its first save.

    Raises:
      UserError: names the processes that do not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    file = workdir / f".process-0-{gather(secrets.randbelow(2**31))[0]}"
    if is_first_process():
        workdir.mkdir(parents=True, exist_ok=True)
        file.touch()
    wait_for_all_processes("workdir")
    blind = [process for process, seen in enumerate(gather(int(_appears(file)))) if not seen]
    if is_first_process():
        file.unlink()
    if blind:
        raise UserError(
            f"--workdir: {workdir} of process 0 is another folder for process {', '.join(map(str, blind))}; "
            "name a folder on a disk that all hosts share"
        )


def _appears(file: Path) -> bool:
    """Whether `file` is there; a network drive may take a while to show it."""
    deadline = time.monotonic() + 10
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
