"""From an image file's bytes to the network's uint8 pixels: exactly those of Pillow's decoder and Pillow's resize.

Training, caches, evaluation and extraction all call `resized_pixels`, or `sent_pixels` if a device resizes, and for
images in memory `pixels_of_image`, so they see the same pixels. EXIF orientation is not applied. simplejpeg decodes
JPEG files to Pillow's pixels (both use libjpeg-turbo) in about half of Pillow's time.
"""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mpanet_jax.data.sent_images import device_resizes
from mpanet_jax.datasets.raw import eight_bits
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import UserError, first_line
from mpanet_jax.settings import DataSettings

# The most threads that decode in one process. With more, waiting for Python's lock takes longer than decoding.
MAX_THREADS = 8

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


class BadImageError(UserError):
    """An image that cannot be decoded; the message is the reason, in one line, without the file's name."""


def decode_rgb(encoded: bytes) -> Image.Image:
    """Decodes a JPEG, PNG or any other file that Pillow reads, and converts the image to RGB as Pillow does.

    There is one exception: of grey pixels of 16 bits the upper 8 are taken (`eight_bits`).

    Raises:
      BadImageError: the bytes are no image, are cut off, or have pixels of 32 bits.
    """
    pixels = _decode_jpeg(encoded)
    return _decode_by_pillow(encoded) if pixels is None else Image.fromarray(pixels)


def _decode_jpeg(encoded: bytes) -> np.ndarray | None:
    """Pillow's pixels of a JPEG file, uint8[h, w, 3]; None if it is none, or one that Pillow has to decode."""
    if encoded[:2] == b"\xff\xd8":
        try:
            # simplejpeg's own conversion of CMYK is not Pillow's.
            if simplejpeg.decode_jpeg_header(encoded)[2] in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(encoded, "RGB")
        except ValueError:
            pass  # damaged: Pillow may decode it nevertheless, or says what is wrong
    return None


def _decode_by_pillow(encoded: bytes) -> Image.Image:
    try:
        return to_rgb(Image.open(io.BytesIO(encoded)))
    except UnidentifiedImageError as error:  # its text names a Python object
        raise BadImageError("not an image") from error
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts one of Pillow's images to RGB as `decode_rgb` does; decodes it if Pillow has not done so yet.

    Raises:
      BadImageError: the image is cut off, or has pixels of 32 bits.
    """
    try:
        return eight_bits(image).convert("RGB")
    except Exception as error:  # as above
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


def resized(image: Image.Image, data: DataSettings) -> np.ndarray:
    """Resizes an RGB image by Pillow's filter `data.resize`, to uint8[data.height, data.width, 3]."""
    return np.asarray(image.resize((data.width, data.height), _FILTERS[data.resize]))


def pixels_of_image(image: Image.Image, data: DataSettings, *, sent: bool = False) -> np.ndarray:
    """One of Pillow's images, as RGB and resized: uint8[data.height, data.width, 3]; or with `sent` as `sent_pixels`.

    Raises:
      BadImageError: as `to_rgb`.
    """
    return _sent(to_rgb(image), data) if sent else resized(to_rgb(image), data)


def _sent(image: Image.Image, data: DataSettings) -> np.ndarray:
    """An RGB image for a device that resizes; resized if the device would not do it."""
    return np.asarray(image) if device_resizes(image.height, image.width, data) else resized(image, data)


def resized_pixels(encoded: bytes, data: DataSettings) -> np.ndarray:
    """Decodes an image file's bytes and resizes the image, to uint8[data.height, data.width, 3].

    Raises:
      BadImageError: as `decode_rgb`.
    """
    return resized(decode_rgb(encoded), data)


def sent_pixels(encoded: bytes, data: DataSettings) -> np.ndarray:
    """Decodes an image file's bytes for a device that resizes: uint8[h, w, 3]; resized if the device would not do it.

    Raises:
      BadImageError: as `decode_rgb`.
    """
    pixels = _decode_jpeg(encoded)
    if pixels is not None and device_resizes(pixels.shape[0], pixels.shape[1], data):
        return pixels
    return _sent(_decode_by_pillow(encoded) if pixels is None else Image.fromarray(pixels), data)


def read_image_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file.

    Raises:
      BadImageError: there is no such file, it cannot be read, or it is empty.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a named pipe could wait for ever
            raise BadImageError("not a file")
        encoded = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise BadImageError(getattr(error, "strerror", None) or str(error)) from error
    if not encoded:
        raise BadImageError("empty file")
    return encoded


def encoded_image(split: Split, i: int) -> bytes:
    """The bytes of the file of image i of a prepared split.

    Raises:
      UserError: the record is damaged; the message names the image's path.
    """
    try:
        return split.encoded[i]
    except Exception as error:  # array_record and protobuf raise many types
        raise UserError(
            f"image {split.paths[i]} can't be read, its record in the prepared data is damaged "
            f"({first_line(error)[:200]}); delete the prepared folder and prepare the data again"
        ) from error


def pixels_of(split: Split, i: int, data: DataSettings, *, sent: bool = False) -> np.ndarray:
    """Image i of a prepared split, decoded and resized: uint8[data.height, data.width, 3]; with `sent`, `sent_pixels`.

    Raises:
      UserError: it cannot be decoded; the message names its path.
    """
    try:
        return (sent_pixels if sent else resized_pixels)(encoded_image(split, i), data)
    except BadImageError as error:
        raise UserError(
            f"image {split.paths[i]} can't be decoded ({error}); replace the file, "
            "check the rest with scripts/prepare_data.py --check, and prepare the data again"
        ) from error


@dataclass(frozen=True)
class SplitPixels:
    """Reads images of a prepared split: row → `pixels_of` image indices[row]."""

    split: Split
    indices: np.ndarray
    data: DataSettings
    sent: bool = False

    def __call__(self, row: int) -> np.ndarray:
        return pixels_of(self.split, int(self.indices[row]), self.data, sent=self.sent)


def pixels_of_file(path: str | os.PathLike, data: DataSettings, *, sent: bool = False) -> np.ndarray:
    """An image file, decoded and resized: uint8[data.height, data.width, 3]; with `sent`, `sent_pixels`.

    Raises:
      BadImageError: it cannot be read or decoded.
    """
    return (sent_pixels if sent else resized_pixels)(read_image_file(path), data)


@dataclass(frozen=True)
class FilePixels:
    """Reads image files: row → `pixels_of_file` files[row]."""

    files: Sequence[str | os.PathLike]
    data: DataSettings
    sent: bool = False

    def __call__(self, row: int) -> np.ndarray:
        return pixels_of_file(self.files[row], self.data, sent=self.sent)
