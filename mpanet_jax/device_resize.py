"""Resizes images on the accelerator, to the pixels of Pillow's `Image.resize`, to the bit.

Pillow resizes the rows, rounds to bytes, then resizes the columns (`device_resizes` says when). Both times an output
pixel is a weighted sum of neighbours; the weights are the filter's values at the distances of their centres, stretched
when the image shrinks, and are whole multiples of 2⁻²². So all is whole numbers of 32 bits, the same on every device.
"""

import math
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from mpanet_jax.data.sent_images import padded_pixels
from mpanet_jax.parallel import Parallel
from mpanet_jax.settings import DataSettings

PRECISION_BITS = 22
_ROWS = 64  # heights are rounded up to a multiple, so that few programs are compiled


_sin = np.vectorize(math.sin, otypes=[float])  # NumPy's own may differ in the last bit


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = np.where(x == 0, 1.0, x * math.pi)
    return np.where(x == 0, 1.0, _sin(angle) / angle)


# name: (its radius, its values at distances in pixels)
FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1.0, lambda x: np.maximum(0.0, 1.0 - abs(x))),
    "lanczos": (3.0, lambda x: np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)),
}


def weights(size: int, out_size: int, resize: str) -> tuple[Int32[np.ndarray, " o"], Int32[np.ndarray, "o taps"]]:
    """The neighbours of every output pixel along one axis, and their weights.

    Args:
      size: of the image along this axis.
      out_size: of the resized image.
      resize: the filter, a name of FILTERS.

    Returns:
      The first neighbour of each output pixel; and the weights of it and of those that follow, times 2²², filled up
      with zeros.
    """
    radius, values = FILTERS[resize]
    scale = size / out_size
    stretch = max(scale, 1.0)
    centre = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((centre - radius * stretch + 0.5).astype(np.int32), 0)
    end = np.minimum((centre + radius * stretch + 0.5).astype(np.int32), size)
    neighbour = first[:, None] + np.arange((end - first).max())
    rows = values((neighbour - centre[:, None] + 0.5) * (1.0 / stretch))
    rows[neighbour >= end[:, None]] = 0.0
    rows /= np.add.accumulate(rows, axis=1)[:, -1:]  # one after the other, as Pillow adds them
    return first, (np.copysign(0.5, rows) + rows * 2**PRECISION_BITS).astype(np.int32)


def _weighted(neighbours: Callable[[int], UInt8[Array, "..."]], weight: Int32[Array, "..."]) -> UInt8[Array, "..."]:
    """The sum of `neighbours(tap)` × weight[…, tap] over the taps, × 2⁻²², as bytes."""
    sums = jnp.int32(1 << (PRECISION_BITS - 1))  # ½, to round
    for tap in range(weight.shape[-1]):
        sums = sums + neighbours(tap).astype(jnp.int32) * weight[..., tap]
    return jnp.clip(sums >> PRECISION_BITS, 0, 255).astype(jnp.uint8)


@partial(jax.jit, static_argnames="num_rows")
def _resize(
    pixels: UInt8[Array, "p 3"],
    start: Int32[Array, " n"],
    width: Int32[Array, " n"],
    across: tuple[Int32[Array, "n w"], Int32[Array, "n w taps_x"]],
    down: tuple[Int32[Array, "n h"], Int32[Array, "n h taps_y"]],
    *,
    num_rows: int,
) -> UInt8[Array, "n h w 3"]:
    """Resizes n images whose first pixel is start[i]; none has more than `num_rows` rows."""
    first, weight = across
    row_start = start[:, None] + jnp.arange(num_rows, dtype=jnp.int32) * width[:, None]
    place = row_start[:, :, None] + first[:, None, :]
    # What lies beyond an image, or beyond all, has the weight 0.
    rows = _weighted(lambda tap: pixels.at[place + tap].get(mode="clip"), weight[:, None, :, None])
    first, weight = down
    images = jnp.arange(len(start))[:, None]
    return _weighted(lambda tap: rows.at[images, first + tap].get(mode="clip"), weight[:, :, None, None])


class _Table:
    """The `weights` along one axis of all sizes that have come: many are looked up at once."""

    def __init__(self, out_size: int, resize: str):
        self._out_size, self._resize = out_size, resize
        self._place = np.full(1, -1)  # of a size in the arrays
        self._first = np.zeros((0, out_size), np.int32)
        self._weight = np.zeros((0, out_size, 1), np.int32)

    def weights(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of images of `sizes`, int32[steps, b]: int32[steps, b, out] and int32[steps, b, out, taps]."""
        largest = int(sizes.max())
        if largest >= len(self._place):
            self._place = np.concatenate([self._place, np.full(largest + 1 - len(self._place), -1)])
        if (new := np.unique(sizes[self._place[sizes] < 0])).size:
            self._add(new)
        place = self._place[sizes]
        return self._first[place], self._weight[place]

    def _add(self, sizes: np.ndarray) -> None:
        first, weight = zip(*(weights(size, self._out_size, self._resize) for size in sizes.tolist()), strict=True)
        taps = max(rows.shape[-1] for rows in (self._weight, *weight))
        weight = np.concatenate([_filled_up(rows, taps) for rows in (self._weight, *(w[None] for w in weight))])
        first = np.concatenate([self._first, np.stack(first)])
        # Last, when there was memory for all.
        self._place[sizes] = len(self._first) + np.arange(len(sizes))
        self._first, self._weight = first, weight


def _filled_up(weight: np.ndarray, taps: int) -> np.ndarray:
    return np.pad(weight, ((0, 0), (0, 0), (0, taps - weight.shape[-1])))


class DeviceResize:
    """Replaces the decoded images of batches by resized ones, on the devices that share a batch's rows.

    Each device compiles a program for the shape of what it gets, which grows with the largest images that have come,
    and does not shrink; so use one object, that of `of`.

    Args:
      height, width, resize: the size of resized images, and the filter, as in the settings.
      devices: of all processes.
    """

    def __init__(self, height: int, width: int, resize: str, devices: Parallel):
        self._height, self._width, self._resize, self._devices = height, width, resize, devices
        self._lock = threading.Lock()
        self._num_rows, self._pixels_of_an_image = 0, 0
        self._tables = [_Table(size, resize) for size in (height, width)]

    @classmethod
    def of(cls, data: DataSettings, devices: Parallel) -> "DeviceResize":
        """That of some settings and devices; the same one in every call."""
        return _kept(data.height, data.width, data.resize, devices)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with `images` on the devices, ready for the functions that `devices` maps.

        Args:
          batch: a batch, or stacked batches; without `pixels` it stays as it is.

        Returns:
          It with `images`, uint8[b, height, width, 3] or uint8[steps, b, …], in place of `pixels` and `sizes`.
        """
        if "pixels" not in batch:
            return batch
        with self._lock:
            return self._with_images(batch)

    def _with_images(self, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: rows for name, rows in batch.items() if name not in ("pixels", "sizes")}
        stacked = isinstance(batch["pixels"], list)
        pixels, sizes = (batch["pixels"], batch["sizes"]) if stacked else ([batch["pixels"]], batch["sizes"][None])
        return rest | {"images": self._resized(pixels, sizes, stacked=stacked)}

    def _resized(self, pixels: list[np.ndarray], sizes: np.ndarray, *, stacked: bool) -> jax.Array:
        """Images of the pixels of every step and their sizes, int32[steps, b, 2]; with all steps if it is `stacked`."""
        devices = self._devices.local
        num_steps, num_images, _ = sizes.shape
        share = num_images // len(devices)
        # Before anything is sent: all steps and devices get arrays of one shape.
        areas = sizes.prod(-1, dtype=np.int64)
        ends = np.concatenate([np.zeros((num_steps, 1), np.int64), areas.cumsum(1)], axis=1)
        most = int(areas.reshape(num_steps, len(devices), share).sum(-1).max())
        self._pixels_of_an_image = max(self._pixels_of_an_image, padded_pixels(most, share))
        self._num_rows = max(self._num_rows, -(-int(sizes[..., 0].max()) // _ROWS) * _ROWS)
        down, across = (table.weights(sizes[..., axis]) for axis, table in enumerate(self._tables))
        parts = []
        for place, device in enumerate(devices):
            rows = slice(place * share, (place + 1) * share)
            # Each step is sent by itself: one array of all would first have to be made. All are sent before the first
            # is resized: the device may not yet have taken up what another thread has it compute.
            sent = []
            for step in range(num_steps):
                first = ends[step, rows.start]
                arguments = (
                    self._long_enough(pixels[step][first:], ends[step, rows.stop] - first, share),
                    (ends[step, rows] - first).astype(np.int32),
                    np.ascontiguousarray(sizes[step, rows, 1]),
                    *((neighbour[step, rows], weight[step, rows]) for neighbour, weight in (across, down)),
                )
                sent.append(jax.device_put(arguments, device))
            of_steps = [_resize(*arguments, num_rows=self._num_rows) for arguments in sent]
            parts.append(_stack(of_steps) if stacked else of_steps[0])
        return self._devices.join_rows(parts, stacked=stacked)

    def _long_enough(self, pixels: np.ndarray, needed: int, num_images: int) -> np.ndarray:
        """`pixels`, of which the first `needed` are of `num_images`, at the length that the device gets.

        What follows them, of other images or nothing, has no weight.
        """
        length = num_images * self._pixels_of_an_image
        if len(pixels) < length:
            longer = np.empty((length, 3), np.uint8)
            longer[:needed] = pixels[:needed]
            pixels = longer
        return pixels[:length]


_kept = lru_cache(DeviceResize)


@jax.jit
def _stack(images: list[Array]) -> Array:
    return jnp.stack(images)
