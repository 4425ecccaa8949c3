"""scripts/train.py with training steps that cost nothing, in a process that is late at some places.

    python -m tests.late_process PLACES SECONDS FLAGS OF scripts/train.py …

PLACES, joined by commas, say what this process does once it has joined the others: `joined`: it sleeps so many seconds
at once; `compiling`: it sleeps so many when it traces its first program of steps; `impatient`: it waits for others only
so many; `prompt`: nothing. The loss is a sum over labels and their places in the whole batch. At the end it prints, by
the number of steps, how often a program was traced, and how many were compiled.
"""

import json
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp

from mpanet_jax import processes
from mpanet_jax.errors import run_script
from mpanet_jax.parallel import Parallel
from scripts import train


def main(arguments: list[str]) -> None:
    traced, compiled = Counter(), Counter()
    start_processes, map_steps = processes.start_processes, Parallel.map_steps

    def start_late(*flags):
        start_processes(*flags)
        if "impatient" in places:
            processes._wait_seconds = seconds
        if "joined" in places:
            time.sleep(seconds)

    def map_late(parallel, _, **options):
        def cheap_steps(state, batches, images):
            del images
            if "compiling" in places and not traced:
                time.sleep(seconds)
            num_steps, num_rows = batches["labels"].shape
            traced[num_steps] += 1
            place = jnp.arange(num_rows)
            if parallel.axis_name is not None:
                place += num_rows * jax.lax.axis_index(parallel.axis_name)
            loss = (batches["labels"] * (place + 1.0)).sum(1)
            if parallel.axis_name is not None:
                loss = jax.lax.psum(loss, parallel.axis_name)
            return state.replace(step=state.step + num_steps), {"loss": loss, "accuracy": loss}

        return map_steps(parallel, cheap_steps, **options)

    def on_duration(event, _, fun_name=None, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    processes.start_processes, Parallel.map_steps = start_late, map_late
    train.main(arguments)
    print(json.dumps({"traced": traced, "compiled": compiled["jit(cheap_steps)"]}))


if __name__ == "__main__":
    places, seconds = sys.argv.pop(1).split(","), int(sys.argv.pop(1))
    run_script(main)
