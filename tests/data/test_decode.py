import io

import numpy as np
import pytest
from PIL import Image

from mpanet_jax.data.decode import decode_and_resize, decode_rgb, resize_bilinear
from mpanet_jax.errors import UserError
from tests.data.toy import jpeg


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
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_decodes_to_pillows_bits(subsampling, progressive):
    encoded = jpeg(photograph(97, 53), quality=85, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode_rgb(encoded, "x"), pillow(encoded))


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("RGB", "BMP")],
)
def test_other_kinds_of_image_become_rgb_as_in_pillow(mode, file_format):
    encoded = encode(Image.fromarray(photograph(40, 30)).convert(mode), file_format)
    image = decode_rgb(encoded, "x")
    assert image.shape == (40, 30, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(int), pillow(encoded), atol=1 if mode == "CMYK" else 0)


@pytest.mark.parametrize(
    "size",  # height, width of the source: enlarged, mixed, and reduced by up to 5
    [
        *[(128, 64), (150, 60), (300, 110), (390, 130), (400, 150), (420, 180), (576, 192), (700, 240), (768, 256)],
        *[(900, 300), (1100, 380), (1900, 640), (100, 400), (384, 200), (800, 128)],
    ],
)
def test_resizing_stays_within_one_of_255_of_pillow(size):
    image = photograph(*size)
    expected = np.asarray(Image.fromarray(image).resize((128, 384), Image.Resampling.BILINEAR))
    resized = resize_bilinear(image, 384, 128)
    assert resized.shape == (384, 128, 3)
    assert resized.dtype == np.uint8
    difference = np.abs(resized.astype(int) - expected)
    assert difference.mean() < 0.8
    # Nothing is shifted, at the borders as little as inside.
    assert abs(difference[0].mean() - difference.mean()) < 1.5
    assert abs((resized.astype(int) - expected).mean()) < 0.2


@pytest.mark.parametrize("size", [(60, 30), (40, 20), (150, 20), (24, 70), (61, 30), (400, 100)])
def test_a_batchs_row_is_written_in_place(size):
    image = photograph(*size)
    batch = np.full((3, 60, 30, 3), 77, np.uint8)
    assert np.shares_memory(resize_bilinear(image, 60, 30, out=batch[1]), batch[1])
    np.testing.assert_array_equal(batch[1], resize_bilinear(image, 60, 30))
    assert (batch[[0, 2]] == 77).all()
    encoded = encode(Image.fromarray(image), "PNG")
    decode_and_resize(encoded, "x", 60, 30, out=batch[2])
    np.testing.assert_array_equal(batch[2], batch[1])


def test_the_right_size_is_left_as_it_is():
    image = photograph(48, 16)
    np.testing.assert_array_equal(resize_bilinear(image, 48, 16), image)


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
    with pytest.raises(UserError, match=r"^image cam1/0007/0003\.jpg can't be decoded .*replace the file") as error:
        decode_and_resize(encoded, "cam1/0007/0003.jpg", 48, 16)
    assert "\n" not in str(error.value)


def test_a_truncated_png_is_named():
    encoded = encode(Image.fromarray(photograph(64, 32)), "PNG")
    with pytest.raises(UserError, match=r"image a\.png can't be decoded"):
        decode_rgb(encoded[: len(encoded) // 2], "a.png")
