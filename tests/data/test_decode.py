"""From files to pixels: Pillow's own decoder and resize are the measure, to the bit."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps

from mpanet_jax.data.decode import (
    BadImageError,
    decode_rgb,
    pixels_of,
    resized_pixels,
    sent_image,
    sent_of,
)
from mpanet_jax.data.sent_images import device_resizes
from mpanet_jax.errors import UserError
from mpanet_jax.settings import DataSettings
from tests.data.toy import jpeg, toy_split


def photograph(height, width, seed=0):
    """Soft shapes, an edge and sensor noise: what a camera gives."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 216, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    soft[height // 3 :, width // 2 :] *= 0.5
    return np.clip(soft + generator.normal(0, 3, (height, width, 1)), 0, 255).astype(np.uint8)


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pillow(encoded):
    return Image.open(io.BytesIO(encoded)).convert("RGB")


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(97, 53), (96, 48), (17, 1), (1, 9)])
def test_a_jpeg_decodes_to_pillows_bits(size, subsampling, progressive):
    encoded = jpeg(photograph(*size), quality=85, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode_rgb(encoded), pillow(encoded))


def test_a_jpeg_with_halved_rows_of_colour_decodes_to_pillows_bits():
    # As lossless rotation leaves it; Pillow reads it and does not write it.
    encoded = simplejpeg.encode_jpeg(photograph(97, 53), colorsubsampling="440")
    assert simplejpeg.decode_jpeg_header(encoded)[3] == "440"
    np.testing.assert_array_equal(decode_rgb(encoded), pillow(encoded))


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("RGBA", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "BMP", {}),
        ("L", "BMP", {}),
        ("P", "BMP", {}),
        ("P", "GIF", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("YCbCr", "TIFF", {}),
    ],
)
def test_every_kind_of_image_becomes_rgb_as_in_pillow(mode, file_format, options):
    encoded = encode(Image.fromarray(photograph(41, 30)).convert(mode), file_format, **options)
    np.testing.assert_array_equal(decode_rgb(encoded), pillow(encoded))


def png16(values):
    """A PNG file of uint16[h, w, 3], which Pillow reads but cannot write."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(lines),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )


def test_of_sixteen_bits_the_upper_eight_are_taken_in_colour_and_grey():
    values = np.random.default_rng(0).integers(0, 2**16, (9, 7, 3))
    encoded = png16(values)
    np.testing.assert_array_equal(decode_rgb(encoded), values >> 8)
    np.testing.assert_array_equal(pillow(encoded), values >> 8)
    grey = encode(Image.fromarray(values[..., 0].astype(np.uint16)), "PNG")
    np.testing.assert_array_equal(decode_rgb(grey), np.repeat(values[..., :1] >> 8, 3, 2))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a viewer turns it by 90 degrees
    image = Image.fromarray(photograph(40, 24))
    for file_format in ("JPEG", "PNG"):
        encoded = encode(image, file_format, exif=exif)
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).size == (40, 24)
        assert decode_rgb(encoded).size == (24, 40)
        np.testing.assert_array_equal(decode_rgb(encoded), pillow(encoded))


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "size",  # height, width: enlarged, reduced, one of them each, by whole numbers, by much, and left as it is
    [(131, 67), (413, 171), (401, 55), (99, 301), (192, 64), (768, 256), (1901, 643), (3, 2), (1, 1), (384, 128)],
)
def test_resized_pixels_are_pillows_to_the_bit(size, mode, file_format, resize):
    encoded = encode(Image.fromarray(photograph(*size)).convert(mode), file_format)
    data = DataSettings(384, 128, resize=resize)
    pixels = resized_pixels(encoded, data)
    assert pixels.shape == (384, 128, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow(encoded).resize((128, 384), FILTERS[resize]))
    # For a device that resizes, decoded alone where that would be the same.
    np.testing.assert_array_equal(
        decoded(sent_image(encoded, data)), np.asarray(pillow(encoded)) if device_resizes(*size, data) else pixels
    )


def decoded(image):
    """The pixels of an image that is sent."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    image.decode_into(pixels.reshape(-1))
    return pixels


def filter_by_definition(image, size, resize):
    """The antialiased filter in real numbers: its kernel widened by the reduction, normalised, along each axis."""
    support, kernel = {
        "bilinear": (1, lambda x: np.maximum(1 - abs(x), 0)),
        "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3) * (abs(x) < 3)),
    }[resize]
    values = image.astype(float)
    for axis, target in enumerate(size):
        scale = image.shape[axis] / target
        centres, places = (np.arange(target) + 0.5) * scale, np.arange(image.shape[axis]) + 0.5
        distances = (places - centres[:, None]) / max(scale, 1)
        weights = kernel(distances) * (abs(distances) <= support)
        values = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), values, (1, axis)), 0, axis)
    return np.clip(values, 0, 255)


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("size", [(37, 21), (150, 40), (31, 90)])
def test_the_filter_is_the_antialiased_one_of_its_name(size, resize):
    image = photograph(*size)
    encoded = encode(Image.fromarray(image), "PNG")
    pixels = resized_pixels(encoded, DataSettings(64, 32, resize=resize)).astype(float)
    expected = filter_by_definition(image, (64, 32), resize)
    # Each of the two passes rounds, and Lanczos's weights amplify the first rounding by up to 1.4.
    assert np.abs(pixels - expected).max() < 0.5 + 0.5 * 1.5
    other = filter_by_definition(image, (64, 32), next(name for name in FILTERS if name != resize))
    assert np.abs(pixels - other).max() > 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[: len(good) // 2],
        lambda good: good[:20],
        lambda good: b"",
        lambda good: b"this is a text file\n" * 20,
        lambda good: b"\xff\xd8" + b"\0" * 100,
    ],
    ids=["truncated", "header only", "empty", "text", "zeros"],
)
def test_a_damaged_file_is_named(damage):
    encoded = damage(jpeg(photograph(64, 32)))
    split = dataclasses.replace(toy_split([(1, 1)]), encoded=[encoded], paths=np.array(["cam1/0007/0003.jpg"]))
    with pytest.raises(UserError, match=r"^image cam1/0007/0003\.jpg can't be decoded .*replace the file") as error:
        pixels_of(split, 0, DataSettings(48, 16))
    with pytest.raises(UserError) as late:
        decoded(sent_of(split, 0, DataSettings(48, 16)))
    assert "\n" not in str(error.value) and str(late.value) == str(error.value)


def test_what_pillow_can_decode_of_a_damaged_jpeg_is_sent(monkeypatch):
    """simplejpeg refuses an end that is cut off; Pillow, if it is asked to, does not."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    encoded = jpeg(photograph(64, 32))[:-40]
    with pytest.raises(ValueError, match="end of"):
        simplejpeg.decode_jpeg(encoded, "RGB")
    data = DataSettings(48, 16)
    np.testing.assert_array_equal(decoded(sent_image(encoded, data)), np.asarray(pillow(encoded)))
    np.testing.assert_array_equal(decode_rgb(encoded), np.asarray(pillow(encoded)))


def test_a_truncated_png_is_refused():
    encoded = encode(Image.fromarray(photograph(64, 32)), "PNG")
    with pytest.raises(BadImageError, match="truncated"):
        decode_rgb(encoded[: len(encoded) // 2])


def test_a_jpeg_with_a_blemish_is_what_pillow_makes_of_it():
    encoded = jpeg(photograph(64, 32))
    blemished = encoded[:-2] + b"\0\0\0" + encoded[-2:]  # libjpeg warns of extraneous bytes
    np.testing.assert_array_equal(decode_rgb(blemished), pillow(blemished))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused(kind):
    encoded = encode(Image.fromarray(np.ones((8, 4), kind)), "TIFF")
    with pytest.raises(BadImageError, match=r"^pixels of 32 bits have no agreed range"):
        decode_rgb(encoded)
