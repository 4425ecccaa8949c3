"""Each augmentation: its distribution over many draws, and its geometry on hand-made images."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mpanet_jax.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augment,
    augment_image,
    erase_box,
    grey,
    mrle,
    normalize,
    one_channel,
    rrle,
    symmetric_beta,
)
from mpanet_jax.settings import AugmentSettings

NOTHING = AugmentSettings(flip_probability=0.0, crop_padding=0, erase_probability=0.0)
HEIGHT, WIDTH = 24, 10
DRAWS = 4000


def draw_image(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8))


def same(results, expected):
    """Whether each image equals `expected`; one step of a byte is 0.017 after normalisation, rounding 1e-6."""
    return (np.abs(results - np.asarray(expected)) < 1e-4).all((-3, -2, -1))


def augment_many(image, settings, draws=DRAWS):
    images = jnp.broadcast_to(image, (draws, *image.shape))
    return np.asarray(jax.jit(lambda x: augment(jax.random.key(0), x, settings, dtype=jnp.float32))(images))


def test_normalize_by_hand():
    pixel = jnp.array([[[0, 255, 51]]], jnp.uint8)
    expected = [(v - m) / s for v, m, s in zip((0.0, 1.0, 0.2), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    np.testing.assert_allclose(normalize(pixel, jnp.float32)[0, 0], expected, rtol=1e-6)


def test_without_draws_it_only_normalises():
    image = draw_image()
    assert same(augment_many(image, NOTHING, 2), normalize(image, jnp.float32)).all()
    program = jax.make_jaxpr(lambda key: augment_image(key, image, NOTHING, jnp.float32))(jax.random.key(0))
    assert "random_bits" not in str(program)  # what is left out costs nothing


def test_leaving_an_operation_out_changes_no_draw_of_the_others():
    image = draw_image()
    moved = replace(NOTHING, flip_probability=0.5, crop_padding=2)
    results = augment_many(image, moved, 200)
    erased_too = augment_many(image, replace(moved, erase_probability=1.0), 200)
    erased = erased_too == 0
    assert 0.02 < erased.mean() < 0.33
    np.testing.assert_allclose(erased_too[~erased], results[~erased], atol=1e-6)
    only_erased = augment_many(image, replace(NOTHING, erase_probability=1.0), 200)
    np.testing.assert_array_equal(only_erased == 0, erased)


def test_flip_mirrors_columns_at_its_rate():
    image = draw_image()
    results = augment_many(image, replace(NOTHING, flip_probability=0.3))
    plain, mirrored = normalize(image, jnp.float32), normalize(image[:, ::-1], jnp.float32)
    is_plain, is_mirrored = same(results, plain), same(results, mirrored)
    assert (is_plain ^ is_mirrored).all()
    # 0.3 ± 5 standard deviations of a mean of DRAWS coin tosses
    assert abs(is_mirrored.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / DRAWS)


def test_crop_offsets_are_uniform_and_the_padding_is_127():
    pad = 2
    image = draw_image()
    results = augment_many(image, replace(NOTHING, crop_padding=pad))
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=127)
    counts = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = normalize(padded[top : top + HEIGHT, left : left + WIDTH], jnp.float32)
            counts[top, left] = same(results, crop).sum()
    # Every result is one of the 25 crops, and a chi-squared test does not refuse the uniform distribution.
    assert sum(counts.values()) == DRAWS
    expected = DRAWS / len(counts)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 60  # 24 degrees of freedom: p < 1e-4 beyond


def test_flip_comes_before_the_crop():
    # In a mirrored image the padding's side tells the order: cropping first would mirror the padding too.
    settings = replace(NOTHING, flip_probability=1.0, crop_padding=3)
    image = draw_image()
    padded = jnp.pad(image[:, ::-1], ((3, 3), (3, 3), (0, 0)), constant_values=127)
    for result in augment_many(image, settings, 20):
        matches = [
            same(result, normalize(padded[t : t + HEIGHT, u : u + WIDTH], jnp.float32))
            for t in range(7)
            for u in range(7)
        ]
        assert sum(matches) == 1


def test_erased_pixels_are_zero_after_normalisation_and_form_one_box():
    image = draw_image()
    results = augment_many(image, replace(NOTHING, erase_probability=1.0), 200)
    plain = np.asarray(normalize(image, jnp.float32))
    for result in results:
        changed = (np.abs(result - plain) > 1e-4).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (result[changed] == 0).all()


def test_erasing_happens_at_its_rate():
    results = augment_many(draw_image(), replace(NOTHING, erase_probability=0.5))
    erased = (results == 0).all(-1).any((1, 2))
    assert abs(erased.mean() - 0.5) < 5 * np.sqrt(0.25 / DRAWS)


def test_erase_boxes_keep_to_area_and_aspect():
    height, width = 384, 128
    settings = replace(NOTHING, erase_probability=1.0)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    top, left, box_height, box_width = (
        np.asarray(v) for v in jax.jit(jax.vmap(lambda key: erase_box(key, height, width, settings)))(keys)
    )
    assert (top >= 0).all() and (top + box_height <= height).all()
    assert (left >= 0).all() and (left + box_width <= width).all()
    share, aspect = box_height * box_width / (height * width), box_height / box_width
    # Rounding to whole pixels moves both ends by a few percent of the smallest boxes.
    assert 0.019 < share.min() < 0.025 and 0.30 < share.max() < 0.336
    assert 0.28 < aspect.min() < 0.33 and 3.1 < aspect.max() < 3.5
    # Aspect is log-uniform, but large wide boxes do not fit and are drawn again, so tall ones are more frequent.
    assert 0.5 < (aspect > 1).mean() < 0.8
    # Where the image is square nothing is refused for its shape: half of the boxes are tall, the mean share is 17.5 %.
    _, _, box_height, box_width = (
        np.asarray(v) for v in jax.jit(jax.vmap(lambda key: erase_box(key, 300, 300, settings)))(keys)
    )
    assert abs((box_height > box_width).mean() - 0.5) < 0.05
    assert abs((box_height * box_width / 90_000).mean() - 0.175) < 0.01


def test_places_of_the_box_are_uniform():
    settings = replace(NOTHING, erase_probability=1.0, erase_area=(0.04, 0.04), erase_aspect=(1.0, 1.0))
    keys = jax.random.split(jax.random.key(2), DRAWS)
    top, left, box_height, box_width = (
        np.asarray(v) for v in jax.jit(jax.vmap(lambda key: erase_box(key, 50, 50, settings)))(keys)
    )
    assert (box_height == 10).all() and (box_width == 10).all()
    for place in (top, left):
        counts = np.bincount(place, minlength=41)
        assert len(counts) == 41
        assert ((counts - DRAWS / 41) ** 2 / (DRAWS / 41)).sum() < 85  # 40 degrees of freedom: p < 1e-4 beyond


def test_uniform_aspects_and_another_fill():
    settings = replace(
        NOTHING, erase_probability=1.0, erase_aspect=(0.5, 2.0), erase_log_aspect=False, erase_area=(0.04, 0.2)
    )
    keys = jax.random.split(jax.random.key(1), DRAWS)
    _, _, box_height, box_width = (
        np.asarray(v) for v in jax.jit(jax.vmap(lambda key: erase_box(key, 400, 400, settings)))(keys)
    )
    aspects = box_height / box_width
    # Uniform: a third of them is above 1.5; of log-uniform ones a fifth.
    assert abs((aspects > 1.5).mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / DRAWS)
    filled = augment_many(draw_image(), replace(settings, erase_fill=(7.0, 8.0, 9.0)), 50)
    erased = filled[..., 0] == 7
    assert 0.02 < erased.mean() < 0.25
    assert (filled[erased] == (7, 8, 9)).all()


def test_one_channel_is_drawn_uniformly_and_copied():
    image = jnp.asarray(np.random.default_rng(0).random((4, 3, 3)), jnp.float32)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: one_channel(k, image)))(jax.random.split(jax.random.key(0), DRAWS)))
    matches = np.stack([(drawn == np.asarray(image)[..., c : c + 1]).all((1, 2, 3)) for c in range(3)])
    assert (matches.sum(0) == 1).all()
    assert (abs(matches.mean(1) - 1 / 3) < 5 * np.sqrt(2 / 9 / DRAWS)).all()


def test_grey_by_hand():
    pixel = jnp.array([[[0.5, 0.25, 1.0]]], jnp.float32)
    np.testing.assert_allclose(grey(pixel), np.full((1, 1, 3), 0.14945 + 0.14675 + 0.1140), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.3, 0.4, 2.0])
def test_symmetric_beta_has_the_distribution(beta):
    found = np.asarray(symmetric_beta(jax.random.key(1), beta, (20 * DRAWS,), jnp.float32), np.float64)
    assert ((found >= 0) & (found <= 1)).all()
    distribution = scipy.stats.beta(beta, beta)
    assert scipy.stats.kstest(found, distribution.cdf).pvalue > 1e-3
    # Near 0 too, where most draws of a small β are, but for those that float32 cannot tell from 0.
    small = found[(found > 1e-30) & (found < 0.01)]
    span = distribution.cdf(0.01) - distribution.cdf(1e-30)
    below = lambda x: (distribution.cdf(x) - distribution.cdf(1e-30)) / span  # noqa: E731
    assert scipy.stats.kstest(small, below).pvalue > 1e-3
    program = jax.make_jaxpr(lambda key: symmetric_beta(key, beta, (3,), jnp.float32))(jax.random.key(0))
    assert "while" not in str(program)


def test_mrle_weights_are_beta_draws_over_their_sum():
    image = jnp.eye(3)[None]  # three pixels: the channels' weights come out
    keys = jax.random.split(jax.random.key(0), DRAWS)
    mixed = np.asarray(jax.jit(jax.vmap(lambda k: mrle(k, image, 0.3)))(keys))[:, 0]
    assert (mixed == mixed[..., :1]).all()
    weights = mixed[..., 0]
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    draws = np.random.default_rng(0).beta(0.3, 0.3, (DRAWS, 3))
    for channel in range(3):
        assert scipy.stats.ks_2samp(weights[:, channel], (draws / draws.sum(1, keepdims=True))[:, 0]).pvalue > 1e-4


RRLE = {"area": (0.02, 0.4), "aspect": (0.3, 1 / 0.3)}


def test_rrle_first_rectangle_keeps_to_area_and_aspect():
    # Beta(0.01, 0.01) is 0 or 1, nearly: most images are over with the first rectangle, black in some channel.
    height, width, draws = 300, 300, 300
    image = jnp.ones((height, width, 3))
    keys = jax.random.split(jax.random.key(0), draws)
    # Not side by side, where all would wait for the one with the most rectangles; and it computes for longer than it
    # compiles, so it is worth more than tests/conftest.py asks for.
    options = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
    one_by_one = jax.jit(
        lambda keys: jax.lax.map(lambda k: (rrle(k, image, beta=0.01, **RRLE) < 0.1).any(-1), keys),
        compiler_options=options,
    )
    black = np.asarray(one_by_one(keys))
    rows, columns = black.any(2), black.any(1)
    box_height, box_width = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(black.sum((1, 2)), box_height * box_width)  # one whole rectangle each
    share, aspect = box_height * box_width / (height * width), box_height / box_width
    assert share.min() > 0.019 and share.max() < 0.41
    assert aspect.min() > 0.29 and aspect.max() < 3.4
    # Area and aspect are uniform, but what is as large as the image is left out: on a square one, the longest boxes.
    assert abs(share.mean() - 0.21) < 0.03
    assert abs((aspect > 1).mean() - (1 / 0.3 - 1) / (1 / 0.3 - 0.3)) < 0.1
    assert abs(rows[:, height // 2].mean() - columns[:, width // 2].mean()) < 0.35


def test_rrle_multiplies_by_beta_over_the_largest_value():
    # Beta(1e8, 1e8) is ½ and no product comes near 0.1, so all hundred rectangles are drawn: the first of them makes
    # the largest value ½, a later one that meets such a pixel changes nothing.
    image = jnp.full((20, 20, 3), 0.25).at[..., 1].set(0.0)
    found = np.asarray(jax.jit(lambda key: rrle(key, image, beta=1e8, **RRLE))(jax.random.key(0)))
    assert (found[..., 1] == 0).all()  # a channel of zeros stays as it is
    values = found[..., (0, 2)]
    np.testing.assert_allclose(values, np.where(values > 0.375, 0.5, 0.25), atol=2e-3)
    assert (values > 0.375).mean() > 0.2


def test_rrle_ends_once_a_pixel_is_dark():
    image = jnp.asarray(np.random.default_rng(0).uniform(0.2, 1, (24, 12, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    together = jax.jit(jax.vmap(lambda k: rrle(k, image, beta=0.4, **RRLE)))(keys)
    # Others of the batch, with more rectangles, change nothing.
    alone = jax.jit(lambda k: rrle(k, image, beta=0.4, **RRLE))
    np.testing.assert_allclose(together[:20], jnp.stack([alone(k) for k in keys[:20]]), rtol=1e-5)
    factors = np.asarray(together / image)
    assert (factors.min((1, 2, 3)) < 0.1).all()
    # What is dark lies in one rectangle, the last.
    dark = (factors < 0.1).any(-1)
    rows, columns = dark.any(2), dark.any(1)
    extent = [np.ptp(np.flatnonzero(places)) + 1 for places in (*rows, *columns)]
    whole = np.array(extent[:200]) * np.array(extent[200:])
    assert (dark.sum((1, 2)) >= 0.3 * whole).all() and (whole <= 0.45 * 24 * 12).all()
    # P(one of three factors is below 0.1) is above a half: there are few rectangles, most of the image stays.
    assert 0.4 < (factors == 1).mean() < 0.95


@pytest.mark.parametrize("name", ["exchange", "grey", "mrle", "rrle"])
def test_colours_change_at_their_rate(name):
    image, draws = draw_image(), 1000
    results = augment_many(image, replace(NOTHING, **{f"{name}_probability": 0.3}), draws)
    kept = same(results, normalize(image, jnp.float32))
    assert abs((~kept).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / draws)
    bytes_again = results[~kept] * IMAGENET_STD + IMAGENET_MEAN
    if name != "rrle":
        np.testing.assert_allclose(bytes_again[..., 0], bytes_again[..., 1], atol=1e-5)
        np.testing.assert_allclose(bytes_again[..., 0], bytes_again[..., 2], atol=1e-5)
    assert bytes_again.min() > -1e-5 and bytes_again.max() < 1 + 1e-5


def test_draws_depend_on_the_place_in_the_global_batch_only():
    images = jnp.stack([draw_image(seed) for seed in range(12)])
    settings = AugmentSettings(crop_padding=2, exchange_probability=0.5)
    key = jax.random.key(3)
    run = jax.jit(lambda part, first: augment(key, part, settings, dtype=jnp.float32, first_index=first))
    whole = run(images, 0)
    for size in (6, 4, 3):
        parts = [run(images[first : first + size], first) for first in range(0, 12, size)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_one_key_gives_one_result():
    image, settings = draw_image(), AugmentSettings(crop_padding=2)
    augmented = jax.jit(lambda key: augment_image(key, image, settings, jnp.float32))
    first, again, other = (augmented(jax.random.key(k)) for k in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
