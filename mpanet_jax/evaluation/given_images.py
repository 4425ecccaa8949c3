"""Images as callers give them: files, Pillow's images and arrays, in one list, to rows of results.

An image that cannot be read costs its own row, not the run: it is named, masked out, and the rest goes on.
"""

import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from mpanet_jax.data.decode import BadImageError, read_image_file, resized, resized_pixels, to_rgb
from mpanet_jax.data.pipeline import eval_batches
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.extract import Embed, run_batches, track_batches
from mpanet_jax.modality import UNKNOWN
from mpanet_jax.settings import DataSettings

# A file, an image of Pillow's, or uint8[h, w, 3] or uint8[h, w]; of any size.
GivenImage = str | os.PathLike | Image.Image | np.ndarray
EXPECTED = "expected a list of paths, PIL images and uint8 arrays (H, W, 3) or (H, W)"


class SkippedImage(NamedTuple):
    """An image that could not be read: its place in the list, its path (or 'images[3]'), and why."""

    position: int
    name: str
    reason: str


class UnreadableImage(UserError):
    """An image that could not be read, where none may be skipped."""

    def __init__(self, image: SkippedImage):
        super().__init__(f"{image.name}: {image.reason}; replace it, or leave such images out with errors='skip'")
        self.image = image


def listed_images(images: Iterable[GivenImage]) -> list[GivenImage]:
    """The images as a list.

    Raises:
      ArgumentError: they are one image alone, or one of them is nothing that can be read as an image.
    """
    if isinstance(images, str | os.PathLike | Image.Image) or _is_one_image(images):
        raise ArgumentError("images", f"is a single {type(images).__name__}; {EXPECTED}: put it in a list, [image]")
    try:
        listed = list(images)
    except TypeError:
        raise ArgumentError("images", f"is a {type(images).__name__}; {EXPECTED}") from None
    return [_checked(image, place) for place, image in enumerate(listed)]


def _is_one_image(images: Any) -> bool:
    shape = getattr(images, "shape", None)
    return shape is not None and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))


def _checked(image: Any, place: int) -> GivenImage:
    if isinstance(image, str | os.PathLike | Image.Image):
        return image
    if not hasattr(image, "__array__"):
        raise ArgumentError(f"images[{place}]", f"is a {type(image).__name__}; {EXPECTED}")
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ArgumentError(
            f"images[{place}]", f"is {array.dtype}{list(array.shape)}; expected uint8[H, W, 3] or [H, W]"
        )
    return array


def rows_of_images(
    function: Embed,
    images: list[GivenImage],
    modality: np.ndarray,
    data: DataSettings,
    *,
    batch_size: int,
    errors: str = "raise",
) -> tuple[list[np.ndarray], list[SkippedImage]]:
    """What `function` makes of the images that can be read, batch by batch; and the others.

    Args:
      function: of resized bytes and their modality.
      images: of `listed_images`.
      modality: int32[N], of each.
      data: the images' size and the filter of the resize.
      batch_size: rows sent to the devices at once; rounded up to a multiple of their number. Fewer images are filled up
        to a power of two, so that calls with other numbers of images share compiled programs.
      errors: 'raise' or 'skip'.

    Returns:
      Blocks of rows that lie one behind the other; and the images that were skipped.

    Raises:
      ArgumentError: `errors` is neither.
      UnreadableImage: one cannot be read, with errors='raise'.
    """
    if errors not in ("raise", "skip"):
        raise ArgumentError("errors", f"= {errors!r}: expected 'raise' or 'skip'")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ArgumentError("batch_size", f"= {batch_size!r}: expected a positive whole number")
    if not images:
        return [], []
    skipped: list[SkippedImage] = []
    locks = defaultdict(threading.Lock)  # one of Pillow's images may be in the list twice, and is decoded in its place

    def pixels(place: int) -> np.ndarray:
        image = images[place]
        if not isinstance(image, str | os.PathLike) and 0 in (
            image.size if isinstance(image, Image.Image) else image.shape
        ):
            raise BadImageError("has no pixels")
        if isinstance(image, Image.Image):
            with locks[id(image)]:
                return resized(to_rgb(image), data)
        if isinstance(image, np.ndarray):
            return resized(to_rgb(Image.fromarray(image)), data)
        return resized_pixels(read_image_file(image), data)

    def on_fault(place: int, error: UserError) -> None:
        fault = SkippedImage(place, _name(images[place], place), str(error))
        if errors == "raise":
            raise UnreadableImage(fault) from error
        skipped.append(fault)

    unknown = np.full(len(images), UNKNOWN)
    rows = {"pids": unknown, "camids": unknown, "modality": modality, "index": np.arange(len(images))}
    num_devices = jax.local_device_count()
    size = -(-min(batch_size, 1 << (len(images) - 1).bit_length()) // num_devices) * num_devices
    batches = eval_batches(rows, pixels, data, size, on_fault)
    return [rows for _, rows in run_batches(function, track_batches(batches, len(images)))], skipped


def _name(image: GivenImage, place: int) -> str:
    file = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    return os.fspath(file) if isinstance(file, str | os.PathLike) and file else f"images[{place}]"
