"""Many checkpoints of a small state, one after the other, and what they leave behind in the process.

    python -m tests.saves_process FOLDER WARM_UP SAVES

Prints as JSON the growth over SAVES saves, once WARM_UP are done: `descriptors`, `threads`, `bytes` (resident memory).
"""

import ctypes
import gc
import json
import os
import resource
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.state import TrainState


def usage() -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back yet is no leak
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": pages * resource.getpagesize(),
    }


def main(folder: Path, warm_up: int, saves: int) -> None:
    params = {"conv": {"kernel": jnp.ones((8, 8))}}
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, (), {}, jax.random.key(0))
    batches = SimpleNamespace(get_state=lambda: {"next_index": 1, "plan": "a plan"})
    before = {}
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in range(1, warm_up + saves + 1):
            checkpoints.save(step, state, batches)
            if step == warm_up:
                checkpoints.wait()
                before = usage()
        checkpoints.wait()
        after = usage()
    print(json.dumps({name: after[name] - before[name] for name in before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
