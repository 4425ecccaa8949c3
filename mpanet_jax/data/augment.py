"""Augmentation and normalisation inside the step: uint8 in, normalised images out.

The order is: flip, pad and crop, channel exchange or grey, MRLE, RRLE, normalise, erase; `settings.augment` says which
of them are used. Every image has its own random key, derived from its place in the *global* batch, so the augmented
batch does not depend on how many devices share it. Leaving an operation out does not change the draws of the others.

MRLE and RRLE are the augmentations of RLE (Tan et al., NeurIPS 2024).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from mpanet_jax.settings import AugmentSettings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMINANCE = (0.2989, 0.5870, 0.1140)
RRLE_ATTEMPTS = 100
_RRLE_AT_ONCE = 10  # a divisor of it: the device looks whether to go on after so many, and the host waits for that
RRLE_DARK = 0.1  # RRLE ends once the factors of some pixel multiply to less than this


def normalize(
    images: UInt8[Array, "*b h w 3"] | Float[Array, "*b h w 3"], dtype: DTypeLike
) -> Float[Array, "*b h w 3"]:
    """The network's input of type `dtype`: (x/255 − mean)/std, with ImageNet's mean and std of each channel."""
    wide = jnp.promote_types(dtype, jnp.float32)
    scale = 1 / (255 * jnp.asarray(IMAGENET_STD, wide))
    offset = -jnp.asarray(IMAGENET_MEAN, wide) / jnp.asarray(IMAGENET_STD, wide)
    return (images.astype(wide) * scale + offset).astype(dtype)


def one_channel(key: PRNGKeyArray, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Channel exchange (Ye et al., ICCV 2021): all three channels become one of them, drawn uniformly."""
    channel = image[..., jax.random.randint(key, (), 0, 3)]
    return jnp.broadcast_to(channel[..., None], image.shape)


def grey(image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """All three channels become the luminance, 0.2989 R + 0.5870 G + 0.1140 B."""
    luminance = (image * jnp.asarray(LUMINANCE, image.dtype)).sum(-1, keepdims=True)
    return jnp.broadcast_to(luminance, image.shape)


def symmetric_beta(key: PRNGKeyArray, beta: float, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Draws from Beta(β, β) without a loop, for which an accelerator would have to wait.

    The formula is Devroye's (Random variate generation in one line of code, WSC 1996): for a random sign s, and u and v
    uniform between 0 and 1, (1 + s/√(1 + z))/2 with 1/z = (u^(−1/β) − 1) cos²(2πv).
    """
    sign_key, u_key, v_key = jax.random.split(key, 3)
    u = jax.random.uniform(u_key, shape, dtype, minval=jnp.finfo(dtype).tiny)
    v = jax.random.uniform(v_key, shape, dtype)
    z = 1 / (jnp.expm1(-jnp.log(u) / beta) * jnp.cos(2 * jnp.pi * v) ** 2)
    low = -jnp.expm1(-jnp.log1p(z) / 2) / 2  # (1 − 1/√(1 + z))/2, exact near 0 too
    return jnp.where(jax.random.bernoulli(sign_key, shape=shape), low, 1 - low)


def mrle(key: PRNGKeyArray, image: Float[Array, "h w 3"], beta: float) -> Float[Array, "h w 3"]:
    """MRLE: all channels become a random mix of the three; its weights are three draws of Beta(β, β) over their sum."""
    draws = symmetric_beta(key, beta, (3,), image.dtype)
    total = draws.sum()
    weights = jnp.where(total > 0, draws / jnp.where(total > 0, total, 1), 1 / 3)  # all three may round to 0
    return jnp.broadcast_to((image * weights).sum(-1, keepdims=True), image.shape)


def rrle(
    key: PRNGKeyArray,
    image: Float[Array, "h w 3"],
    *,
    beta: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Float[Array, "h w 3"]:
    """RRLE: rescales each channel in random rectangles, one after the other.

    In a rectangle a channel is multiplied by b/(its largest value there), with b from Beta(β, β); a channel that is 0
    everywhere there stays 0. Rectangles are drawn until the factors of some pixel multiply to less than 0.1, but at
    most a hundred.

    Args:
      key: of all draws.
      image: values from 0 to 1.
      beta: β.
      area: the range of a rectangle's share of the image, uniform.
      aspect: the range of its height / width, uniform. A rectangle that is not smaller than the image is skipped.
    """
    height, width, _ = image.shape
    area_key, aspect_key, top_key, left_key, beta_key = jax.random.split(key, 5)
    shape = (RRLE_ATTEMPTS,)
    box_height, box_width, fits = _box_sizes(
        area_key, aspect_key, shape, (height, width), area=area, aspect=aspect, log_aspect=False
    )
    places = zip((top_key, left_key), (height - box_height, width - box_width), strict=True)
    top, left = (jax.random.randint(k, shape, 0, jnp.maximum(last, 0) + 1) for k, last in places)
    brightness = symmetric_beta(beta_key, beta, (RRLE_ATTEMPTS, 3), image.dtype)

    def goes_on(factors: Array) -> Array:
        return factors.min() >= RRLE_DARK

    def rescale(attempt: Array, factors: Array) -> Array:
        inside = _inside((height, width), top[attempt], left[attempt], box_height[attempt], box_width[attempt])
        inside = inside & fits[attempt] & goes_on(factors)
        largest = jnp.where(inside, image * factors, 0).max((0, 1))
        factor = jnp.where(largest > 0, brightness[attempt] / jnp.where(largest > 0, largest, 1), 1)
        return jnp.where(inside, factors * factor, factors)

    def rescale_some(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        first, factors = carry
        return first + _RRLE_AT_ONCE, lax.fori_loop(
            0, _RRLE_AT_ONCE, lambda n, factors: rescale(first + n, factors), factors
        )

    _, factors = lax.while_loop(
        lambda carry: (carry[0] < RRLE_ATTEMPTS) & goes_on(carry[1]),
        rescale_some,
        rescale_some((jnp.zeros((), jnp.int32), jnp.ones_like(image))),
    )
    return image * factors


def _box_sizes(
    area_key: PRNGKeyArray,
    aspect_key: PRNGKeyArray,
    shape: tuple[int, ...],
    size: tuple[int, int],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    log_aspect: bool,
) -> tuple[Int[Array, " n"], Int[Array, " n"], Bool[Array, " n"]]:
    """Draws the heights and widths of boxes, and says whether each is lower and narrower than the image.

    Args:
      area_key, aspect_key: of the draws.
      shape: of the results.
      size: (height, width) of the image.
      area: the range of a box's share of the image, uniform.
      aspect: the range of height / width, uniform.
      log_aspect: the logarithm of the aspect is uniform instead.
    """
    height, width = size
    share = jax.random.uniform(area_key, shape, minval=area[0], maxval=area[1])
    ends = jnp.log(jnp.asarray(aspect)) if log_aspect else jnp.asarray(aspect)
    ratio = jax.random.uniform(aspect_key, shape, minval=ends[0], maxval=ends[1])
    ratio = jnp.exp(ratio) if log_aspect else ratio
    box_height = jnp.round(jnp.sqrt(share * height * width * ratio)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(share * height * width / ratio)).astype(jnp.int32)
    return box_height, box_width, (box_height < height) & (box_width < width)


def _inside(size: tuple[int, int], top: Array, left: Array, height: Array, width: Array) -> Bool[Array, "h w 1"]:
    """Which pixels of an image of `size` (height, width) lie in a box."""
    row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    return ((row >= top) & (row < top + height) & (column >= left) & (column < left + width))[..., None]


def erase_box(
    key: PRNGKeyArray, height: int, width: int, settings: AugmentSettings
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Draws the rectangle of random erasing (Zhong et al., AAAI 2020).

    `erase_attempts` boxes are drawn, with a uniform area and a log-uniform (or uniform) aspect, and the first one that
    is smaller than the image is taken.

    Args:
      key: of all draws.
      height, width: of the image.
      settings: the probability and the ranges.

    Returns:
      (top, left, box height, box width) in pixels; the box is 0 × 0 if nothing is to be erased.
    """
    apply_key, area_key, aspect_key, top_key, left_key = jax.random.split(key, 5)
    box_height, box_width, fits = _box_sizes(
        area_key,
        aspect_key,
        (settings.erase_attempts,),
        (height, width),
        area=settings.erase_area,
        aspect=settings.erase_aspect,
        log_aspect=settings.erase_log_aspect,
    )
    first = jnp.where(fits, jnp.arange(len(fits)), len(fits)).min()
    erase = fits.any() & (jax.random.uniform(apply_key) < settings.erase_probability)
    box_height = jnp.where(erase, box_height[first], 0)
    box_width = jnp.where(erase, box_width[first], 0)
    top = jax.random.randint(top_key, (), 0, height - box_height + 1)
    left = jax.random.randint(left_key, (), 0, width - box_width + 1)
    return top, left, box_height, box_width


def change_colours(
    key: PRNGKeyArray, image: UInt8[Array, "h w 3"], settings: AugmentSettings, dtype: DTypeLike
) -> Float[Array, "h w 3"]:
    """Channel exchange or grey, then MRLE, then RRLE, each with its probability; values of `dtype` from 0 to 255."""
    pixels = image.astype(dtype) / 255
    keys = jax.random.split(key, 7)
    if settings.exchange_probability or settings.grey_probability:
        exchanged = jax.random.uniform(keys[0]) < settings.exchange_probability
        greyed = jax.random.uniform(keys[1]) < settings.grey_probability
        pixels = jnp.where(exchanged, one_channel(keys[2], pixels), jnp.where(greyed, grey(pixels), pixels))
    if settings.mrle_probability:
        mixed = jax.random.uniform(keys[3]) < settings.mrle_probability
        pixels = jnp.where(mixed, mrle(keys[4], pixels, settings.mrle_beta), pixels)
    if settings.rrle_probability:
        rescaled = jax.random.uniform(keys[5]) < settings.rrle_probability
        beta, area, aspect = settings.rrle_beta, settings.rrle_area, settings.rrle_aspect
        pixels = jnp.where(rescaled, rrle(keys[6], pixels, beta=beta, area=area, aspect=aspect), pixels)
    return 255 * pixels


def augment_image(
    key: PRNGKeyArray, image: UInt8[Array, "h w 3"], settings: AugmentSettings, dtype: DTypeLike
) -> Float[Array, "h w 3"]:
    """Augments and normalises one image; `key` decides all draws, and the result is of type `dtype`."""
    height, width, _ = image.shape
    flip_key, row_key, column_key, erase_key, colour_key = jax.random.split(key, 5)
    # Flip and crop in one gather: output pixel (i, j) reads source pixel (rows[i], columns[j]).
    pad = settings.crop_padding
    if pad or settings.flip_probability:
        rows = jnp.arange(height) + jax.random.randint(row_key, (), -pad, pad + 1)
        columns = jnp.arange(width) + jax.random.randint(column_key, (), -pad, pad + 1)
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        flip = jax.random.uniform(flip_key) < settings.flip_probability
        columns = jnp.where(flip, width - 1 - columns, columns)
        image_there = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
        image = jnp.where(inside[..., None], image_there, jnp.asarray(settings.crop_fill, image.dtype))
    if any(getattr(settings, f"{name}_probability") for name in ("exchange", "grey", "mrle", "rrle")):
        wide = jnp.promote_types(dtype, jnp.float32)
        normalised = normalize(change_colours(colour_key, image, settings, wide), dtype)
    else:
        normalised = normalize(image, dtype)
    if not settings.erase_probability:
        return normalised
    erased = _inside((height, width), *erase_box(erase_key, height, width, settings))
    return jnp.where(erased, jnp.asarray(settings.erase_fill, dtype), normalised)


def augment(
    key: PRNGKeyArray,
    images: UInt8[Array, "b h w 3"],
    settings: AugmentSettings,
    *,
    dtype: DTypeLike,
    first_index: int | Int[Array, ""] = 0,
) -> Float[Array, "b h w 3"]:
    """Augments and normalises a batch; the key of image b is `fold_in(key, first_index + b)`.

    Args:
      key: of this step, the same on every device.
      images: the resized images.
      settings: which operations, with their probabilities and ranges.
      dtype: of the result.
      first_index: the place of this device's first image in the global batch.
    """
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(first_index + jnp.arange(len(images)))
    return jax.vmap(lambda k, image: augment_image(k, image, settings, dtype))(keys, images)
