"""Runs that are killed again and again, held against one that is not: make test-kill.

    python -m tests.kill_matrix FOLDER KILLS [SEED]

In chains of five: a run is killed (SIGKILL) while it prepares its data, builds its cache, and then at random places, is
started again each time, and in the end left alone. Its weights, its best weights and its figures have to be those of a
run that was never killed, to the bit. The last chain has two processes, of which one is killed. Prints, as JSON, how
often there was a kill at each place and what differed.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from mpanet_jax.checkpoint import load_model
from mpanet_jax.datasets.synthetic import write_dataset
from tests.kill_process import PLACES
from tests.limits import HANGS_AFTER

ROOT = Path(__file__).parent.parent
CHAIN = 5
NUM_EPOCHS = 4
# The first ones in this order, for they come once in a run's life.
FIRST = ("preparing data", "building the cache")
LATER = [place for place in PLACES if place not in FIRST and place != "checksums of the cache"]


def start(folder, run, kill=("never", 1, 0), num_processes=1, number=0, port=0):
    flags = [
        *(f"--config={ROOT}/configs/synthetic.py", f"--workdir={folder / run}"),
        *(f"--config.dataset.source={folder / 'raw'}", f"--config.dataset.data_dir={folder / f'{run}-data'}"),
        *("--config.data.height=32", "--config.data.width=16", "--config.data.cache=host", "--config.model.width=4"),
        *("--config.model.backbone=resnet18", "--config.model.stage_sizes=(1,1,1,1)"),
        *("--config.model.channel_module=none", "--config.model.pattern_module=none"),
        *("--config.data.num_ids_per_batch=4", "--config.data.images_per_id=4", "--config.eval.best=mAP"),
        *(f"--config.train.num_epochs={NUM_EPOCHS}", "--config.train.checkpoint_every_epochs=1"),
        *("--config.train.eval_every_epochs=2", "--config.train.log_every_steps=1", "--config.eval.batch_size=32"),
        f"--compilation_cache={os.environ.get('JAX_COMPILATION_CACHE_DIR', folder / 'xla')}",
    ]
    if num_processes > 1:
        flags += ["--distributed", f"--coordinator_address=127.0.0.1:{port}"]
        flags += [f"--num_processes={num_processes}", f"--process_id={number}"]
    with open(folder / f"{run}.{number}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.kill_process", *map(str, kill), *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=log,
            stderr=log,
        )


def outcome(folder, run):
    """Everything that a run leaves for good; arrays as bytes."""
    found = {}
    for which in ("last", "best"):
        step, model = load_model(folder / run, which)
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(model)}
        found[which] = step, {name: array.tobytes() for name, array in arrays.items()}
    for name in ("metrics.json", "metrics_best.json"):
        found[name] = json.loads((folder / run / name).read_text())
    return found


def differences(folder, run, expected):
    found = outcome(folder, run)
    return [name for name in expected if found[name] != expected[name]]


def run_to_the_end(folder, run, **options):
    process = start(folder, run, **options)
    code = process.wait(timeout=HANGS_AFTER)
    assert code == 0, (folder / f"{run}.0.log").read_text()[-3000:]


def kill_chain(folder, run, expected, num_kills, chance):
    """Kills a run `num_kills` times; returns the places, and what differs in the end."""
    places = Counter()
    wanted = list(FIRST)
    while sum(places.values()) < num_kills:
        place = wanted.pop(0) if wanted else chance.choice(LATER)
        call = chance.randint(1, 3) if place == "training" else 1
        code = start(folder, run, (place, call, chance.randint(0, 40))).wait(timeout=HANGS_AFTER)
        if code != -signal.SIGKILL:  # it was at its end before; it is evaluated anew
            assert code == 0, (folder / f"{run}.0.log").read_text()[-3000:]
            shutil.rmtree(folder / run)
            continue
        places[place] += 1
    run_to_the_end(folder, run)
    return places, differences(folder, run, expected)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kill_one_of_two(folder, run, expected, chance):
    for kill in (("training", chance.randint(4, 9), chance.randint(0, 40)), ("never", 1, 0)):
        port = free_port()
        killed = chance.randint(0, 1)
        kills = [kill if number == killed else ("never", 1, 0) for number in range(2)]
        processes = [start(folder, run, kills[number], 2, number, port) for number in range(2)]
        try:
            codes = [process.wait(timeout=HANGS_AFTER) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if kill[0] == "never":
            assert codes == [0, 0], codes
        else:
            assert codes[killed] == -signal.SIGKILL and codes[1 - killed] != 0, codes
    return differences(folder, run, expected)


def kill_matrix(folder, num_kills, seed, two_processes=True):
    """{'kills': {place: times}, 'losses': [what differs]}"""
    folder.mkdir(parents=True, exist_ok=True)
    write_dataset(
        "sysu_mm01", folder / "raw", num_train_ids=4, num_test_ids=4, images_per_camera=(3, 3), height=(48, 56)
    )
    run_to_the_end(folder, "whole")
    expected = outcome(folder, "whole")
    chance, kills, losses = random.Random(seed), Counter(), []
    for chain in range(-(-num_kills // CHAIN)):
        places, lost = kill_chain(folder, f"run{chain}", expected, min(CHAIN, num_kills - chain * CHAIN), chance)
        kills += places
        losses += lost
        print(f"chain {chain}: {dict(places)} lost {lost}", file=sys.stderr, flush=True)
    if two_processes:
        losses += kill_one_of_two(folder, "two", expected, chance)
        kills["one of two processes"] += 1
    return {"kills": dict(kills), "losses": losses}


if __name__ == "__main__":
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(2**31)
    found = {"seed": seed, **kill_matrix(Path(sys.argv[1]), int(sys.argv[2]), seed)}
    print(json.dumps(found))
    sys.exit(bool(found["losses"]))
