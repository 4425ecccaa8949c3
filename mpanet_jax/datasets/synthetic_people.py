"""Who the people of the synthetic data set are: their build, hair, clothes and bags, and what each camera sees of them.

A figure is drawn as a map of materials (skin, hair, upper garment, its print, …), and a modality colours the map: a
visible camera by each material's colour, an infrared camera by its reflectance, which is independent of the colour. So
neither colour nor brightness carries over between the modalities. What does carry over is where one material ends and
the next begins: the lengths of hair, sleeves and trousers, prints, glasses, hats, bags and shoes. These are the nuances
to discover.
"""

import functools
from dataclasses import dataclass

import numpy as np

from mpanet_jax.datasets.schema import INFRARED, VISIBLE

# The materials of a figure. Two bits darken them: SHADE for far limbs and outlines, WEAVE for a cloth's texture.
NOTHING, SKIN, HAIR, TOP, TOP_PRINT, BOTTOM, BOTTOM_PRINT, SHOE, SOLE = range(9)
HAT, HAT_BAND, BAG, BAG_FLAP, GLASSES, SCARF, INNER, EYE = range(9, 17)
SHADOW = 31  # on the ground
SHADE, WEAVE = 32, 64

HAIRS = ("bald", "short", "bob", "long", "bun", "ponytail", "afro")
HATS = ("none", "none", "none", "cap", "beanie", "brim")
EYEWEAR = ("none", "none", "glasses", "sunglasses")
SLEEVES = (0.12, 0.4, 0.7, 1.0)  # covered share of the arm
TOP_HEMS = (0.47, 0.53, 0.60, 0.72)  # y of the hem: short, hip, tunic, coat
TOP_PRINTS = (
    "plain",
    *("wide_stripes", "narrow_stripes", "vertical_stripes", "check", "grid"),
    *("band", "yoke", "sash", "logo", "dots"),
)
TEXTURES = ("smooth", "smooth", "ribs", "cord")
BOTTOMS = ("trousers", "trousers", "cropped", "shorts", "short_skirt", "long_skirt")
BOTTOM_PRINTS = ("plain", "plain", "wide_stripes", "vertical_stripes", "check", "side_stripe", "hem_band")
SHOES = (0.0, 0.0, 0.45, 0.85)  # covered share of the shin: shoes, boots, knee boots
BAGS = ("none", "none", "backpack", "shoulder_bag", "handbag")
COVERED_LEG = {"trousers": 1.0, "cropped": 0.78, "shorts": 0.45, "short_skirt": 0.0, "long_skirt": 0.0}


@dataclass(frozen=True)
class Person:
    """An identity: what stays the same in all images of a person.

    Attributes:
      height: relative to the tallest people's, 1.
      build: width relative to the average.
      sleeves: covered share of the arm.
      top_hem: where the upper garment ends, from the crown, in body heights.
      shoes: covered share of the shin.
      palette: uint8[2, 128, 3]: the RGB value of each material, to a visible and to an infrared camera.
    """

    height: float
    build: float
    hair: str
    hat: str
    eyewear: str
    sleeves: float
    top_hem: float
    top_print: str
    contrast_sleeves: bool
    open_jacket: bool
    scarf: bool
    top_texture: str
    bottom: str
    bottom_print: str
    bottom_texture: str
    shoes: float
    light_sole: bool
    bag: str
    palette: np.ndarray


@functools.lru_cache(maxsize=2048)
def draw_person(seed: int, pid: int) -> Person:
    """The identity `pid` of the data set that `seed` draws; the same arguments give the same person."""
    # Colours and reflectances come from two separate streams: neither says anything about the other.
    colours, reflectances = np.random.default_rng([seed, 2, pid]), np.random.default_rng([seed, 3, pid])
    visible = _tones(colours, skin=colours.uniform(0.38, 0.78))
    infrared = _tones(reflectances, skin=reflectances.uniform(0.6, 0.7))
    palette = np.zeros((2, 128, 3))
    palette[INFRARED, : len(infrared)] = infrared[:, None]
    palette[VISIBLE, : len(visible)] = [tint(colours, tone) for tone in visible]
    palette[VISIBLE, SKIN] = visible[SKIN] * np.array([1.22, 0.95, 0.78])
    palette[VISIBLE, HAIR] = tint(
        colours, visible[HAIR], colours.uniform(0.06, 0.12), colours.choice([0.1, 0.55, 0.65])
    )
    palette[:, SHADE : 2 * SHADE] = 0.62 * palette[:, :SHADE]
    palette[:, WEAVE:] = 0.8 * palette[:, :WEAVE]
    rng = np.random.default_rng([seed, 1, pid])
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    return Person(
        height=rng.uniform(0.88, 1.0),
        build=rng.uniform(0.82, 1.25),
        hair=pick(HAIRS),
        hat=pick(HATS),
        eyewear=pick(EYEWEAR),
        sleeves=pick(SLEEVES),
        top_hem=pick(TOP_HEMS),
        top_print=pick(TOP_PRINTS),
        contrast_sleeves=rng.random() < 0.2,
        open_jacket=rng.random() < 0.25,
        scarf=rng.random() < 0.2,
        top_texture=pick(TEXTURES),
        bottom=pick(BOTTOMS),
        bottom_print=pick(BOTTOM_PRINTS),
        bottom_texture=pick(TEXTURES),
        shoes=pick(SHOES),
        light_sole=rng.random() < 0.5,
        bag=pick(BAGS),
        palette=(255 * palette.clip(0, 1)).astype(np.uint8),
    )


def _tones(rng: np.random.Generator, skin: float) -> np.ndarray:
    """Each material's brightness in [0, 1] in one modality; neighbours differ enough to be told apart."""
    tones = np.zeros(EYE + 1)
    tones[SKIN] = skin

    def choose(material, *neighbours):
        candidates = rng.uniform(0.06, 0.96, 24)
        gaps = [np.abs(candidates - tones[other]) / distance for other, distance in neighbours]
        margin = np.min(gaps, axis=0)
        tones[material] = candidates[np.argmax(margin >= 1) if (margin >= 1).any() else np.argmax(margin)]

    choose(HAIR, (SKIN, 0.22))
    choose(TOP, (SKIN, 0.2))
    choose(TOP_PRINT, (TOP, 0.45))
    choose(INNER, (TOP, 0.35))
    choose(SCARF, (TOP, 0.3), (SKIN, 0.15))
    choose(BOTTOM, (SKIN, 0.2), (TOP, 0.28))
    choose(BOTTOM_PRINT, (BOTTOM, 0.45))
    choose(SHOE, (SKIN, 0.2), (BOTTOM, 0.25))
    choose(SOLE, (SHOE, 0.4))
    choose(HAT, (SKIN, 0.2), (HAIR, 0.3))
    choose(HAT_BAND, (HAT, 0.35))
    choose(BAG, (TOP, 0.32), (BOTTOM, 0.15))
    choose(BAG_FLAP, (BAG, 0.25))
    choose(GLASSES, (SKIN, 0.4))
    tones[EYE] = 0.08
    return tones


def tint(
    rng: np.random.Generator, tone: float, hue: float | None = None, saturation: float | None = None
) -> np.ndarray:
    """float[3]: a colour whose luminance is `tone`."""
    if hue is None:
        hue = rng.random()
    if saturation is None:
        saturation = float(rng.choice([0.05, 0.3, 0.55, 0.8], p=[0.2, 0.25, 0.3, 0.25]))
    pure = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colour = 1 - saturation + saturation * pure
    luminance = colour @ [0.299, 0.587, 0.114]
    return colour * tone / luminance if tone < luminance else 1 - (1 - colour) * (1 - tone) / (1 - luminance + 1e-9)
