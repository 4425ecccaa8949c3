"""Images read in threads and in processes are the same, in the same order, with the same faults."""

import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mpanet_jax.data.grain_batches as grain_batches_module
import mpanet_jax.data.reading as reading_module
from mpanet_jax.data.decode import SplitPixels
from mpanet_jax.data.pipeline import eval_batches, split_batches
from mpanet_jax.data.reading import MANY_IMAGES, MANY_SENT, processes_for, read_parts
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.given_images import rows_of_images
from mpanet_jax.settings import DataSettings
from tests.data.toy import toy_split

ROOT = Path(__file__).parents[2]
DATA = DataSettings(height=4, width=2)
# A script without `if __name__ == "__main__":`.
UNGUARDED = """
print("main", flush=True)
from tests.data.test_reading import DATA, Numbered, read_parts
print([int(part.arrays["images"][0, 0, 0, 0]) for part in read_parts(Numbered(), 7, DATA, size=3, num_workers=2)])
"""


@dataclass(frozen=True)
class Numbered:
    """Image i has the value i in every pixel; the images in `bad` cannot be read."""

    bad: tuple[int, ...] = ()
    error: type[Exception] = UserError

    def __call__(self, row: int) -> np.ndarray:
        if row in self.bad:
            raise self.error(f"image {row} is bad")
        return np.full((4, 2, 3), row, np.uint8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_keep_the_order_and_name_what_is_bad(num_workers):
    before = set(multiprocessing.active_children())
    parts = list(read_parts(Numbered(bad=(1, 4)), 8, DATA, size=3, num_workers=num_workers))
    assert [part.rows for part in parts] == [range(3), range(3, 6), range(6, 8)]
    assert [part.mask.tolist() for part in parts] == [[True, False, True], [True, False, True], [True, True, False]]
    pixels = np.concatenate([part.arrays["images"] for part in parts])
    np.testing.assert_array_equal(pixels, np.array([0, 0, 2, 3, 0, 5, 6, 7, 0])[:, None, None, None] + 0 * pixels)
    assert [part.faults for part in parts] == [[(1, "image 1 is bad")], [(4, "image 4 is bad")], []]
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_error_ends_the_reading(num_workers):
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError, match="image 2 is bad"):
        list(read_parts(Numbered((2,), ZeroDivisionError), 8, DATA, size=2, num_workers=num_workers))
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fault_stops_the_batches_or_is_told(num_workers):
    rows = {"pids": np.arange(10, 17), "index": np.arange(7)}
    with pytest.raises(UserError, match=r"^image 5 is bad$"):
        list(eval_batches(rows, Numbered((6, 5)), DATA, 4, num_workers=num_workers))
    told = []
    batches = list(
        eval_batches(
            rows, Numbered((6, 5)), DATA, 4, lambda row, error: told.append((row, str(error))), num_workers=num_workers
        )
    )
    assert told == [(5, "image 5 is bad"), (6, "image 6 is bad")]
    assert [batch["pids"].tolist() for batch in batches] == [[10, 11, 12, 13], [14, 0, 0, 0]]
    assert batches[1]["mask"].tolist() == [True, False, False, False]


def test_processes_read_many_images_on_many_cpus(monkeypatch, capsys):
    monkeypatch.setattr(grain_batches_module, "available_cpus", lambda: 16)
    monkeypatch.setattr(grain_batches_module, "_free_shared_memory", lambda: 2**40)
    assert processes_for(MANY_IMAGES, -1, 1000) == processes_for(MANY_IMAGES, 20, 1000) == 12
    assert processes_for(MANY_IMAGES, 3, 1000) == processes_for(MANY_SENT, 3, 1000, sent=True) == 3
    assert processes_for(MANY_SENT, -1, 1000, sent=True) == 12
    assert processes_for(MANY_SENT - 1, -1, 1000, sent=True) == 0
    assert processes_for(MANY_IMAGES - 1, -1, 1000) == processes_for(MANY_IMAGES, 0, 1000) == 0
    with monkeypatch.context() as patch:
        patch.setattr(grain_batches_module, "_free_shared_memory", lambda: 64 * 2**20)
        assert processes_for(MANY_IMAGES, -1, 10 * 2**20) == 0
    monkeypatch.setattr(grain_batches_module, "available_cpus", lambda: 4)
    assert processes_for(MANY_IMAGES, -1, 1000) == 0
    assert not capsys.readouterr().err  # an evaluation would say it each time


def test_processes_do_not_run_the_main_module_again(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    words = [sys.executable, script]
    found = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (found.returncode, found.stdout) == (0, "main\n[0, 3, 6]\n"), found.stderr


@pytest.fixture
def two_processes(monkeypatch) -> list[int]:
    """The numbers of images for which processes were asked; two are given."""
    numbers = []
    monkeypatch.setattr(reading_module, "processes_for", lambda number, *_, **__: numbers.append(number) or 2)
    return numbers


def test_images_of_a_split_are_read_in_processes(two_processes):
    split = toy_split()
    found = list(split_batches(split, np.arange(20), DATA, 8))
    assert two_processes == [20]
    for batch, alone in zip(
        found,
        eval_batches({"index": np.arange(20)}, SplitPixels(split, np.arange(20), DATA), DATA, 8, num_workers=0),
        strict=True,
    ):
        np.testing.assert_array_equal(batch["images"], alone["images"])


def test_files_are_read_in_processes_and_images_in_memory_are_not(two_processes, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((4, 2, 3), 7, np.uint8)).save(path)
    options = {"modality": np.zeros(2, np.int32), "data": DATA, "batch_size": 2}
    for images in ([path, path], [path, np.full((4, 2, 3), 7, np.uint8)]):
        blocks, skipped = rows_of_images(lambda images, modality: images[:, 0, 0], images, **options)
        assert blocks[0].tolist() == [[7, 7, 7]] * 2 and not skipped
    assert two_processes == [2]
