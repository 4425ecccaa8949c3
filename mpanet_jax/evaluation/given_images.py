"""Turns images as callers give them (paths, PIL images and arrays, in one list) into rows of results.

An image that cannot be read costs its own row only: it is named and masked out, and the others go on.
"""

import dataclasses
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from mpanet_jax.data.decode import (
    BadImageError,
    FilePixels,
    pixels_of_file,
    pixels_of_image,
    sent_of_file,
    sent_of_image,
)
from mpanet_jax.data.pipeline import eval_batches
from mpanet_jax.data.sent_images import SentImage, sends_decoded
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.extract import Embed, run_batches, track_batches, with_images
from mpanet_jax.modality import UNKNOWN
from mpanet_jax.settings import DataSettings

# A path, a PIL image, or an array uint8[h, w, 3] or uint8[h, w]; of any size.
GivenImage = str | os.PathLike | Image.Image | np.ndarray
EXPECTED = "expected a list of paths, PIL images and uint8 arrays (H, W, 3) or (H, W)"


class SkippedImage(NamedTuple):
    """An image that could not be read.

    Attributes:
      position: its place in the caller's list, from 0.
      name: its path, or 'images[3]' for an image without one.
      reason: why it could not be read.
    """

    position: int
    name: str
    reason: str


class UnreadableImage(UserError):
    """An image could not be read, and the caller did not ask to skip such images."""

    def __init__(self, image: SkippedImage):
        super().__init__(f"{image.name}: {image.reason}; replace it, or leave such images out with errors='skip'")
        self.image = image


def listed_images(images: Iterable[GivenImage]) -> list[GivenImage]:
    """Check what a caller gave as images, and return them as a list.

    Raises:
      ArgumentError: `images` is a single image, or holds something that is not an image.
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
    """Run `function` over the images that can be read, batch by batch.

    Args:
      function: takes resized bytes and their modality.
      images: N images, as `listed_images` gives them.
      modality: int32[N], the modality of each image.
      data: the size to resize to, and the filter of the resize.
      batch_size: images sent to the devices at once, rounded up to a multiple of the number of devices. Fewer images
        than that are padded to a power of two, so that calls with different numbers of images share compiled programs.
      errors: what to do with images that cannot be read: 'raise' or 'skip'.

    Returns:
      Blocks of rows, to be concatenated, for the images that could be read, in their order; and the skipped images.

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
    locks = defaultdict(threading.Lock)  # PIL decodes an image in place, and one may be in the list twice

    def pixels(place: int) -> np.ndarray | SentImage:
        of_file, of_image = (sent_of_file, sent_of_image) if sent else (pixels_of_file, pixels_of_image)
        image = images[place]
        if isinstance(image, str | os.PathLike):
            return of_file(image, data)
        if 0 in (image.size if isinstance(image, Image.Image) else image.shape):
            raise BadImageError("has no pixels")
        if isinstance(image, Image.Image):
            with locks[id(image)]:
                return of_image(image, data)
        return of_image(Image.fromarray(image), data)

    def on_fault(place: int, error: UserError) -> None:
        fault = SkippedImage(place, _name(images[place], place), str(error))
        if errors == "raise":
            raise UnreadableImage(fault) from error
        skipped.append(fault)

    unknown = np.full(len(images), UNKNOWN)
    rows = {"pids": unknown, "camids": unknown, "modality": modality, "index": np.arange(len(images))}
    num_devices = jax.local_device_count()
    size = -(-min(batch_size, 1 << (len(images) - 1).bit_length()) // num_devices) * num_devices
    # A model is used on other machines than that of its training, whose settings 'device' was one of.
    sent = sends_decoded(dataclasses.replace(data, resize_on="auto") if data.resize_on == "device" else data, size)
    files = [image for image in images if isinstance(image, str | os.PathLike)]
    if len(files) == len(images):
        batches = eval_batches(rows, FilePixels(files, data, sent), data, size, on_fault, sent=sent)
    else:  # images in memory are read where they are
        batches = eval_batches(rows, pixels, data, size, on_fault, num_workers=0, sent=sent)
    batches = track_batches(with_images(batches, data), len(images))
    return [rows for _, rows in run_batches(function, batches)], skipped


def _name(image: GivenImage, place: int) -> str:
    file = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    return os.fspath(file) if isinstance(file, str | os.PathLike) and file else f"images[{place}]"
