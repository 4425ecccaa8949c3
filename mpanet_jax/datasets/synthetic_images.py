"""An image of the synthetic data set: a person in front of a place, as one camera sees them."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mpanet_jax.datasets.schema import INFRARED, VISIBLE
from mpanet_jax.datasets.synthetic_body import draw_pose
from mpanet_jax.datasets.synthetic_figures import draw_figure
from mpanet_jax.datasets.synthetic_people import NOTHING, SHADOW, draw_person, tint

_SCENE_SIZE = (720, 360)


@functools.lru_cache(maxsize=64)
def _draw_scene(seed: int, scene: int, modality: int) -> Image.Image:
    """A panorama of the place numbered `scene`, as `modality` sees it; an image shows a part of it."""
    rng = np.random.default_rng([seed, 4, scene])  # the same things stand there in both modalities
    width, height = _SCENE_SIZE
    horizon = int(height * rng.uniform(0.5, 0.78))
    place = Image.new("L", _SCENE_SIZE, 0)
    draw = ImageDraw.Draw(place)
    draw.rectangle((0, horizon, width, height), fill=1)
    wall, floor = rng.permutation(["bricks", "panels", "windows", "trees", "shelves", "plain"])[:2], rng.integers(3)
    for side, kind in enumerate(wall):
        left, right = side * width // 2, (side + 1) * width // 2
        step = int(rng.integers(40, 90))
        for x in range(left, right, step):
            if kind == "bricks":
                for row, y in enumerate(range(0, horizon, 22)):
                    draw.rectangle(
                        (x + (row % 2) * step // 2, y, x + (row % 2) * step // 2 + step // 2, y + 19), fill=2
                    )
            elif kind == "panels":
                draw.rectangle((x, 0, x + step // 2, horizon), fill=2)
            elif kind == "windows":
                draw.rectangle((x + 6, horizon * 0.12, x + step - 8, horizon * 0.62), fill=3)
                draw.line((x + step // 2, horizon * 0.12, x + step // 2, horizon * 0.62), fill=2, width=4)
            elif kind == "trees":
                draw.rectangle((x + 8, 0, x + 15, horizon + 4), fill=4)
                r = int(rng.integers(22, 48))
                draw.ellipse((x - r, 10, x + r, 10 + 2 * r), fill=5)
                draw.ellipse((x - 18, horizon - 24, x + 22, horizon + 12), fill=5)
            elif kind == "shelves":
                for y in range(20, horizon - 20, 46):
                    draw.rectangle((x, y + 30, x + step - 4, y + 36), fill=4)
                    for book in range(x, x + step - 14, 10):
                        draw.rectangle(
                            (book, y + int(rng.integers(0, 14)), book + 7, y + 30), fill=int(rng.integers(2, 6))
                        )
    for k in range(14):
        if floor == 0:  # tiles
            y = horizon + (height - horizon) * (k / 14) ** 1.7
            draw.line((0, y, width, y), fill=6, width=2)
            x = width * k / 13
            draw.line(
                (width / 2 + 0.6 * (x - width / 2), horizon, width / 2 + 1.6 * (x - width / 2), height), fill=6, width=2
            )
        elif floor == 1:  # a path's edge
            draw.polygon(((0, height), (0, horizon + 30), (width, horizon + 8), (width, height * 0.8)), fill=6)
    draw.rectangle((0, horizon - 4, width, horizon), fill=7)
    tones = np.random.default_rng([seed, 5, scene, modality])
    palette = np.zeros((256, 3))
    base = tones.uniform(0.2, 0.85)
    for material in range(8):
        tone = np.clip(base + tones.normal(0, 0.24), 0.05, 0.95)
        palette[material] = tone if modality == INFRARED else tint(tones, tone, saturation=tones.uniform(0.05, 0.5))
    picture = (255 * palette[np.asarray(place)]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5))


@dataclass(frozen=True)
class Camera:
    """How a camera renders light.

    Attributes:
      gain: exposure.
      cast: float[3], the factor of each channel.
      gamma, black: the tone curve: its exponent, and the value of black from 0 to 1.
      falloff: how much darker the corners are.
      light_from: how much brighter one side is.
      blur: in pixels, of an image 128 pixels high.
      noise: standard deviation in grey levels of 255.
    """

    gain: float
    cast: np.ndarray
    gamma: float
    black: float
    falloff: float
    light_from: float
    blur: float
    noise: float


@functools.lru_cache(maxsize=64)
def _make_camera(seed: int, camid: int, modality: int) -> Camera:
    rng = np.random.default_rng([seed, 6, camid, modality])
    infrared = modality == INFRARED
    return Camera(
        gain=rng.uniform(0.95, 1.2),
        cast=np.ones(3) if infrared else rng.uniform(0.84, 1.1, 3),
        gamma=rng.uniform(0.6, 1.4) if infrared else rng.uniform(0.75, 1.25),
        black=rng.uniform(0.0, 0.1),
        falloff=rng.uniform(0.25, 0.55) if infrared else rng.uniform(0.0, 0.2),
        light_from=rng.uniform(-0.35, 0.35),
        blur=rng.uniform(0.0, 0.55),
        noise=rng.uniform(3.0, 7.0) if infrared else rng.uniform(2.0, 5.0),
    )


def draw_image(
    seed: int, pid: int, *, camid: int, scene: int, modality: int, number: int, size: tuple[int, int]
) -> Image.Image:
    """Draws one image of a person; the same arguments give the same pixels.

    Args:
      seed: of the data set.
      pid: the person.
      camid: the camera.
      scene: the place that the camera looks at.
      modality: VISIBLE or INFRARED.
      number: which of the person's images in this camera.
      size: (width, height) in pixels.

    Returns:
      An RGB image. An infrared one has three equal channels, as the real files have.
    """
    rng = np.random.default_rng([seed, 7, pid, camid, modality, number])
    person, camera = draw_person(seed, pid), _make_camera(seed, camid, modality)
    width, height = size
    zoom = 2 if height <= 200 else 1  # small images are drawn at twice their size, for smooth edges
    big = (width * zoom, height * zoom)

    scale = big[1] * rng.uniform(0.88, 0.97) * person.height
    top = (big[1] - scale) * rng.uniform(0.15, 0.85)
    centre = big[0] * (0.5 + rng.normal(0, 0.045))
    figure = draw_figure(person, draw_pose(rng), big, centre, top, scale)

    part = _SCENE_SIZE[1] * rng.uniform(0.75, 1.0)
    left, up = rng.uniform(0, _SCENE_SIZE[0] - part * width / height), rng.uniform(0, _SCENE_SIZE[1] - part)
    box = (left, up, left + part * width / height, up + part)
    ground = np.array(_draw_scene(seed, scene, modality).resize(big, Image.Resampling.BILINEAR, box))
    shadow = figure == SHADOW
    ground[shadow] = ground[shadow] // 2
    pixels = np.where(((figure == NOTHING) | shadow)[..., None], ground, person.palette[modality][figure])

    picture = Image.fromarray(pixels).reduce(zoom)
    if camera.blur > 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(camera.blur * height / 128))
    light = np.asarray(picture, np.float32) / 255
    if modality == INFRARED:
        light = light[..., :1]
    u, v = np.linspace(-1, 1, width, dtype=np.float32)[None, :], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    lamp = 1 - camera.falloff * 0.5 * (u**2 + v**2) + camera.light_from * (0.6 * u - 0.3 * v)
    exposure = camera.gain * rng.uniform(0.88, 1.12)
    light = light * (exposure * lamp)[..., None]
    if modality == VISIBLE:
        light = light * camera.cast.astype(np.float32)
    light = camera.black + (1 - camera.black) * light.clip(0, 1) ** np.float32(camera.gamma)
    light += rng.standard_normal(light.shape, np.float32) * (camera.noise / 255)
    values = (light.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.repeat(values, 3, axis=2) if modality == INFRARED else values)
