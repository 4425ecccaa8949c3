"""The cache of a split's resized images, a memory-mapped file; and the choice among the three feeding modes."""

import contextlib
import fcntl
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging

from mpanet_jax.data.cache_check import write_sums
from mpanet_jax.data.decode import SplitPixels
from mpanet_jax.data.reading import read_parts
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import SettingsError
from mpanet_jax.memory import free_ram
from mpanet_jax.processes import gather, is_first_process
from mpanet_jax.progress import track
from mpanet_jax.settings import DataSettings

CACHE_MODES = ("device", "host", "none")

# Part of the file's name: raise it when `decode.py` changes the pixels. Version 1 had OpenCV's resize.
PIXELS_VERSION = 2
_READ_AT_ONCE = 128


def open_images(split: Split, data: DataSettings, cache_dir: str | os.PathLike | None) -> tuple[str, np.ndarray | None]:
    """Chooses the feeding mode and opens the resized images that it needs; builds their cache if need be.

    The cache file is built under a temporary name and renamed once it is whole, so a build that is killed leaves
    nothing that looks like a cache; the next build replaces its remains. Checksums lie beside the file (`cache_check`).
    A lock makes other processes wait for a build that is under way.

    Args:
      split: whose images.
      data: their size and filter, and `cache`: the mode, or 'auto' (see `choose_cache`).
      cache_dir: the folder of the cache; None keeps the images in RAM only. The mode 'device' keeps them in RAM too if
        the folder has no room, because it needs the file only to start faster the next time.

    Returns:
      'device', 'host' or 'none', the same in all processes; and uint8[N, height, width, 3], or None with 'none'.

    Raises:
      UserError: an image cannot be decoded, or `cache_dir` cannot be written; the message then names
        dataset.data_dir, the folder above it.
    """
    shape = (len(split), data.height, data.width, 3)
    path = None if cache_dir is None else cache_path(split, data, cache_dir)
    images = _open(path, shape)
    chosen = choose_cache(data.cache, math.prod(shape), cache_dir, built=images is not None)
    # All processes run the same program, so the one with the least room decides.
    cache = CACHE_MODES[max(gather(CACHE_MODES.index(chosen), "the choice of data.cache"))]
    if cache != chosen and is_first_process():
        print(f"images: cache={cache}, because another process has less room", file=sys.stderr)
    if cache == "none":
        return cache, None
    if images is None and path is not None and (cache == "host" or _has_room(path.parent, math.prod(shape))):
        images = _build(path, shape, split, data)
    elif images is None:
        images = np.empty(shape, np.uint8)
        _fill(images, split, data)
    return cache, images


def choose_cache(cache: str, num_bytes: int, cache_dir: str | os.PathLike | None, *, built: bool = False) -> str:
    """Chooses the feeding mode for `cache` = 'auto'; returns any other valid value as it is.

    The mode is 'device' if the images fit in half of the accelerator's free memory. Else it is 'host' if they fit in
    half of the free RAM and, unless the cache is there already, in half of the free space of `cache_dir`. Else it is
    'none'. Without an accelerator 'device' would be a second copy in the same RAM, and is not chosen. The first process
    prints the choice and the free sizes to stderr.

    Args:
      cache: settings.data.cache.
      num_bytes: of all images.
      cache_dir: the folder of the cache, or None.
      built: whether the cache is there already.

    Raises:
      UserError: an unknown `cache`.
    """
    if cache in CACHE_MODES:
        return cache
    if cache != "auto":
        raise SettingsError(f"data.cache = {cache!r} is unknown; expected one of {('auto', *CACHE_MODES)}")
    sizes = {"accelerator": _free_device_memory(), "RAM": free_ram()}
    if cache_dir is not None and not built:
        # A folder that may not be written, as that of a data set shared by many, has no room.
        writable = os.access(_existing(Path(cache_dir)), os.W_OK)
        sizes["disk"] = _free_disk(Path(cache_dir)) if writable else 0
    fits = {place: free >= 2 * num_bytes for place, free in sizes.items()}
    if fits.pop("accelerator"):
        choice = "device"
    elif all(fits.values()):
        choice = "host"
    else:
        choice = "none"
    free = ", ".join(f"{place} {_size(size)}" for place, size in sizes.items())
    if is_first_process():
        print(
            f"images: cache={choice} chosen for {_size(num_bytes)} resized (free: {free}; half of it may be used)",
            file=sys.stderr,
        )
    return choice


def cache_path(split: Split, data: DataSettings, cache_dir: str | os.PathLike) -> Path:
    """The cache file of a split; its name depends on the prepared data, the images' size and the filter."""
    name = split.name.replace("/", "-")
    pixels = f"{data.height}x{data.width}-{data.resize}-v{PIXELS_VERSION}"
    return Path(cache_dir) / f"{name}-{split.fingerprint}-{pixels}.npy"


def _open(path: Path | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The memory-mapped images that an earlier run has cached; None if there are none."""
    if path is None or not path.exists():
        return None
    try:
        images = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):  # cut off, as by a full disk: it will be built again
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _build(path: Path, shape: tuple[int, ...], split: Split, data: DataSettings) -> np.ndarray:
    """Writes the cache, unless another process has done so meanwhile, and maps it into memory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if (images := _open(path, shape)) is not None:
                return images
            temporary = path.with_suffix(".npy.part")
            with _removed_on_error(temporary):
                images = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, instead of a crash later
                    with open(temporary, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                _fill(images, split, data)
                images.flush()
                del images
                write_sums(path, temporary)
                os.replace(temporary, path)
    except OSError as error:
        raise SettingsError(
            f"dataset.data_dir: can't write the image cache ({_size(math.prod(shape))}) to {path.parent} "
            f"({error}); name a folder with room for it, or set data.cache = 'none'"
        ) from error
    return np.load(path, mmap_mode="r")


def _has_room(cache_dir: Path, num_bytes: int) -> bool:
    """Whether `num_bytes` can be written to `cache_dir`; if not, a line on stderr says so."""
    room = os.access(_existing(cache_dir), os.W_OK) and _free_disk(cache_dir) >= num_bytes
    if not room:
        print(f"images: not kept for the next run, no room for {_size(num_bytes)} in {cache_dir}", file=sys.stderr)
    return room


def _fill(images: np.ndarray, split: Split, data: DataSettings) -> None:
    """Decodes and resizes every image into its place."""
    started = time.perf_counter()
    read = read_parts(SplitPixels(split, np.arange(len(split)), data), len(split), data, size=_READ_AT_ONCE)
    with contextlib.closing(read) as parts:
        for part in track(parts, f"resizing {split.name}", len(split), size=lambda part: len(part.rows)):
            part.require_sound()
            images[part.rows.start : part.rows.stop] = part.arrays["images"][: len(part.rows)]
    rate = len(split) / (time.perf_counter() - started)
    size = f"{data.height}x{data.width}"
    logging.info("images: %d of %s resized to %s, %.0f a second", len(split), split.name, size, rate)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # some network drives have no locks: two builds then do the same work
            fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it, however the process ends
        yield


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _free_device_memory() -> int:
    """Free bytes of the local accelerator that has the fewest; 0 on CPUs, which have no memory of their own."""

    def free(device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]: jaxlib has no stubs
        stats = device.memory_stats() if device.platform != "cpu" else None
        return stats["bytes_limit"] - stats["bytes_in_use"] if stats else 0

    return min(map(free, jax.local_devices()))


def _free_disk(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
