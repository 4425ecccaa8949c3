"""One of two processes of a run that read the weights of init_from, one after the other.

    python -m tests.start_process ADDRESS PROCESS_ID INIT_FROM FOLDER

Each writes FOLDER/PROCESS_ID.npz, its parameters by their paths. Process 1 begins only when process 0 has written.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

from mpanet_jax.processes import start_processes, wait_for_all_processes
from mpanet_jax.weights.convert import initial_variables
from tests.methods_in_tests import small_mpanet


def main(address: str, process_id: int, init_from: str, folder: Path) -> None:
    start_processes(address, 2, process_id)
    while process_id == 1 and not (folder / "0.npz").exists():
        time.sleep(0.1)
    variables = initial_variables(small_mpanet(init_from=init_from, data__height=32, data__width=32), num_ids=7)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(variables)
    }
    with open(folder / f"{process_id}.tmp", "wb") as file:
        np.savez(file, **arrays)
    (folder / f"{process_id}.tmp").rename(folder / f"{process_id}.npz")
    wait_for_all_processes("the end of the test")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
