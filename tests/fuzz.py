"""Damaged files for everything that reads files of others: make test-fuzz.

    python -m tests.fuzz SECONDS [SEED]

A reader answers with what it read or with a `UserError` of one line; anything else is a finding. Its file is kept as
tests/fuzz_found/READER.NUMBER, and read again by every make test. Prints as JSON the seed, the files tried for each
reader, and the findings.
"""

import io
import json
import os
import random
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from mpanet_jax.datasets.own import read_csv
from mpanet_jax.datasets.prepared import read_index as read_prepared
from mpanet_jax.datasets.raw import raise_fault, read_identities, read_index
from mpanet_jax.datasets.sysu_mm01 import load_permutation
from mpanet_jax.embeddings import load_embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.methods.mpanet import MPANetSettings
from mpanet_jax.run_files import load_settings
from mpanet_jax.settings_base import to_dict
from mpanet_jax.weights.files import METADATA_KEY, read_metadata, read_state_dict

FOUND = Path(__file__).parent / "fuzz_found"


def _npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _embeddings():
    numbers = np.arange(3)
    return _npz(
        features=np.eye(3, 4), pids=numbers, camids=numbers, paths=np.array(["a", "b", "c"]), modality=numbers % 2
    )


def _prepared():
    numbers, names = np.arange(3, dtype=np.int32), np.array(["a", "b", "c"])
    columns = {"pids": numbers, "camids": numbers, "modality": numbers % 2}
    return _npz(**columns, paths=names, parts=names, pid_names=names, fingerprint=np.array("0123456789abcdef" * 2))


def _permutation():
    import scipy.io

    cell = np.empty((2, 1), object)
    cell[0, 0], cell[1, 0] = np.ones((10, 1)), np.zeros((10, 0))
    cameras = np.empty((6, 1), object)
    for camera in range(6):
        cameras[camera, 0] = cell
    file = io.BytesIO()
    scipy.io.savemat(file, {"rand_perm_cam": cameras})
    data = file.getvalue()
    return b" " * 116 + data[116:]  # without the date in its header


CSV = b"path,pid,camid,modality,split\na.png,anna,1,visible,train\nb.png,ben,,infrared,query\n"
CONFIG = json.dumps(to_dict(MPANetSettings())).encode()
WEIGHTS = safetensors.numpy.save({"w": np.ones((2, 3), np.float32)}, metadata={METADATA_KEY: CONFIG.decode()})
# Reader → the file's name, a sound one, and what reads it.
READERS = {
    "identities": ("train_id.txt", b"1,2,3,15", lambda path: read_identities(path, raise_fault)),
    "index": ("index.txt", b"a.png 0\nb.png 1\n", lambda path: read_index(path, path.parent, raise_fault)),
    "csv": ("images.csv", CSV, lambda path: read_csv(path.parent, raise_fault)),
    "permutation": ("rand_perm_cam.mat", _permutation(), load_permutation),
    "embeddings": ("query.npz", _embeddings(), load_embeddings),
    "prepared": ("index_train.npz", _prepared(), read_prepared),
    "config": ("config.json", CONFIG, lambda path: load_settings(path.parent)),
    "weights": ("model.safetensors", WEIGHTS, lambda path: (read_state_dict(path), read_metadata(path))),
}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged_bytes(draw, sound):
    """Some bytes of a sound file changed, taken out, put in or cut off."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "remove", "repeat"]))
        if kind == "change" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=8) | st.sampled_from([b"\0", b"-1", b"\xff\xfe", b"9" * 5000]))
        elif kind == "remove":
            del data[place : place + draw(st.integers(1, 16))]
        else:
            data[place:place] = data[max(0, place - draw(st.integers(1, 64))) : place]
    return bytes(data)


@st.composite
def damaged_json(draw, sound):
    """A sound tree with a value replaced, a field removed, or one added."""
    tree = json.loads(sound)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while isinstance(node, dict) and node:
            name = draw(st.sampled_from(sorted(node)))
            if not isinstance(node[name], dict) or draw(st.integers(0, 3)) == 0:
                break
            node = node[name]
        if not isinstance(node, dict) or not node:
            continue
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove":
            del node[name]
        else:
            node[name if kind == "replace" else draw(st.text(max_size=8))] = draw(JSON_VALUES)
    return json.dumps(tree).encode()


def files_for(reader):
    """The strategy of files for a reader."""
    sound = READERS[reader][1]
    damaged = damaged_bytes(sound) | st.binary(max_size=64)
    return damaged_json(sound) | damaged if reader == "config" else damaged


def answer(reader, data, folder):
    """None where the reader does as it should with a file that holds `data`, else what it did."""
    name, _, read = READERS[reader]
    folder = folder / reader
    folder.mkdir(exist_ok=True)
    for image in ("a.png", "b.png"):
        (folder / image).touch()
    (folder / name).write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder / name)
    except UserError as error:
        return f"a message of several lines: {error}" if "\n" in str(error) else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def keep(reader, data):
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{reader}.{zlib.crc32(data):08x}"
    path.write_bytes(data)
    return path


def fuzz(seconds, seed, folder):
    """{'seed', 'tried': {reader: files}, 'found': {what the reader did: file}}"""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    tried, found, end = Counter(), {}, time.monotonic() + seconds
    chance = random.Random(seed)
    while time.monotonic() < end:
        for reader in READERS:

            @seeded(chance.randrange(2**31))
            @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(st.just(reader), files_for(reader))
            def read_all(name, data):
                tried[name] += 1
                what = answer(name, data, folder)
                if what and (key := f"{name}: {what[:80]}") not in found:
                    found[key] = str(keep(name, data))

            read_all()
    return {"seed": seed, "tried": dict(tried), "found": found}


if __name__ == "__main__":
    import tempfile

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**31)
    with tempfile.TemporaryDirectory() as name:
        report = fuzz(float(sys.argv[1]), chosen, Path(name))
    print(json.dumps(report, indent=1))
    sys.exit(bool(report["found"]))
