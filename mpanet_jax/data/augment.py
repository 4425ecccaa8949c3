"""Augmentation and normalisation inside the step: uint8 in, normalised images out.

Order: flip, pad-and-crop (preset `official`), normalise, erase. Every image draws from its own key, folded
from its place in the *global* batch, so the augmented batch does not depend on how many devices share it.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from mpanet_jax.settings import AugmentSettings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERASE_ATTEMPTS = 10


def normalize(images: UInt8[Array, "*b h w 3"], dtype: DTypeLike) -> Float[Array, "*b h w 3"]:
    """Bytes to the network's input: (x/255 − mean)/std with ImageNet's statistics, in `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    scale = 1 / (255 * jnp.asarray(IMAGENET_STD, wide))
    offset = -jnp.asarray(IMAGENET_MEAN, wide) / jnp.asarray(IMAGENET_STD, wide)
    return (images.astype(wide) * scale + offset).astype(dtype)


def erase_box(
    key: PRNGKeyArray, height: int, width: int, settings: AugmentSettings
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Draws (top, left, box height, box width) of the rectangle to erase; its size is 0 × 0 where nothing is erased.

    Up to ten boxes are drawn, area uniform and aspect log-uniform in their ranges, and the first that is smaller than
    the image counts (Zhong et al., AAAI 2020).
    """
    apply_key, area_key, aspect_key, top_key, left_key = jax.random.split(key, 5)
    shape = (ERASE_ATTEMPTS,)
    area = jax.random.uniform(area_key, shape, minval=settings.erase_area[0], maxval=settings.erase_area[1])
    low, high = jnp.log(jnp.asarray(settings.erase_aspect))
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=low, maxval=high))
    box_height = jnp.round(jnp.sqrt(area * height * width * aspect)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(area * height * width / aspect)).astype(jnp.int32)
    fits = (box_height < height) & (box_width < width)
    first = jnp.argmax(fits)
    erase = fits.any() & (jax.random.uniform(apply_key) < settings.erase_probability)
    box_height = jnp.where(erase, box_height[first], 0)
    box_width = jnp.where(erase, box_width[first], 0)
    top = jax.random.randint(top_key, (), 0, height - box_height + 1)
    left = jax.random.randint(left_key, (), 0, width - box_width + 1)
    return top, left, box_height, box_width


def augment_image(
    key: PRNGKeyArray, image: UInt8[Array, "h w 3"], settings: AugmentSettings, dtype: DTypeLike
) -> Float[Array, "h w 3"]:
    """Flips, crops, normalises and erases one image; all draws come from `key`."""
    height, width, _ = image.shape
    flip_key, row_key, column_key, erase_key = jax.random.split(key, 4)
    # Flip and crop are one gather: output pixel (i, j) reads source pixel (rows[i], columns[j]).
    pad = settings.crop_padding
    if pad or settings.flip_probability:
        rows = jnp.arange(height) + jax.random.randint(row_key, (), -pad, pad + 1)
        columns = jnp.arange(width) + jax.random.randint(column_key, (), -pad, pad + 1)
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        flip = jax.random.uniform(flip_key) < settings.flip_probability
        columns = jnp.where(flip, width - 1 - columns, columns)
        image_there = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
        image = jnp.where(inside[..., None], image_there, jnp.asarray(settings.crop_fill, image.dtype))
    normalised = normalize(image, dtype)
    if not settings.erase_probability:
        return normalised
    top, left, box_height, box_width = erase_box(erase_key, height, width, settings)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    erased = (row >= top) & (row < top + box_height) & (column >= left) & (column < left + box_width)
    return jnp.where(erased[..., None], jnp.zeros((), dtype), normalised)


def augment(
    key: PRNGKeyArray,
    images: UInt8[Array, "b h w 3"],
    settings: AugmentSettings,
    *,
    dtype: DTypeLike,
    first_index: int | Int[Array, ""] = 0,
) -> Float[Array, "b h w 3"]:
    """Augments a batch; image b draws from `fold_in(key, first_index + b)`.

    Args:
      key: this step's key, the same on every device.
      images: the resized bytes.
      settings: what is drawn.
      dtype: of the result.
      first_index: the place of this device's first image in the global batch.
    """
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(first_index + jnp.arange(len(images)))
    return jax.vmap(lambda k, image: augment_image(k, image, settings, dtype))(keys, images)
