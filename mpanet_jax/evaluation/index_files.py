"""The files of an index: a folder with rows in an .npy file, and index.json, written last, which says what they are.

An update writes new rows into a new file, then index.json, then removes the old rows: killed at any time, it leaves the
old index or the new one.
"""

import contextlib
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mpanet_jax.errors import UserError, first_line
from mpanet_jax.files import write_whole

INDEX_FILE = "index.json"
FORMAT = {"format": "mpanet_jax index", "version": 1}
_ROWS = "features-{}.npy"
_COLUMNS = ("paths", "sizes", "mtimes_ns", "modality")


@dataclass(frozen=True)
class IndexFiles:
    """What index.json says.

    Attributes:
      fingerprint, model: of the model that made the rows, and where it was.
      gallery: the gallery's path from the index's folder.
      features: the name of the file of rows.
      paths: str[N], of the images, from the gallery's folder; the order is that of the rows.
      sizes, mtimes_ns: int[N], of the files when they were embedded: bytes, and nanoseconds since 1970.
      modality: int[N], 0 visible, 1 infrared, -1 unknown.
      skipped: (path, reason) of the images that could not be read.
    """

    fingerprint: str
    model: str
    gallery: str
    features: str
    paths: list[str]
    sizes: list[int]
    mtimes_ns: list[int]
    modality: list[int]
    skipped: list[tuple[str, str]]

    def take(self, rows: Iterable[int]) -> "IndexFiles":
        """The images `rows`."""
        rows = list(rows)
        return replace(self, **{name: [getattr(self, name)[row] for row in rows] for name in _COLUMNS})


def read_index(folder: Path) -> IndexFiles | None:
    """What index.json of a folder says; None where there is none.

    Raises:
      UserError: it is not an index's.
    """
    path = folder / INDEX_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if {name: tree.pop(name, None) for name in FORMAT} != FORMAT:
            raise ValueError(f"it does not say {FORMAT}")
        files = IndexFiles(**tree)
        if len({len(getattr(files, name)) for name in _COLUMNS}) != 1:
            raise ValueError("its lists differ in length")
        return replace(files, skipped=[(name, reason) for name, reason in files.skipped])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: not an index ({first_line(error)}); rebuild it") from error


def map_rows(folder: Path, files: IndexFiles, dimension: int) -> Float32[np.ndarray, "n d"]:
    """The rows, memory-mapped.

    Raises:
      UserError: they are gone, cut off, or of another shape than index.json says.
    """
    path, shape = folder / files.features, (len(files.paths), dimension)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.shape != shape or rows.dtype != np.float32:
            raise ValueError(f"{rows.dtype}{list(rows.shape)}, expected float32{list(shape)}")
        return rows
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not the rows of its index ({first_line(error)}); rebuild it") from error


@contextlib.contextmanager
def locked_index(folder: Path) -> Iterator[None]:
    """Holds the folder of an index for one that writes; readers do not ask for it.

    Raises:
      UserError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing this index; wait until it ends") from None
        except OSError:  # a disk without locks, as some network drives are
            pass
        yield


def write_index(folder: Path, files: IndexFiles, blocks: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> IndexFiles:
    """Writes an index in place of the one that is there, and returns it.

    Args:
      folder: of the index, locked.
      files: all but `features` and the columns.
      blocks: rows float32[n, d], and with them n entries of each column, by its name.
    """
    name, columns = _ROWS.format(uuid.uuid4().hex), {column: [] for column in _COLUMNS}
    before = None
    with contextlib.suppress(UserError):
        before = read_index(folder)
    _remove_rows(folder, but=before.features if before else "")  # those of processes that were killed
    try:
        with open(folder / name, "wb") as file:
            length = dimension = 0
            _write_header(file, 0, 0)
            for rows, entries in blocks:
                dimension = rows.shape[1]
                # Not by tofile, whose error on a full disk does not say that it is full.
                file.write(np.ascontiguousarray(rows, "<f4").tobytes())
                length += len(rows)
                for column, values in columns.items():
                    values += entries[column]
            file.seek(0)
            _write_header(file, length, dimension)
            file.flush()
            os.fsync(file.fileno())
        written = replace(files, features=name, **columns)
        with write_whole(folder / INDEX_FILE) as file:
            json.dump({**FORMAT, **vars(written)}, file, separators=(",", ":"))
    except BaseException:
        (folder / name).unlink(missing_ok=True)
        raise
    _remove_rows(folder, but=name)
    return written


def _remove_rows(folder: Path, but: str) -> None:
    for file in folder.iterdir():
        if re.fullmatch(_ROWS.format("[0-9a-f]{32}"), file.name) and file.name != but:  # the folder may hold others
            file.unlink()


def _write_header(file: Any, length: int, dimension: int) -> None:
    """The header of an .npy file, of one length for all shapes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({length}, {dimension}), }}".ljust(117) + "\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1"))
