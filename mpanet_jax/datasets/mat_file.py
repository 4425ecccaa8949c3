"""Reads cells and arrays of numbers from MATLAB 5 files.

SciPy's reader crashes the whole program on damaged files (SciPy 1.17: a segmentation fault on unknown types, and on
sizes that do not fit). The format is level 5 of MathWorks' "MAT-File Format": a header, then elements. An element is a
tag, which holds its type and size, and its bytes; a matrix is an element that consists of elements.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEADER = 128  # bytes; the last two hold the byte order
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CELL = 1
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_DEEPEST = 4  # cells in cells


def read_variable(path: Path, name: str) -> np.ndarray:
    """Reads the variable `name` of a file.

    Returns:
      An array of numbers; for a cell an array of objects, whose items are such arrays.

    Raises:
      ValueError: the file is no MATLAB 5 file, is damaged, or has no such variable of these kinds.
      OSError: the file cannot be read.
    """
    data = path.read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(data[_HEADER - 2 : _HEADER])
    if order is None:
        raise ValueError("no header of a MATLAB 5 file")
    for kind, body in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            try:
                ((kind, body),) = _elements(zlib.decompress(body), order)
            except zlib.error as error:
                raise ValueError(f"a variable cannot be unpacked ({error})") from error
        if kind == _MATRIX and _name(body, order) == name:
            return _matrix(body, order)
    raise ValueError(f"no variable {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data):
        if place + 8 > len(data):
            raise ValueError("cut off")
        kind, size = struct.unpack_from(f"{order}II", data, place)
        start = place + 8
        if kind >> 16:  # a small element: up to four bytes, in the tag itself
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
            place += 8
            fits = size <= 4
        else:
            place = start + size + (0 if kind == _COMPRESSED else -size % 8)
            fits = start + size <= len(data)
        if not fits:
            raise ValueError(f"an element of {size} bytes does not fit where it stands")
        yield kind, data[start : start + size]


def _numbers(kind: int, body: bytes, order: str) -> np.ndarray:
    if kind not in _NUMBERS:
        raise ValueError(f"numbers of the unknown type {kind}")
    return np.frombuffer(body, np.dtype(order + _NUMBERS[kind]))


def _name(body: bytes, order: str) -> str:
    parts = [part for part, _ in zip(_elements(body, order), range(3), strict=False)]
    return parts[2][1].decode("latin-1") if len(parts) == 3 else ""


def _matrix(body: bytes, order: str, depth: int = 0) -> np.ndarray:
    if not body:
        return np.zeros((0, 0))
    parts = list(_elements(body, order))
    if len(parts) < 3 or depth > _DEEPEST:
        raise ValueError("a matrix is not whole")
    flags, shape = (_numbers(*part, order) for part in parts[:2])
    if not len(flags) or flags.dtype.kind not in "iu" or len(shape) < 2 or shape.dtype.kind not in "iu":
        raise ValueError("a matrix has no class or no size")
    shape, kind = [int(size) for size in shape], int(flags[0]) & 0xFF
    if min(shape) < 0:
        raise ValueError(f"a matrix of size {shape}")
    content = parts[3:]
    if kind == _CELL:
        if len(content) != math.prod(shape) or any(part[0] != _MATRIX for part in content):
            raise ValueError(f"a cell of size {shape} holds {len(content)} items")
        items = np.empty(len(content), object)
        for number, (_, item) in enumerate(content):
            items[number] = _matrix(item, order, depth + 1)
        return items.reshape(shape, order="F")
    if kind not in _CLASSES:
        raise ValueError(f"a matrix of class {kind}, neither a cell nor numbers")
    values = _numbers(*content[0], order) if content else np.zeros(0)
    if len(content) > 1 or len(values) != math.prod(shape):
        raise ValueError(f"a matrix of size {shape} holds {len(values)} numbers")
    return values.astype(_CLASSES[kind]).reshape(shape, order="F")
