"""The resized images of a split kept ready: a memory-mapped file, and the choice between the three feeding modes."""

import contextlib
import fcntl
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import logging

from mpanet_jax.cpus import available_cpus
from mpanet_jax.data.cache_check import write_sums
from mpanet_jax.data.decode import MAX_THREADS, pixels_of
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import SettingsError
from mpanet_jax.memory import free_ram
from mpanet_jax.processes import gather, is_first_process
from mpanet_jax.progress import track
from mpanet_jax.settings import DataSettings

CACHE_MODES = ("device", "host", "none")

# Part of the file's name: raise it when `decode.py` changes the pixels. Version 1 was resized by OpenCV.
PIXELS_VERSION = 2
_FILLED = 4096  # images handed to the threads at once


def open_images(split: Split, data: DataSettings, cache_dir: str | os.PathLike | None) -> tuple[str, np.ndarray | None]:
    """The feeding mode that `data.cache` comes to, the same in all processes, and the resized images that it needs.

    The images, uint8[N, height, width, 3], are memory-mapped from `cache_dir`, and built there if need be. The file is
    built under a temporary name and renamed when it is whole, so a killed build leaves nothing that could be taken for
    a cache; the next one removes its remains. Checksums lie beside it (see `cache_check`). A lock makes other processes
    wait for one build. With `cache_dir` None the images are in RAM only. So they are with 'device' where `cache_dir`
    has no room: there the file only saves the next run the work. With 'none' there are no images.

    Raises:
      UserError: an image can't be decoded, or nothing can be written to `cache_dir`; the latter names
        dataset.data_dir of the settings, in which it lies.
    """
    shape = (len(split), data.height, data.width, 3)
    path = None if cache_dir is None else cache_path(split, data, cache_dir)
    images = _open(path, shape)
    chosen = choose_cache(data.cache, math.prod(shape), cache_dir, built=images is not None)
    # All processes run the same program, so the one with least room decides.
    cache = CACHE_MODES[max(gather(CACHE_MODES.index(chosen), "the choice of data.cache"))]
    if cache != chosen and is_first_process():
        print(f"images: cache={cache}, for another process has less room", file=sys.stderr)
    if cache == "none":
        return cache, None
    if images is None and path is not None and (cache == "host" or _has_room(path.parent, math.prod(shape))):
        images = _build(path, shape, split, data)
    elif images is None:
        images = np.empty(shape, np.uint8)
        _fill(images, split, data)
    return cache, images


def choose_cache(cache: str, num_bytes: int, cache_dir: str | os.PathLike | None, *, built: bool = False) -> str:
    """'device', 'host' or 'none' for `cache` = 'auto'; any other valid value as it is.

    'device' where `num_bytes` fit in half the accelerator's free memory, else 'host' where they fit in half the free
    RAM and, unless they are `built` already, in half the free space of `cache_dir` (if there is one), else 'none'.
    Without an accelerator 'device' would be a second copy in the same RAM, so the choice starts at 'host'. Prints the
    choice and the sizes to stderr (the first process does). Raises `UserError` for an unknown value.
    """
    if cache in CACHE_MODES:
        return cache
    if cache != "auto":
        raise SettingsError(f"data.cache = {cache!r} is unknown; expected one of {('auto', *CACHE_MODES)}")
    sizes = {"accelerator": _free_device_memory(), "RAM": free_ram()}
    if cache_dir is not None and not built:
        # A folder that is only read, as a data set shared by many may be, has no room.
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
    """Where the resized images of `split` are kept: the name changes with the prepared data, size and filter."""
    name = split.name.replace("/", "-")
    pixels = f"{data.height}x{data.width}-{data.resize}-v{PIXELS_VERSION}"
    return Path(cache_dir) / f"{name}-{split.fingerprint}-{pixels}.npy"


def _open(path: Path | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The memory-mapped images of an earlier run, or None where there are none."""
    if path is None or not path.exists():
        return None
    try:
        images = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):  # cut off, as by a full disk: to be built again
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _build(path: Path, shape: tuple[int, ...], split: Split, data: DataSettings) -> np.ndarray:
    """Writes the cache, unless another process has done so meanwhile, and maps it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if (images := _open(path, shape)) is not None:
                return images
            temporary = path.with_suffix(".npy.part")
            with _removed_on_error(temporary):
                images = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is found here, not in a crash half way
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
    """Whether `num_bytes` can be written to `cache_dir`; says so on stderr where they can't."""
    room = os.access(_existing(cache_dir), os.W_OK) and _free_disk(cache_dir) >= num_bytes
    if not room:
        print(f"images: not kept for the next run, no room for {_size(num_bytes)} in {cache_dir}", file=sys.stderr)
    return room


def _fill(images: np.ndarray, split: Split, data: DataSettings) -> None:
    """Decode and resize every image into its place. Threads do: decoder and resize both release Python's lock."""

    def one(i: int) -> None:
        images[i] = pixels_of(split, i, data)

    started = time.perf_counter()
    pool = ThreadPoolExecutor(decoding_threads())
    try:
        # A pool holds on to all that it has been given: some images at a time.
        parts = (range(start, min(start + _FILLED, len(split))) for start in range(0, len(split), _FILLED))
        filled = itertools.chain.from_iterable(pool.map(one, part) for part in parts)
        for _ in track(filled, f"resizing {split.name}", len(split)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    rate = len(split) / (time.perf_counter() - started)
    size = f"{data.height}x{data.width}"
    logging.info("images: %d of %s resized to %s, %.0f a second", len(split), split.name, size, rate)


def decoding_threads() -> int:
    """How many threads decode in this process: one a CPU, up to where they only wait for each other."""
    return min(available_cpus(), MAX_THREADS)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # some network drives have no locks: then two builds do the work twice
            fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it however the process ends
        yield


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _free_device_memory() -> int:
    """Bytes free on the fullest local accelerator; 0 on the CPU, which has no memory of its own."""

    def free(device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]: jaxlib has no stubs
        stats = device.memory_stats() if device.platform != "cpu" else None
        return stats["bytes_limit"] - stats["bytes_in_use"] if stats else 0

    return min(map(free, jax.local_devices()))


def _free_disk(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return path if path.exists() else _existing(path.parent)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
