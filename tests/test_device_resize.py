"""The device's resize gives Pillow's pixels, to the bit, and batches that are resized there hold what others hold."""

import io
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from mpanet_jax import device_resize
from mpanet_jax.call_plan import stack_batches
from mpanet_jax.data import reading, sent_images
from mpanet_jax.data.decode import resized_pixels, sent_image
from mpanet_jax.data.pipeline import split_batches
from mpanet_jax.data.reading import read_parts
from mpanet_jax.data.sent_images import FEWEST, SentImage, device_resizes, pack, sends_decoded
from mpanet_jax.device_resize import DeviceResize
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation import given_images
from mpanet_jax.evaluation.given_images import rows_of_images
from mpanet_jax.parallel import Parallel
from mpanet_jax.settings import DataSettings
from tests.data.toy import SIZE, toy_feed, toy_split

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}
ONE = Parallel((jax.devices()[0],))


def random_images(rng, sizes):
    """Half are black and white, which takes Lanczos's sums below 0 and above 255."""
    levels = np.array([0, 255], np.uint8)
    draw = (lambda shape: rng.integers(0, 256, shape, np.uint8), lambda shape: rng.choice(levels, shape))
    return [draw[i % 2]((height, width, 3)) for i, (height, width) in enumerate(sizes)]


def packed(images):
    return pack([SentImage.of(image) for image in images])


def device_resized(images, data):
    return np.asarray(DeviceResize.of(data, ONE)(packed(images))["images"])


def pillow_resized(image, data):
    return np.asarray(Image.fromarray(image).resize((data.width, data.height), FILTERS[data.resize]))


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("target", [(384, 128), (288, 144), (31, 50), (4, 4)])
def test_resized_images_are_pillows_to_the_bit(target, resize):
    height, width = target
    data = DataSettings(height, width, resize=resize)
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(1, 2 * height + 1)), int(rng.integers(1, 2 * width + 1))) for _ in range(60)]
    sizes += [target, (1, 1), (height, 2 * width), (height, 1), (1, 2 * width), (height + 1, width + 1)]
    sizes = [size for size in sizes if device_resizes(*size, data)]
    images = random_images(rng, sizes)
    assert len(sizes) > 30
    for image, found in zip(images, device_resized(images, data), strict=True):
        np.testing.assert_array_equal(found, pillow_resized(image, data))


@pytest.mark.parametrize(
    ("size", "on_device"),
    [
        ((384, 128), True),
        ((768, 256), False),  # 384 rows less, 128 columns: Pillow 13 begins with the columns
        ((640, 256), True),
        ((769, 256), False),
        ((384, 257), False),
        ((385, 128), False),
        ((385, 129), True),
        ((10, 256), True),
    ],
)
def test_the_host_resizes_what_the_device_would_not_resize_as_pillow(size, on_device):
    data = DataSettings(384, 128)
    (image,) = random_images(np.random.default_rng(1), [size])
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    sent = sent_image(file.getvalue(), data)
    assert (sent.height, sent.width) == (size if on_device else (384, 128))
    found = np.asarray(DeviceResize.of(data, ONE)(pack([sent]))["images"])
    np.testing.assert_array_equal(found[0], resized_pixels(file.getvalue(), data))


def test_shapes_grow_but_do_not_shrink(monkeypatch):
    """So that a last batch with fewer images needs no program of its own."""
    calls = []
    resize = device_resize._resize
    monkeypatch.setattr(
        device_resize,
        "_resize",
        lambda *arrays, num_rows: (
            calls.append((*(leaf.shape for leaf in jax.tree.leaves(arrays)), num_rows))
            or resize(*arrays, num_rows=num_rows)
        ),
    )
    data, device = DataSettings(48, 24), DeviceResize(48, 24, "bilinear", ONE)
    rng = np.random.default_rng(2)
    for sizes in ([(60, 40), (90, 48)], [(96, 48), (20, 10)], [(1, 1), (1, 1)]):
        images = random_images(rng, sizes)
        for image, found in zip(images, np.asarray(device(packed(images))["images"]), strict=True):
            np.testing.assert_array_equal(found, pillow_resized(image, data))
    assert calls[1] == calls[2]


@pytest.mark.parametrize(("num_workers", "resize"), [(0, "bilinear"), (0, "lanczos"), (2, "bilinear")])
def test_training_batches_are_those_that_the_host_resizes(num_workers, resize):
    split, device = toy_split(), DeviceResize.of(DataSettings(**SIZE, resize=resize), ONE)
    feeds = [
        toy_feed(split, cache="none", resize=resize, num_workers=workers, resize_on=who)
        for who, workers in (("host", 0), ("device", num_workers))
    ]
    for count in (1, 3):
        expected, sent = (stack_batches(feed.batches, count) for feed in feeds)
        assert "images" not in sent and len(sent["pixels"]) == count
        found = device(sent)
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            np.testing.assert_array_equal(found[name], rows)
    for feed in feeds:
        feed.batches.close()
    assert device(expected) is expected


def test_evaluation_batches_are_those_that_the_host_resizes():
    split, device = toy_split(), DeviceResize.of(DataSettings(**SIZE), ONE)
    rows = np.array([5, 3, 40, 7, 3, 0, 11])
    by_host, by_device = (
        list(split_batches(split, rows, DataSettings(**SIZE, resize_on=who), 3)) for who in ("host", "device")
    )
    for expected, sent in zip(by_host, by_device, strict=True):
        assert "images" not in sent
        for name, values in device(sent).items():
            np.testing.assert_array_equal(values, expected[name])


def test_given_images_are_those_that_the_host_resizes(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    arrays = random_images(rng, [(50, 20), (20, 30), (80, 16), (64, 32), (33, 17)])
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, array in zip(files, arrays, strict=True):
        Image.fromarray(array).save(file)
    files[2].write_bytes(b"no image")
    batches = []
    monkeypatch.setattr(
        DeviceResize, "__call__", lambda *given, call=DeviceResize.__call__: batches.append(given[1]) or call(*given)
    )
    for images in (files, [*files[:3], Image.fromarray(arrays[3]), arrays[4]]):
        found = {}
        for who in ("host", "device"):
            with monkeypatch.context() as patch:
                patch.setattr(given_images, "sends_decoded", lambda *_, who=who: who == "device")
                blocks, skipped = rows_of_images(
                    lambda x, _: x, images, np.zeros(5), DataSettings(32, 16), batch_size=2, errors="skip"
                )
            assert [fault.position for fault in skipped] == [2]
            found[who] = np.concatenate(blocks)
            assert ("pixels" in batches[-1]) == (who == "device")
        assert found["host"].shape == (4, 32, 16, 3)
        np.testing.assert_array_equal(found["host"], found["device"])


def test_a_model_that_was_trained_with_device_resizes_few_images_on_the_host(monkeypatch):
    image = np.zeros((20, 30, 3), np.uint8)
    data = DataSettings(32, 16, resize_on="device")
    sent = []
    monkeypatch.setattr(DeviceResize, "__call__", lambda self, batch: sent.append("pixels" in batch) or batch)
    rows_of_images(lambda x, _: x, [image], np.zeros(1), data, batch_size=2)
    assert sent == [False]


def test_who_resizes(monkeypatch):
    data = DataSettings()
    assert not sends_decoded(data, 128)  # on a CPU
    assert sends_decoded(DataSettings(resize_on="device"), 1)
    monkeypatch.setattr(sent_images.jax, "default_backend", lambda: "gpu")
    assert sends_decoded(data, FEWEST) and not sends_decoded(data, FEWEST - 1)
    assert not sends_decoded(DataSettings(resize_on="host"), 128)
    assert sends_decoded(DataSettings(num_workers=0), 128) and sends_decoded(DataSettings(num_workers=8), 128)
    for who in ("auto", "device"):  # more pixels than 32 bits can number
        assert not sends_decoded(DataSettings(4096, 4096, resize_on=who), 128)


@pytest.mark.parametrize("num_images", [7, 61])  # threads share a part, or each has its own
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_part_has_the_images_that_can_be_read(num_workers, num_images, monkeypatch):
    monkeypatch.setattr(reading, "decoding_threads", lambda: 3)
    squares = Squares(bad=(1, 4, 50), damaged=(5, 51))
    parts = read_parts(squares, num_images, DataSettings(4, 2), size=3, num_workers=num_workers, sent=True)
    read, sides, masks, faults = np.arange(-num_images % 3 + num_images), [], [], []
    for part in parts:
        assert part.arrays["sizes"].dtype == np.int32
        sides += part.arrays["sizes"][:, 0].tolist()
        masks += part.mask.tolist()
        faults += [row for row, _ in part.faults]
        sizes = part.arrays["sizes"].prod(1)
        pixels = part.arrays["pixels"][: sizes.sum(), 0]
        np.testing.assert_array_equal(pixels, np.repeat(np.where(part.mask, part.arrays["sizes"][:, 0], 0), sizes))
    there = (read < num_images) & ~np.isin(read, squares.bad)
    assert sides == np.where(there, read + 1, 1).tolist()
    assert masks == (there & ~np.isin(read, squares.damaged)).tolist()
    assert sorted(faults) == [row for row in (1, 4, 5, 50, 51) if row < num_images]


@dataclass(frozen=True)
class Squares:
    """Image i is a square of (i + 1)² pixels, all of them i + 1; of the damaged ones it is found out late."""

    bad: tuple[int, ...]
    damaged: tuple[int, ...]

    def __call__(self, row):
        if row in self.bad:
            raise UserError(f"image {row} is bad")
        return SentImage(row + 1, row + 1, partial(self.decode_into, row))

    def decode_into(self, row, place):
        place[:] = row + 1
        if row in self.damaged:
            raise UserError(f"image {row} is damaged")
