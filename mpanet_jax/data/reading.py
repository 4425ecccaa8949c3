"""Reads many images in their order, ahead of their use: in threads or, where those are slower, in processes."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import grain
import numpy as np

from mpanet_jax.background import Ahead
from mpanet_jax.cpus import available_cpus
from mpanet_jax.data.decode import MAX_THREADS
from mpanet_jax.data.grain_batches import ResumableBatches, choose_num_workers
from mpanet_jax.data.sent_images import MOST_SCALE, NO_IMAGE, PIXELS_OF_AN_IMAGE, Packed, SentImage
from mpanet_jax.errors import UserError
from mpanet_jax.settings import DataSettings

# Of fewer images, threads have read most before the processes are up: on 16 cores twelve take 3.8 s to start. Threads
# read 2,000 images/s, and 5,400 to 11,000 of those that are sent decoded.
MANY_IMAGES, MANY_SENT = 10_000, 100_000
PARTS_IN_FLIGHT = 3
MOST_AHEAD = 2**31  # bytes

# row → the image, uint8[data.height, data.width, 3], or a `SentImage` if it is sent decoded; may raise `UserError`.
# Processes need one that pickles.
Pixels = Callable[[int], np.ndarray | SentImage]


@dataclass(frozen=True)
class Part:
    """Images that follow each other.

    Attributes:
      rows: which ones.
      arrays: `images` uint8[size, height, width, 3], or of images that are sent decoded what `pack` gives. Behind the
        last row, and in place of an image that cannot be read, images are zeros.
      mask: bool[size], True for images.
      faults: (row, why it cannot be read), in any order.
    """

    rows: range
    arrays: dict[str, np.ndarray]
    mask: np.ndarray
    faults: list[tuple[int, str]]

    def require_sound(self) -> None:
        """Raises a `UserError` with the first fault, if there is one."""
        if self.faults:
            raise UserError(min(self.faults)[1])


class _Reading:
    """A part that is being read: all its rows by `read`, after that `make_room`, after that all by `decode`.

    Args:
      rows: which images.
      images: uint8[size, height, width, 3], or a list of `SentImage`, to be filled.
      stopped: tells that nobody waits for the part any more.
    """

    def __init__(self, rows: range, images: Any, stopped: Callable[[], bool]):
        self.rows, self._stopped = rows, stopped
        self._images = images
        self._packed: Packed | None = None
        self._mask = np.zeros(len(images), bool)
        self._faults: list[tuple[int, str]] = []

    def read(self, rows: range, pixels: Pixels) -> None:
        """Puts some images of `rows` in their places, or their faults on the list."""
        for row in rows:
            if self._stopped():
                return
            place = row - self.rows.start
            try:
                self._images[place] = pixels(row)
                self._mask[place] = True
            except UserError as error:
                self._faults.append((row, str(error)))

    def make_room(self) -> None:
        """Makes the array of images that are sent, now that all their sizes are known."""
        if isinstance(self._images, list):
            self._packed = Packed(self._images)
            for place in range(len(self.rows), len(self._images)):  # behind the last row
                self._packed.decode(place)

    def decode(self, rows: range) -> None:
        """Decodes those of some images that are sent, or puts their faults on the list."""
        for row in rows:
            if self._packed is None or self._stopped():
                return
            place = row - self.rows.start
            try:
                self._packed.decode(place)
            except UserError as error:
                self._mask[place] = False
                self._faults.append((row, str(error)))

    def part(self) -> Part:
        arrays = self._packed.arrays if self._packed else {"images": self._images}
        return Part(self.rows, arrays, self._mask, self._faults)


@dataclass(frozen=True)
class _Parts:
    """All parts, not read yet. As grain's source, element i is part i, read by one process."""

    pixels: Pixels
    num_images: int
    size: int
    height: int
    width: int
    sent: bool

    def __len__(self) -> int:
        return -(-self.num_images // self.size)

    def rows(self, index: int) -> range:
        return range(index * self.size, min((index + 1) * self.size, self.num_images))

    def empty(self, index: int, stopped: Callable[[], bool]) -> _Reading:
        shape = (self.size, self.height, self.width, 3)
        images = [NO_IMAGE] * self.size if self.sent else np.zeros(shape, np.uint8)
        return _Reading(self.rows(index), images, stopped)

    def read(self, index: int, stopped: Callable[[], bool] = lambda: False) -> Part:
        reading = self.empty(index, stopped)
        reading.read(reading.rows, self.pixels)
        reading.make_room()
        reading.decode(reading.rows)
        return reading.part()

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = self.read(int(index))
        return {**part.arrays, "mask": part.mask, "faults": part.faults}


def processes_for(num_images: int, num_workers: int, part_bytes: int, *, sent: bool = False) -> int:
    """How many processes should read the images; 0: threads.

    Args:
      num_images: how many images are read.
      num_workers: settings.data.num_workers; the machine chooses at most as many, or with -1 freely.
      part_bytes: of a part's images.
      sent: whether the images are sent decoded.
    """
    if num_images < (MANY_SENT if sent else MANY_IMAGES) or not num_workers:
        return 0
    chosen = choose_num_workers(-1, part_bytes, quiet=True)
    return chosen if num_workers < 0 else min(chosen, num_workers)


def read_parts(
    pixels: Pixels,
    num_images: int,
    data: DataSettings,
    *,
    size: int,
    num_workers: int | None = None,
    sent: bool = False,
) -> Generator[Part]:
    """Read images in parts of `size`; the last one may have fewer rows.

    Args:
      pixels: how one is read.
      num_images: its argument goes from 0 to this, exclusive.
      data: the images' size, and `num_workers` for `processes_for`.
      size: images in a part.
      num_workers: processes that read, or 0 for threads; None: `processes_for`.
      sent: whether the images are sent decoded.

    Yields:
      The parts in order. Read ahead are four in each process, and one; in threads, one in each and another one, or
      PARTS_IN_FLIGHT that the threads share, if there are not two for each thread, or might be more than MOST_AHEAD.
    """
    parts = _Parts(pixels, num_images, size, data.height, data.width, sent)
    part_bytes = size * image_bytes(data, sent=sent)
    if num_workers is None:
        num_workers = processes_for(num_images, data.num_workers, part_bytes, sent=sent)
    return _by_processes(parts, num_workers) if num_workers else _by_threads(parts, part_bytes)


def _by_threads(parts: _Parts, part_bytes: int) -> Generator[Part]:
    num_threads, stop = decoding_threads(), threading.Event()
    pool = ThreadPoolExecutor(num_threads)
    size_of_share = -(-parts.size // num_threads)

    def read_in_shares(index: int) -> Part:
        reading = parts.empty(index, stop.is_set)
        shares = [reading.rows[first : first + size_of_share] for first in range(0, len(reading.rows), size_of_share)]
        deque(pool.map(lambda share: reading.read(share, parts.pixels), shares), 0)
        reading.make_room()
        deque(pool.map(reading.decode, shares), 0)
        return reading.part()

    # Each thread a part of its own, which keeps them from waiting for each other; or all threads the same one, and
    # another thread waits for them.
    many = len(parts) >= 2 * num_threads and (num_threads + 1) * part_bytes <= MOST_AHEAD
    readers = pool if many else ThreadPoolExecutor(PARTS_IN_FLIGHT)
    ahead = num_threads + 1 if many else PARTS_IN_FLIGHT
    indices = iter(range(len(parts)))

    def start(count: int) -> list[Future[Part]]:
        read = partial(parts.read, stopped=stop.is_set) if many else read_in_shares
        return [readers.submit(read, index) for index in islice(indices, count)]

    try:
        first = [read_in_shares(index) for index in islice(indices, int(many))]  # it comes sooner
        in_flight = deque(start(ahead))
        while first:
            yield first.pop()
        while in_flight:
            part = in_flight.popleft().result()
            in_flight.extend(start(1))
            yield part
    finally:
        stop.set()
        readers.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)


def _by_processes(parts: _Parts, num_workers: int) -> Generator[Part]:
    batches = ResumableBatches(grain.MapDataset.source(parts), "", 0, num_workers)
    # A thread copies a part out of shared memory while the last one is used.
    with contextlib.closing(batches), Ahead(batches) as read:
        for index, arrays in enumerate(read):
            mask, faults = arrays.pop("mask"), arrays.pop("faults")
            yield Part(parts.rows(index), arrays, mask, faults)


def image_bytes(data: DataSettings, *, sent: bool) -> int:
    """The most bytes of an image that is read, resized or to be sent decoded."""
    pixels = data.height * data.width
    return 3 * (max(MOST_SCALE**2 * pixels, PIXELS_OF_AN_IMAGE) if sent else pixels)


def decoding_threads() -> int:
    """How many threads decode in this process: one for each CPU, at most `MAX_THREADS`."""
    return min(available_cpus(), MAX_THREADS)
