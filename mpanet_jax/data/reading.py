"""Reads many images in their order, ahead of their use: in threads or, where those are slower, in processes."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import grain
import numpy as np

from mpanet_jax.cpus import available_cpus
from mpanet_jax.data.decode import MAX_THREADS
from mpanet_jax.data.grain_batches import ResumableBatches, choose_num_workers
from mpanet_jax.data.sent_images import MOST_SCALE, NO_IMAGE, PIXELS_OF_AN_IMAGE, pack
from mpanet_jax.errors import UserError, in_script
from mpanet_jax.settings import DataSettings

# Of fewer images, threads have read most before the processes are up: on 16 cores twelve take 3.8 s to start, and
# threads read 2,000 images/s.
MANY_IMAGES = 10_000
PARTS_IN_FLIGHT = 3
_IMAGES_OF_A_TASK = 8  # of a thread

# row → the image, uint8[data.height, data.width, 3], or of any size if it is sent decoded; may raise `UserError`.
# Processes need one that pickles.
Pixels = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Part:
    """Images that follow each other.

    Attributes:
      rows: which ones.
      arrays: `images` uint8[size, height, width, 3], or of images that are sent decoded what `pack` gives. Behind the
        last row, and in place of an image that cannot be read, images are zeros (before the resize, one pixel).
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


@dataclass(frozen=True)
class _Reading:
    """A part that is being read."""

    rows: range
    images: Any  # uint8[size, height, width, 3], or a list of images that are sent decoded
    mask: np.ndarray
    faults: list[tuple[int, str]] = field(default_factory=list)

    def read(self, rows: range, pixels: Pixels) -> None:
        """Puts some images of `rows` in their places, or their faults on the list."""
        for row in rows:
            place = row - self.rows.start
            try:
                self.images[place] = pixels(row)
                self.mask[place] = True
            except UserError as error:
                self.faults.append((row, str(error)))

    def whole(self) -> Part:
        arrays = pack(self.images) if isinstance(self.images, list) else {"images": self.images}
        return Part(self.rows, arrays, self.mask, self.faults)


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

    def empty(self, index: int) -> _Reading:
        shape = (self.size, self.height, self.width, 3)
        images = [NO_IMAGE] * self.size if self.sent else np.zeros(shape, np.uint8)
        return _Reading(self.rows(index), images, np.zeros(self.size, bool))

    def __getitem__(self, index: int) -> dict[str, Any]:
        reading = self.empty(int(index))
        reading.read(reading.rows, self.pixels)
        part = reading.whole()
        return {**part.arrays, "mask": part.mask, "faults": part.faults}


def processes_for(num_images: int, num_workers: int, part_bytes: int, *, sent: bool = False) -> int:
    """How many processes should read the images; 0: threads.

    A new process runs the caller's main module again, which has to have its `if __name__ == "__main__":`. The package's
    scripts have it; what others have is not known, so for them threads read.

    Args:
      num_images: how many images are read.
      num_workers: settings.data.num_workers; the machine chooses at most as many, or with -1 freely.
      part_bytes: of a part's images.
      sent: whether the images are sent decoded.
    """
    if num_images < MANY_IMAGES or not num_workers or not in_script():
        return 0
    chosen = choose_num_workers(-1, part_bytes, sent=sent and num_workers < 0, quiet=True)
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
      The parts in order, up to PARTS_IN_FLIGHT read ahead in threads, four in each process.
    """
    parts = _Parts(pixels, num_images, size, data.height, data.width, sent)
    if num_workers is None:
        num_workers = processes_for(num_images, data.num_workers, size * image_bytes(data, sent=sent), sent=sent)
    return _by_processes(parts, num_workers) if num_workers else _by_threads(parts)


def _by_threads(parts: _Parts) -> Generator[Part]:
    pool = ThreadPoolExecutor(decoding_threads())

    def start(index: int) -> Future[Part]:
        reading = parts.empty(index)
        shares = (reading.rows[first : first + _IMAGES_OF_A_TASK] for first in range(0, parts.size, _IMAGES_OF_A_TASK))
        tasks = [pool.submit(reading.read, share, parts.pixels) for share in shares]
        # A thread takes this up when all tasks of the part are done or under way.
        return pool.submit(finish, reading, tasks)

    def finish(reading: _Reading, tasks: list[Future]) -> Part:
        for task in tasks:
            task.result()
        return reading.whole()

    indices = iter(range(len(parts)))
    in_flight = deque(map(start, islice(indices, PARTS_IN_FLIGHT)))
    try:
        while in_flight:
            part = in_flight.popleft().result()
            in_flight.extend(map(start, islice(indices, 1)))
            yield part
    finally:
        pool.shutdown(cancel_futures=True)


def _by_processes(parts: _Parts, num_workers: int) -> Generator[Part]:
    batches = ResumableBatches(grain.MapDataset.source(parts), "", 0, num_workers)
    try:
        for index, read in enumerate(batches):
            mask, faults = read.pop("mask"), read.pop("faults")
            yield Part(parts.rows(index), read, mask, faults)
    finally:
        batches.close()


def image_bytes(data: DataSettings, *, sent: bool) -> int:
    """The most bytes of an image that is read, resized or to be sent decoded."""
    pixels = data.height * data.width
    return 3 * (max(MOST_SCALE**2 * pixels, PIXELS_OF_AN_IMAGE) if sent else pixels)


def decoding_threads() -> int:
    """How many threads decode in this process: one for each CPU, at most `MAX_THREADS`."""
    return min(available_cpus(), MAX_THREADS)
