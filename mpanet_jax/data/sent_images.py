"""Images that are sent to an accelerator as they were decoded, each of its own size; it resizes them.

Decoding is a quarter of the work that a CPU has with an image of 290×117; the resize is most of the rest.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from mpanet_jax.settings import DataSettings

# For fewer images, the host has resized them before the device has compiled the program.
FEWEST = 64
# Of an image that is so many times as high or as wide as the result, sending takes longer than the CPU's resize.
MOST_SCALE = 2
PIXELS_OF_AN_IMAGE = 8192  # the mean pixels of the images of a batch are rounded up to a multiple
NO_IMAGE = np.zeros((1, 1, 3), np.uint8)  # becomes zeros, as it stands for an image that is not there


def pack(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> dict[str, np.ndarray]:
    """What a batch has of b images of different sizes, in place of `images`.

    Returns:
      pixels: uint8[n, 3], those of all images, one after the other, each by rows, and more up to b times
        `padded_pixels`; sizes: int32[b, 2], (height, width) of each.
    """
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    needed = int(sizes.prod(-1, dtype=np.int64).sum())
    pixels = np.empty((len(images) * padded_pixels(needed, len(images)), 3), np.uint8)
    np.concatenate([image.reshape(-1, 3) for image in images], out=pixels[:needed])
    return {"pixels": pixels, "sizes": sizes}


def padded_pixels(num_pixels: int, num_images: int) -> int:
    """The mean pixels of an image, rounded up: the device compiles a program for each shape of what is sent."""
    return -(-num_pixels // (num_images * PIXELS_OF_AN_IMAGE)) * PIXELS_OF_AN_IMAGE


def sends_decoded(data: DataSettings, num_images: int) -> bool:
    """Whether images are sent as they were decoded, and not resized before.

    Args:
      data: `resize_on`: 'device', 'host', or 'auto': the device if it is a GPU, gets FEWEST images or more, and
        `num_workers` asks for no processes, which resize beside each other; and the size of resized images.
      num_images: images that are sent at once; if they might have more pixels than 32 bits number, the host resizes.
    """
    fits = num_images * math.prod(most_pixels(data)) < 2**31
    if data.resize_on == "auto":
        return fits and num_images >= FEWEST and data.num_workers <= 0 and jax.default_backend() == "gpu"
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
