"""Images that are sent to an accelerator as they were decoded, each of its own size; it resizes them.

Decoding is a quarter of the work that a CPU has with an image of 290×117; the resize is most of the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import UInt8

from mpanet_jax.errors import UserError
from mpanet_jax.settings import DataSettings

# For fewer images, the host has resized them before the device has compiled the program.
FEWEST = 64
# Of an image that is so many times as high or as wide as the result, sending takes longer than the CPU's resize.
MOST_SCALE = 2
PIXELS_OF_AN_IMAGE = 8192  # the mean pixels of the images of a batch are rounded up to a multiple


@dataclass(frozen=True)
class SentImage:
    """An image that is to be sent: its size is known, and its pixels are decoded where they are to lie.

    Attributes:
      height, width: in pixels.
      decode_into: puts its pixels, by rows, into an array uint8[height·width·3]; may raise `UserError`.
    """

    height: int
    width: int
    decode_into: Callable[[UInt8[np.ndarray, " n"]], object]

    @classmethod
    def of(cls, pixels: UInt8[np.ndarray, "h w 3"]) -> "SentImage":
        """An image that is decoded already."""
        height, width, _ = pixels.shape
        return cls(height, width, lambda place: np.copyto(place, pixels.reshape(-1)))


NO_IMAGE = SentImage.of(np.zeros((1, 1, 3), np.uint8))  # becomes zeros, as it stands for an image that is not there


class Packed:
    """What a batch has of b images of different sizes, in place of `images`.

    Attributes:
      arrays: pixels: uint8[n, 3], those of all images, one after the other, each by rows, and more up to b times
        `padded_pixels`; sizes: int32[b, 2], (height, width) of each.
    """

    def __init__(self, images: Sequence[SentImage]):
        self._images = images
        sizes = np.array([(image.height, image.width) for image in images], np.int32)
        self._ends = [0, *sizes.prod(-1, dtype=np.int64).cumsum().tolist()]
        pixels = np.empty((len(images) * padded_pixels(self._ends[-1], len(images)), 3), np.uint8)
        self.arrays = {"pixels": pixels, "sizes": sizes}

    def decode(self, place: int) -> None:
        """Decodes an image to its place.

        Raises:
          UserError: it cannot be decoded; its pixels are then zeros.
        """
        pixels = self.arrays["pixels"][self._ends[place] : self._ends[place + 1]].reshape(-1)
        try:
            self._images[place].decode_into(pixels)
        except UserError:
            pixels[:] = 0
            raise


def pack(images: Sequence[SentImage]) -> dict[str, np.ndarray]:
    """The arrays of images that are `Packed`.

    Raises:
      UserError: one cannot be decoded.
    """
    packed = Packed(images)
    for place in range(len(images)):
        packed.decode(place)
    return packed.arrays


def padded_pixels(num_pixels: int, num_images: int) -> int:
    """The mean pixels of an image, rounded up: the device compiles a program for each shape of what is sent."""
    return -(-num_pixels // (num_images * PIXELS_OF_AN_IMAGE)) * PIXELS_OF_AN_IMAGE


def sends_decoded(data: DataSettings, num_images: int) -> bool:
    """Whether images are sent as they were decoded, and not resized before.

    Args:
      data: `resize_on`: 'device', 'host', or 'auto': the device if it is a GPU and gets FEWEST images or more; and the
        size of resized images.
      num_images: images that are sent at once; if they might have more pixels than 32 bits number, the host resizes.
    """
    fits = num_images * math.prod(most_pixels(data)) < 2**31
    if data.resize_on == "auto":
        return fits and num_images >= FEWEST and jax.default_backend() == "gpu"
    return fits and data.resize_on == "device"


def device_resizes(height: int, width: int, data: DataSettings) -> bool:
    """Whether the device resizes an image of this size, to Pillow's pixels; if not, the CPU does so before.

    Pillow resizes the rows first, as the device does. But since version 13 it begins with the columns if the height
    shrinks by more than twice as many pixels as the width; then the rounding between the two differs.
    """
    highest, widest = most_pixels(data)
    columns_first = 0 < height - data.height > 2 * (width - data.width)
    return height <= highest and width <= widest and not columns_first


def most_pixels(data: DataSettings) -> tuple[int, int]:
    """(height, width) of the largest image that is sent as it was decoded."""
    return MOST_SCALE * data.height, MOST_SCALE * data.width
