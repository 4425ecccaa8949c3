"""How long a checkpoint takes to save, with its checksums and without."""

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from benchmarks.step import NUM_IDS, STEPS_PER_EPOCH
from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.methods import make_method
from mpanet_jax.run_setup import initial_state
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.state import TrainState
from mpanet_jax.weights.convert import initial_variables


class _WithoutChecksums(Checkpoints):
    def _write_checksums(self, step: int) -> None:
        pass


KINDS = {"with": Checkpoints, "without": _WithoutChecksums}


def benchmark_save(settings: Settings, folder: Path, *, num_saves: int = 9) -> dict[str, Any]:
    """Save the whole state of training again and again, alternately with checksums and without.

    The network and the optimiser's moments are random (init_from is not read): zeros would be compressed to nothing.

    Args:
      settings: the run whose state is saved.
      folder: a temporary folder is made in it, and removed.
      num_saves: timed saves of each kind, after one that is not counted.

    Returns:
      numbers, stored_mib: of the state, and of its checkpoint on disk.
      with_seconds, without_seconds: medians, from the call to the moment when all is on disk; with_least and
        without_least of the shortest.
      with_cpu_seconds, without_cpu_seconds: medians of what all threads of the process took meanwhile.
      with_waits_seconds, without_waits_seconds: medians of how long training waits for the call.
      slower_percent, slower_cpu_percent: what the checksums add, by these medians.
    """
    method = make_method(replace(settings, {"init_from": ""}))
    state = _random_moments(initial_state(method, initial_variables(method, NUM_IDS), STEPS_PER_EPOCH))
    batches: Any = SimpleNamespace(get_state=lambda: {"next_index": 1, "plan": "a plan"})
    taken: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for number in range(1 + num_saves):
            # Either is the first one as often: a disk may be busy with what was written before.
            for kind in list(KINDS)[:: 1 if number % 2 else -1]:
                with KINDS[kind](Path(temporary, kind), keep=1) as checkpoints:
                    os.sync()
                    taken[kind].append(_save(checkpoints, number + 1, state, batches))
        stored = sum(path.stat().st_size for path in Path(temporary, "with").rglob("*") if path.is_file())
    results: dict[str, Any] = {
        "numbers": sum(leaf.size for leaf in jax.tree.leaves(state)),
        "stored_mib": stored / 2**20,
        "timed_saves": num_saves,
    }
    for kind, times in taken.items():
        seconds, cpu, waits = np.median(times[1:], axis=0).tolist()
        results |= {f"{kind}_seconds": seconds, f"{kind}_cpu_seconds": cpu, f"{kind}_waits_seconds": waits}
        results[f"{kind}_least_seconds"] = min(times[1:])[0]
    for name, figure in (("slower_percent", "seconds"), ("slower_cpu_percent", "cpu_seconds")):
        results[name] = 100 * (results[f"with_{figure}"] / results[f"without_{figure}"] - 1)
    return results


def _save(checkpoints: Checkpoints, step: int, state: TrainState, batches: Any) -> tuple[float, float, float]:
    """Seconds by the clock, of the processors, and of the call alone."""
    cpu, started = time.process_time(), time.perf_counter()
    checkpoints.save(step, state, batches)
    called = time.perf_counter()
    checkpoints.wait()
    return time.perf_counter() - started, time.process_time() - cpu, called - started


def _random_moments(state: TrainState) -> TrainState:
    generator = np.random.default_rng(0)

    def random(leaf: jax.Array) -> jax.Array:
        if not np.issubdtype(leaf.dtype, np.floating):
            return leaf
        return jax.device_put(generator.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

    return state.replace(opt_state=jax.tree.map(random, state.opt_state))
