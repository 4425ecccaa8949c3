"""Stand-ins for the training loop, one in each mode, in a process of their own that a test can kill.

    python feed_process.py FOLDER MODE …

Each takes batches in turn with the others, the second one later than the first and so on, so that a kill finds each at
another step. A MODE is CACHE and NUM_WORKERS, as in `none2`. It goes on from the newest checkpoint in FOLDER/MODE,
appends "<step> <hash of the batch>" to FOLDER/MODE/batches.txt for each batch, and saves a checkpoint after every
third. Without a checkpoint to go on from it stays at batch 12: it is there to be killed.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from tests.data.toy import batch_hash, toy_feed, toy_split


def run(folder: Path, cache: str, num_workers: int) -> Iterator[None]:
    """One loop; stops after each batch."""
    feed = toy_feed(toy_split(), cache=cache, cache_dir=folder / "cache", num_workers=num_workers)
    step = 0
    with (
        ocp.training.Checkpointer(folder / "checkpoints", cleanup_tmp_directories=True) as checkpointer,
        open(folder / "batches.txt", "a") as log,
    ):
        resumed = checkpointer.latest is not None
        if resumed:
            items = {"state": {"step": np.zeros((), int)}, "data": feed.batches}
            step = int(checkpointer.load_checkpointables(None, items)["state"]["step"])
            log.write(f"restored {step}\n")
        for batch in feed.batches:
            log.write(f"{step} {batch_hash(batch, feed.images)}\n")
            log.flush()
            os.fsync(log.fileno())
            step += 1
            if step % 3 == 0:
                items = {"state": {"step": np.array(step)}, "data": feed.batches}
                checkpointer.save_checkpointables_async(step, items)
            yield
            while step == 12 and not resumed:
                yield
        log.write("end\n")
    feed.batches.close()


def main(folder: Path, modes: list[str]) -> None:
    waiting, running = [run(folder / mode, mode[:-1], int(mode[-1])) for mode in modes], []
    while waiting or running:
        running += [waiting.pop(0)] if waiting else []
        running = [loop for loop in running if next(loop, "end") is None]
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
