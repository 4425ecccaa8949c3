"""Resizes images on the accelerator, to the pixels of Pillow's `Image.resize`, to the bit.

Pillow resizes the rows, rounds to bytes, then resizes the columns (`device_resizes` says when). Both times an output
pixel is a weighted sum of neighbours; the weights are the filter's values at the distances of their centres, stretched
when the image shrinks, and are whole multiples of 2⁻²². So all is whole numbers of 32 bits, the same on every device.
"""

import math
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


@lru_cache(maxsize=10_000)
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


def _weights_of(sizes: np.ndarray, out_size: int, resize: str, taps: int) -> tuple[np.ndarray, np.ndarray]:
    """The `weights` of many images: int32[n, out_size] and int32[n, out_size, taps or more]."""
    distinct, place = np.unique(sizes, return_inverse=True)
    found = [weights(size, out_size, resize) for size in distinct.tolist()]
    taps = max(taps, *(rows.shape[1] for _, rows in found))
    table = np.zeros((len(distinct), out_size, taps), np.int32)
    for i, (_, rows) in enumerate(found):
        table[i, :, : rows.shape[1]] = rows
    return np.stack([first for first, _ in found])[place], table[place]


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
    row_start = start[:, None] + jnp.arange(num_rows) * width[:, None]
    place = row_start[:, :, None] + first[:, None, :]
    # What lies beyond an image, or beyond all, has the weight 0.
    rows = _weighted(lambda tap: pixels.at[place + tap].get(mode="clip"), weight[:, None, :, None])
    first, weight = down
    images = jnp.arange(len(start))[:, None]
    return _weighted(lambda tap: rows.at[images, first + tap].get(mode="clip"), weight[:, :, None, None])


class DeviceResize:
    """Replaces the decoded images of batches by resized ones, on the devices that share a batch's rows.

    A shape of its input is compiled once; it grows with the largest images that have come, and does not shrink.

    Args:
      data: the size of resized images, and the filter.
      devices: of all processes.
    """

    def __init__(self, data: DataSettings, devices: Parallel):
        self._data, self._devices = data, devices
        self._num_rows, self._taps, self._num_pixels = 0, (0, 0), 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with `images` on the devices, ready for the functions that `devices` maps.

        Args:
          batch: a batch, or stacked batches; without `pixels` it stays as it is.

        Returns:
          It with `images`, uint8[b, height, width, 3] or uint8[steps, b, …], in place of `pixels` and `sizes`.
        """
        if "pixels" not in batch:
            return batch
        rest = {name: rows for name, rows in batch.items() if name not in ("pixels", "sizes")}
        stacked = isinstance(batch["pixels"], list)
        pixels, sizes = (batch["pixels"], batch["sizes"]) if stacked else ([batch["pixels"]], batch["sizes"][None])
        return rest | {"images": self._resized(pixels, sizes, stacked=stacked)}

    def _resized(self, pixels: list[np.ndarray], sizes: np.ndarray, *, stacked: bool) -> jax.Array:
        """Images of the pixels of every step and their sizes, int32[steps, b, 2]; with all steps if it is `stacked`."""
        devices, num_rows = self._devices.local, sizes.shape[1]
        share = num_rows // len(devices)
        parts = []
        for place, device in enumerate(devices):
            rows = slice(place * share, (place + 1) * share)
            # Each step is sent by itself: one array of all would first have to be made.
            of_steps = [self._on(device, *_share(*step, rows)) for step in zip(pixels, sizes, strict=True)]
            parts.append(_stack(of_steps) if stacked else of_steps[0])
        return self._devices.join_rows(parts, stacked=stacked)

    def _on(self, device: Any, pixels: np.ndarray, sizes: np.ndarray) -> jax.Array:
        """Resizes the images of one `pack` on a device."""
        heights, widths = np.ascontiguousarray(sizes.T)
        start = np.cumsum([0, *np.prod(sizes, axis=1, dtype=np.int64)])
        data, (taps_x, taps_y) = self._data, self._taps
        across = _weights_of(widths, data.width, data.resize, taps_x)
        down = _weights_of(heights, data.height, data.resize, taps_y)
        self._taps = across[1].shape[-1], down[1].shape[-1]
        self._num_rows = max(self._num_rows, -(-int(heights.max()) // _ROWS) * _ROWS)
        self._num_pixels = max(self._num_pixels, padded_pixels(int(start[-1]), len(sizes)))
        if len(pixels) < self._num_pixels:
            padded = np.empty((self._num_pixels, 3), np.uint8)
            padded[: start[-1]] = pixels[: start[-1]]
            pixels = padded
        arguments = pixels[: self._num_pixels], start[:-1].astype(np.int32), widths, across, down
        return _resize(*jax.device_put(arguments, device), num_rows=self._num_rows)


def _share(pixels: np.ndarray, sizes: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """The pixels and sizes of some of the images that are packed; of the last ones with what pads them."""
    ends = np.cumsum([0, *sizes.prod(-1, dtype=np.int64)])
    return pixels[ends[rows.start] : None if rows.stop == len(sizes) else ends[rows.stop]], sizes[rows]


@jax.jit
def _stack(images: list[Array]) -> Array:
    return jnp.stack(images)
