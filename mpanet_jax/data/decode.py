"""From an image file's bytes to the network's uint8 pixels: exactly those of Pillow's decoder and Pillow's resize.

Training, caches, evaluation and extraction all call `resized_pixels`, or `sent_image` if a device resizes, and for
images in memory `pixels_of_image`, so they see the same pixels. EXIF orientation is not applied. simplejpeg decodes
JPEG files to Pillow's pixels (both use libjpeg-turbo) in about half of Pillow's time.
"""

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mpanet_jax.data.sent_images import SentImage, device_resizes
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
    if _jpeg_size(encoded):
        with contextlib.suppress(ValueError):  # damaged: Pillow may decode it nevertheless, or says what is wrong
            return Image.fromarray(simplejpeg.decode_jpeg(encoded, "RGB"))
    return _decode_by_pillow(encoded)


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file; None if it is none, or one that Pillow has to decode."""
    if encoded[:2] == b"\xff\xd8":
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            # simplejpeg's own conversion of CMYK is not Pillow's.
            return (int(height), int(width)) if colours in ("YCbCr", "Gray", "RGB") else None
    return None


def _decode_jpeg_into(encoded: bytes, size: tuple[int, int], place: np.ndarray) -> None:
    """Puts Pillow's pixels of a JPEG file whose `_jpeg_size` is `size` into uint8[h·w·3].

    Raises:
      BadImageError: as `decode_rgb`.
    """
    try:
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=place)
    except ValueError:
        pixels = np.asarray(_decode_by_pillow(encoded))
        if pixels.shape[:2] != size:
            raise BadImageError("damaged: its decoders find different sizes") from None
        place[:] = pixels.reshape(-1)


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


def pixels_of_image(image: Image.Image, data: DataSettings) -> np.ndarray:
    """One of Pillow's images, as RGB and resized: uint8[data.height, data.width, 3].

    Raises:
      BadImageError: as `to_rgb`.
    """
    return resized(to_rgb(image), data)


def sent_of_image(image: Image.Image, data: DataSettings) -> SentImage:
    """One of Pillow's images, as RGB, for a device that resizes; resized if the device would not do it.

    Raises:
      BadImageError: as `to_rgb`.
    """
    image = to_rgb(image)
    return SentImage.of(np.asarray(image) if device_resizes(image.height, image.width, data) else resized(image, data))


def resized_pixels(encoded: bytes, data: DataSettings) -> np.ndarray:
    """Decodes an image file's bytes and resizes the image, to uint8[data.height, data.width, 3].

    Raises:
      BadImageError: as `decode_rgb`.
    """
    return resized(decode_rgb(encoded), data)


def sent_image(encoded: bytes, data: DataSettings) -> SentImage:
    """The image of a file's bytes, for a device that resizes; resized if the device would not do it.

    Raises:
      BadImageError: as `decode_rgb`; of many JPEG files only once they are decoded.
    """
    size = _jpeg_size(encoded)
    if size and device_resizes(*size, data):
        return SentImage(*size, partial(_decode_jpeg_into, encoded, size))
    return sent_of_image(decode_rgb(encoded), data)


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


def pixels_of(split: Split, i: int, data: DataSettings) -> np.ndarray:
    """Image i of a prepared split, decoded and resized: uint8[data.height, data.width, 3].

    Raises:
      UserError: it cannot be decoded; the message names its path.
    """
    with _naming(split, i):
        return resized_pixels(encoded_image(split, i), data)


def sent_of(split: Split, i: int, data: DataSettings) -> SentImage:
    """Image i of a prepared split, as `sent_image`.

    Raises:
      UserError: as `pixels_of`, at the latest once it is decoded.
    """
    with _naming(split, i):
        image = sent_image(encoded_image(split, i), data)

    def decode_into(place: np.ndarray) -> None:
        with _naming(split, i):
            image.decode_into(place)

    return replace(image, decode_into=decode_into)


@contextlib.contextmanager
def _naming(split: Split, i: int) -> Iterator[None]:
    """Names image i in the error of an image that cannot be decoded."""
    try:
        yield
    except BadImageError as error:
        raise UserError(
            f"image {split.paths[i]} can't be decoded ({error}); replace the file, "
            "check the rest with scripts/prepare_data.py --check, and prepare the data again"
        ) from error


@dataclass(frozen=True)
class SplitPixels:
    """Reads images of a prepared split: row → `pixels_of` image indices[row], or with `sent` its `sent_of`."""

    split: Split
    indices: np.ndarray
    data: DataSettings
    sent: bool = False

    def __call__(self, row: int) -> np.ndarray | SentImage:
        return (sent_of if self.sent else pixels_of)(self.split, int(self.indices[row]), self.data)


def pixels_of_file(path: str | os.PathLike, data: DataSettings) -> np.ndarray:
    """An image file, decoded and resized: uint8[data.height, data.width, 3].

    Raises:
      BadImageError: it cannot be read or decoded.
    """
    return resized_pixels(read_image_file(path), data)


def sent_of_file(path: str | os.PathLike, data: DataSettings) -> SentImage:
    """An image file, as `sent_image`.

    Raises:
      BadImageError: it cannot be read or decoded; of the latter, some only once it is decoded.
    """
    return sent_image(read_image_file(path), data)


@dataclass(frozen=True)
class FilePixels:
    """Reads image files: row → `pixels_of_file` files[row], or with `sent` its `sent_of_file`."""

    files: Sequence[str | os.PathLike]
    data: DataSettings
    sent: bool = False

    def __call__(self, row: int) -> np.ndarray | SentImage:
        return (sent_of_file if self.sent else pixels_of_file)(self.files[row], self.data)
