"""The image cache's checksums, checked while training runs; and reads of it that survive a file that is cut off."""

import json
import os
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mpanet_jax.background import InBackground
from mpanet_jax.cpus import available_cpus
from mpanet_jax.errors import UserError
from mpanet_jax.files import write_whole

_BLOCK = 64 << 20  # bytes; each block has a checksum of its own
_CHUNK = 1 << 20  # bytes read at once


def sums_path(cache: Path) -> Path:
    """The file of a cache's checksums."""
    return cache.with_suffix(".crc32.json")


def write_sums(cache: Path, file: Path) -> None:
    """Writes the checksums of `file`, which will be renamed to `cache`; whole or not at all."""
    with write_whole(sums_path(cache)) as stream:
        json.dump(_sums(file), stream)


def _sums(file: Path) -> list[int]:
    with ThreadPoolExecutor(min(available_cpus(), 4)) as pool:
        return list(pool.map(lambda start: _block_sum(file, start), range(0, file.stat().st_size, _BLOCK)))


def _block_sum(file: Path, start: int) -> int:
    crc, left = 0, _BLOCK
    with open(file, "rb") as stream:
        stream.seek(start)
        while left and (chunk := stream.read(min(_CHUNK, left))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


class CacheCheck:
    """Compares a cache with its checksums in the background. A cache of an older version has none and passes."""

    def __init__(self, cache: Path):
        self._cache = cache
        self._check = InBackground(self._is_sound)

    def start(self) -> None:
        """Starts the check, unless it has been started."""
        self._check.start()

    def _is_sound(self) -> bool:
        recorded = sums_path(self._cache)
        try:
            return not recorded.exists() or json.loads(recorded.read_text()) == _sums(self._cache)
        except ValueError:
            return False

    def require(self) -> None:
        """Waits for the check, and returns if the cache is sound.

        Raises:
          UserError: it is damaged; it has been deleted, so that the next start builds it anew.
        """
        if not self._check.result():
            for path in (self._cache, sums_path(self._cache)):
                path.unlink(missing_ok=True)
            raise UserError(
                f"{self._cache}: the image cache is damaged, and this run has trained on it; it has been deleted, and "
                "the same command builds it anew (if that happens again, check the disk)"
            )


class CacheFile:
    """Reads images from a memory-mapped cache's file: if that is cut off, reading the map would kill the process."""

    def __init__(self, images: np.memmap):
        self._path, self._offset, self._shape = Path(images.filename or ""), images.offset, images.shape
        self._descriptor = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """The images at `index`, int[b], as uint8[b, height, width, 3].

        Raises:
          UserError: the file has been cut off since the map was made.
        """
        images = np.empty((len(index), *self._shape[1:]), np.uint8)
        size = images[:1].nbytes
        for number, row in enumerate(map(int, index)):
            buffers: list[Any] = [images[number : number + 1]]  # NumPy's stubs hide that arrays are buffers
            if os.preadv(self._descriptor, buffers, self._offset + row * size) != size:
                raise UserError(f"{self._path}: the image cache was cut off during the run; delete it, and start again")
        return images
