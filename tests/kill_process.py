"""scripts/train.py with steps that cost little, killed by SIGKILL at a place.

    python -m tests.kill_process PLACE CALL MILLISECONDS FLAGS OF scripts/train.py …

The kill comes so many milliseconds after the CALLth time (from 1) that the program comes to PLACE, a name of PLACES;
'never': it does not come. A step halves every parameter and adds a sum over the batch's images, by their places in it,
so that the parameters tell all batches and their order.
"""

import importlib
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp

from mpanet_jax.errors import run_script
from mpanet_jax.parallel import Parallel
from scripts import train

# What is going on → the function that begins it.
PLACES = {
    "preparing data": ("mpanet_jax.datasets.builder", "RawDatasetBuilder._download_and_prepare"),
    "building the cache": ("mpanet_jax.data.cache", "_fill"),
    "checksums of the cache": ("mpanet_jax.data.cache", "write_sums"),
    "training": ("mpanet_jax.call_plan", "stack_batches"),
    "writing a checkpoint": ("mpanet_jax.checkpoint", "Checkpoints.save"),
    "checksums of a checkpoint": ("mpanet_jax.checkpoint", "write_checksums"),
    "evaluating": ("mpanet_jax.loop", "evaluate_set"),
    "keeping the best": ("mpanet_jax.loop", "keep_best"),
}


def kill_at(place: str, call: int, seconds: float) -> None:
    module, path = PLACES[place]
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), []

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(*args, **options):
        calls.append(None)
        if len(calls) == call:
            threading.Thread(target=kill, daemon=True).start()
        return function(*args, **options)

    setattr(owner, name, counted)


def cheap_steps(parallel):
    def steps(state, batches, images):
        del images

        def step(state, batch):
            num_rows = len(batch["labels"])
            place = jnp.arange(num_rows) + 1.0
            if parallel.axis_name is not None:
                place += num_rows * jax.lax.axis_index(parallel.axis_name)
            loss = ((batch["index"] if "index" in batch else batch["labels"]) * place).sum()
            if parallel.axis_name is not None:
                loss = jax.lax.psum(loss, parallel.axis_name)
            params = jax.tree.map(lambda leaf: leaf / 2 + (loss % 64).astype(leaf.dtype) / 64, state.params)
            return state.replace(step=state.step + 1, params=params), {"loss": loss, "accuracy": loss}

        return jax.lax.scan(step, state, {name: batches[name] for name in ("labels", "index")})

    return steps


def main(arguments: list[str]) -> None:
    map_steps = Parallel.map_steps
    Parallel.map_steps = lambda parallel, _, **options: map_steps(parallel, cheap_steps(parallel), **options)
    train.main(arguments)


if __name__ == "__main__":
    place, call, milliseconds = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
    if place != "never":
        kill_at(place, call, milliseconds / 1000)
    run_script(main)
