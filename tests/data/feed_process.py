"""A stand-in for the training loop, in a process of its own that a test can kill.

    python feed_process.py FOLDER CACHE NUM_WORKERS

Goes on from the newest checkpoint in FOLDER, appends "<step> <hash of the batch>" to FOLDER/batches.txt for each batch,
and saves a checkpoint after every third. Without a checkpoint to go on from it stays at batch 12: it is there to be
killed.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from tests.data.toy import batch_hash, toy_feed, toy_split


def main(folder: Path, cache: str, num_workers: int) -> None:
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
            time.sleep(0.1)
            while step == 12 and not resumed:
                time.sleep(1)
        log.write("end\n")
    feed.batches.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
