"""Checksums of the files of a folder, kept in it: whether it is still what was written."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpanet_jax.files import write_whole

CHECKSUMS_FILE = "checksums.json"
_CHUNK = 1 << 20
_THREADS = 4  # zlib releases Python's lock


def checksum(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent / CHECKSUMS_FILE != path)
    return {str(path.relative_to(folder)): path for path in sorted(paths)}


def write_checksums(folder: Path) -> None:
    """Writes CHECKSUMS_FILE, whole or not at all: {file: [size, CRC-32]} of all files below `folder`."""
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = dict(zip(files, pool.map(checksum, files.values()), strict=True))
    # Waiting for the disk would be waiting for the files too, which took longer than the whole save.
    with write_whole(folder / CHECKSUMS_FILE, sync=False) as file:
        json.dump(sums, file, indent=1)


def damage(folder: Path) -> str | None:
    """What has changed in `folder` since `write_checksums`, in words; None where nothing has, or it has no checksums.

    Raises:
      OSError: a file cannot be read.
    """
    try:
        recorded = json.loads((folder / CHECKSUMS_FILE).read_text())
        recorded = {str(name): (int(size), int(crc)) for name, (size, crc) in recorded.items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} cannot be read"
    files = _files(folder)
    for name, (size, _) in recorded.items():
        if name not in files:
            return f"{name} is missing"
        if files[name].stat().st_size != size:
            return f"{name} has {files[name].stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(recorded, pool.map(lambda name: checksum(files[name]), recorded), strict=True):
            if found != recorded[name]:
                return f"{name} is not what was written"
    return None
