"""The files of an index: a folder with the rows in an .npy file, and index.json, which says what they are.

An update writes all rows into a new file, then index.json, and then removes the old rows. Killed at any time, it leaves
the old index or the new one.
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
FORMAT = {"format": "mpanet_jax index", "version": 2}
_WITHOUT_DTYPE = FORMAT | {"version": 1}
_ROWS = "features-{}.npy"
_COLUMNS = ("paths", "sizes", "mtimes_ns", "modality")


@dataclass(frozen=True)
class IndexFiles:
    """What index.json says.

    Attributes:
      fingerprint: `Model.fingerprint` of the model that made the rows.
      dtype: `Model.dtype`, the precision in which it computed them: 'float32', 'bfloat16' or 'float64'.
      model: where that model was read from.
      gallery: the gallery's path, relative to the index's folder.
      features: the name of the file that holds the rows.
      paths: str[N], the images' paths from the gallery's folder, in the order of the rows.
      sizes, mtimes_ns: int[N], each file's size in bytes and its time of modification in nanoseconds since 1970, as
        they were when it was embedded.
      modality: int[N], 0 visible, 1 infrared, -1 unknown.
      skipped: (path, reason) of each image that could not be read.
    """

    fingerprint: str
    dtype: str
    model: str
    gallery: str
    features: str
    paths: list[str]
    sizes: list[int]
    mtimes_ns: list[int]
    modality: list[int]
    skipped: list[tuple[str, str]]

    def take(self, rows: Iterable[int]) -> "IndexFiles":
        """The index of the images at these row numbers alone."""
        rows = list(rows)
        return replace(self, **{name: [getattr(self, name)[row] for row in rows] for name in _COLUMNS})


def read_index(folder: Path) -> IndexFiles | None:
    """Read a folder's index.json; None where there is none.

    Raises:
      UserError: the file is not an index's, or is of version 1, which did not store the precision of the rows.
    """
    path = folder / INDEX_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = {name: tree.pop(name, None) for name in FORMAT}
        if found == _WITHOUT_DTYPE:
            raise UserError(
                f"{path}: is of version 1, which does not say whether the rows were computed in float32 or bfloat16; "
                "rebuild it"
            )
        if found != FORMAT:
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
    """Memory-map the rows of an index.

    Args:
      folder: the index's folder.
      files: what its index.json says.
      dimension: D, the length of a row.

    Raises:
      UserError: the file of rows is missing or cut off, or its shape is not the one that index.json says.
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
    """Lock an index's folder for writing while the block runs; reading needs no lock.

    Raises:
      UserError: another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing this index; wait until it ends") from None
        except OSError:  # a disk without locks, such as some network drives
            pass
        yield


def write_index(folder: Path, files: IndexFiles, blocks: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> IndexFiles:
    """Write an index in place of the one that is there, and return it.

    Args:
      folder: the index's folder, locked (`locked_index`).
      files: everything but `features` and the columns `paths`, `sizes`, `mtimes_ns` and `modality`.
      blocks: pairs of rows float32[n, D] and their n entries of each column, {column: entries}.
    """
    name, columns = _ROWS.format(uuid.uuid4().hex), {column: [] for column in _COLUMNS}
    before = None
    with contextlib.suppress(UserError):
        before = read_index(folder)
    _remove_rows(folder, but=before.features if before else "")  # killed processes may have left some
    try:
        with open(folder / name, "wb") as file:
            length = dimension = 0
            _write_header(file, 0, 0)
            for rows, entries in blocks:
                dimension = rows.shape[1]
                # tofile's error on a full disk would not say that the disk is full.
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
        if re.fullmatch(_ROWS.format("[0-9a-f]{32}"), file.name) and file.name != but:  # leaves the user's files alone
            file.unlink()


def _write_header(file: Any, length: int, dimension: int) -> None:
    """Writes the header of an .npy file; its length is the same for every shape, so it can be overwritten later."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({length}, {dimension}), }}".ljust(117) + "\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1"))
