"""Draws the people of the synthetic data set: who they are, how they stand, and how a camera sees them.

A figure is drawn as a map of materials first (skin, hair, upper garment, its print, ...), and only then does a modality
colour it: a visible camera by the material's colour, an infrared camera by its reflectance, which is independent
of the colour. So nothing about colour or brightness carries over between the modalities; what does carry over is where
one material ends and the next begins: the lengths of hair, sleeves and trousers, prints, glasses, hats, bags and shoes.
These are the nuances to discover.

Body coordinates: y is 0 at the crown and 1 at the soles, x is 0 on the body's axis, both in units of the body's height.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mpanet_jax.datasets.schema import INFRARED, VISIBLE

# Materials of a figure. Two bits darken them: SHADE for far limbs and outlines, WEAVE for a cloth's texture.
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
    """An identity: all that stays the same in every image of a person.

    `palette[modality]` is uint8[128, 3]: what a visible camera and an infrared camera see of each material.
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
    """The identity `pid` of the data set with this seed."""
    # Colours and reflectances come from two separate streams: neither says anything about the other.
    colours, reflectances = np.random.default_rng([seed, 2, pid]), np.random.default_rng([seed, 3, pid])
    visible = _tones(colours, skin=colours.uniform(0.38, 0.78))
    infrared = _tones(reflectances, skin=reflectances.uniform(0.6, 0.7))
    palette = np.zeros((2, 128, 3))
    palette[INFRARED, : len(infrared)] = infrared[:, None]
    palette[VISIBLE, : len(visible)] = [_tint(colours, tone) for tone in visible]
    palette[VISIBLE, SKIN] = visible[SKIN] * np.array([1.22, 0.95, 0.78])
    palette[VISIBLE, HAIR] = _tint(
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


def _tint(
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


@dataclass(frozen=True)
class Pose:
    """One image's stance. yaw 0 faces the camera, π/2 to the right, π away; phase and stride in radians."""

    yaw: float
    phase: float
    stride: float
    lean: float


def _draw_pose(rng: np.random.Generator) -> Pose:
    yaw = rng.choice([0, 0.5, 1, 1.5], p=[0.35, 0.2, 0.25, 0.2]) * math.pi + rng.normal(0, 0.22)
    return Pose(yaw, rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.5), rng.normal(0, 0.012))


class _Pen:
    """Draws materials in body coordinates on a map of materials."""

    def __init__(self, size: tuple[int, int], centre: float, top: float, scale: float, lean: float):
        self.map = Image.new("L", size, NOTHING)
        self.draw = ImageDraw.Draw(self.map)
        self.centre, self.top, self.scale, self.lean = centre, top, scale, lean

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.centre + (x + self.lean * (1 - y)) * self.scale, self.top + y * self.scale

    def shape(self, material: int, *points: tuple[float, float], outline: bool = True) -> None:
        self.draw.polygon([self.at(*p) for p in points], material, (material | SHADE) if outline else None)

    def oval(self, material: int, x: float, y: float, rx: float, ry: float, start: int = 0, end: int = 360) -> None:
        """An ellipse, or the piece of it between two angles in degrees, clockwise from the right."""
        cx, cy = self.at(x, y)
        box = (cx - rx * self.scale, cy - ry * self.scale, cx + rx * self.scale, cy + ry * self.scale)
        if (start, end) == (0, 360):
            self.draw.ellipse(box, material)
        else:
            self.draw.chord(box, start, end, material)

    def limb(self, material: int, points: list[tuple[float, float]], widths: list[float], outline: bool = True) -> None:
        """A tapering tube along the points; widths are the half widths there."""
        if outline:
            self.limb(material | SHADE, points, [w + 0.005 for w in widths], outline=False)
        self.oval(material, *points[0], widths[0], widths[0])
        for (x0, y0), (x1, y1), w0, w1 in zip(points, points[1:], widths, widths[1:], strict=False):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            nx, ny = -(y1 - y0) / length, (x1 - x0) / length
            near = ((x0 + nx * w0, y0 + ny * w0), (x1 + nx * w1, y1 + ny * w1))
            beyond = ((x1 - nx * w1, y1 - ny * w1), (x0 - nx * w0, y0 - ny * w0))
            self.shape(material, *near, *beyond, outline=False)
            self.oval(material, x1, y1, w1, w1)


def _along(points: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    """The first `share` of a path of two equally long parts."""
    (x0, y0), (x1, y1), (x2, y2) = points
    if share <= 0.5:
        t = 2 * share
        return [points[0], (x0 + t * (x1 - x0), y0 + t * (y1 - y0))]
    t = 2 * share - 1
    return [points[0], points[1], (x1 + t * (x2 - x1), y1 + t * (y2 - y1))]


def _draw_leg(pen: _Pen, person: Person, pose: Pose, side: int) -> None:
    cos, sin = math.cos(pose.yaw), math.sin(pose.yaw)
    swing = side * pose.stride * math.sin(pose.phase)
    hip = (side * (0.010 + 0.040 * abs(cos)) * person.build * (1 if cos >= 0 else -1), 0.50)
    knee = (hip[0] + 0.23 * math.sin(swing) * sin, hip[1] + 0.23 * math.cos(swing))
    shin = swing - 0.1 - 0.7 * max(0.0, -swing)
    ankle = (knee[0] + 0.225 * math.sin(shin) * sin + side * 0.012 * cos, knee[1] + 0.225 * math.cos(shin))
    far = SHADE if side * sin < -0.35 else 0
    b = 0.75 + 0.25 * person.build
    path = [hip, knee, ankle]
    pen.limb(SKIN | far, path, [0.052 * b, 0.036 * b, 0.024 * b])
    toe = (ankle[0] + 0.062 * sin + side * 0.016 * cos, ankle[1] + 0.018 + 0.012 * abs(cos))
    if person.light_sole:
        pen.limb(SOLE | far, [(ankle[0], ankle[1] + 0.024), (toe[0], toe[1] + 0.012)], [0.031, 0.027])
    covered = COVERED_LEG[person.bottom]
    if covered:
        widths = [0.058 * b, 0.045 * b, 0.036 * b]
        cloth = _along(path, covered)
        pen.limb(BOTTOM | far, cloth, widths[: len(cloth)])
        if person.bottom_print == "side_stripe":
            pen.limb(BOTTOM_PRINT | far, cloth, [0.012] * len(cloth), outline=False)
        if person.bottom_print == "hem_band":
            band = [_along(path, covered - 0.16)[-1], cloth[-1]]
            pen.limb(BOTTOM_PRINT | far, band, [0.045 * b] * 2, outline=False)
    if person.shoes:
        t = person.shoes
        start = (ankle[0] + t * (knee[0] - ankle[0]), ankle[1] + t * (knee[1] - ankle[1]))
        pen.limb(SHOE | far, [start, ankle], [0.043 * b, 0.034 * b])
        pen.oval(SHOE | far, *start, 0.043 * b, 0.012)
    pen.limb(SHOE | far, [(ankle[0], ankle[1] + 0.004), toe], [0.030, 0.025])


def _draw_arm(pen: _Pen, person: Person, pose: Pose, side: int) -> None:
    cos, sin = math.cos(pose.yaw), math.sin(pose.yaw)
    swing = -side * 0.8 * pose.stride * math.sin(pose.phase)
    out = side * (1 if cos >= 0 else -1) * abs(cos)
    shoulder = (out * 0.098 * person.build, 0.198)
    elbow = (shoulder[0] + out * 0.022 + 0.15 * math.sin(swing) * sin, shoulder[1] + 0.15 * math.cos(swing))
    bent = swing + 0.3
    wrist = (elbow[0] + 0.15 * math.sin(bent) * sin, elbow[1] + 0.15 * math.cos(bent))
    far = SHADE if side * sin < -0.35 else 0
    b = 0.7 + 0.3 * person.build
    path = [shoulder, elbow, wrist]
    pen.limb(SKIN | far, path, [0.034 * b, 0.027 * b, 0.022 * b])
    pen.oval(SKIN | far, wrist[0], wrist[1] + 0.012, 0.024, 0.026)
    cloth = _along(path, person.sleeves)
    material = (TOP_PRINT if person.contrast_sleeves else TOP) | far
    pen.limb(material, cloth, [0.036 * b, 0.036 * b, 0.033 * b][: len(cloth)])
    if person.bag == "handbag" and side == 1:
        pen.limb(BAG, [(wrist[0], wrist[1] + 0.01), (wrist[0], wrist[1] + 0.05)], [0.008, 0.008])
        x, y = wrist[0], wrist[1] + 0.05
        pen.shape(BAG, (x - 0.05, y), (x + 0.05, y), (x + 0.062, y + 0.095), (x - 0.062, y + 0.095))
        pen.shape(BAG_FLAP, (x - 0.05, y), (x + 0.05, y), (x + 0.053, y + 0.03), (x - 0.053, y + 0.03), outline=False)


def _draw_torso(pen: _Pen, person: Person, pose: Pose) -> None:
    cos = math.cos(pose.yaw)
    wide = 0.60 + 0.40 * abs(cos)
    chest, waist, hip = (w * wide * person.build for w in (0.112, 0.086, 0.094))
    if person.bottom in ("short_skirt", "long_skirt"):
        hem, flare = (0.68, 0.05) if person.bottom == "short_skirt" else (0.86, 0.07)
        pen.shape(BOTTOM, (-waist, 0.42), (waist, 0.42), (hip + flare, hem), (-hip - flare, hem))
        if person.bottom_print == "hem_band":
            x = hip + flare
            pen.shape(
                BOTTOM_PRINT, (-x + 0.01, hem - 0.055), (x - 0.01, hem - 0.055), (x, hem), (-x, hem), outline=False
            )
    else:
        pen.shape(
            BOTTOM, (-waist, 0.42), (waist, 0.42), (hip, 0.50), (0.6 * hip, 0.55), (-0.6 * hip, 0.55), (-hip, 0.50)
        )
    pen.shape(SKIN, (-0.032, 0.11), (0.032, 0.11), (0.036, 0.18), (-0.036, 0.18))
    hem, flare = person.top_hem, 0.01 + 0.16 * max(0.0, person.top_hem - 0.52)
    bottom = hip + flare if hem > 0.5 else waist + 0.01
    right = [(0.045 * wide, 0.158), (0.8 * chest, 0.166), (chest, 0.195), (0.95 * chest, 0.29)]
    right += [(waist + 0.008, 0.41), (bottom, hem)]
    pen.shape(TOP, *right, *[(-x, y) for x, y in reversed(right)])
    if person.open_jacket and cos > 0.3:
        pen.shape(INNER, (-0.03, 0.158), (0.03, 0.158), (0.042, hem), (-0.042, hem), outline=False)
    if person.scarf:
        pen.oval(SCARF, 0, 0.166, 0.07 * wide + 0.01, 0.026)
        if cos > 0.3:
            pen.limb(SCARF, [(0.025, 0.17), (0.03, 0.31)], [0.018, 0.022])


def _draw_bag(pen: _Pen, person: Person, pose: Pose, behind: bool) -> None:
    """A backpack or a shoulder bag, the part of it `behind` the body or the part before it."""
    cos, sin = math.cos(pose.yaw), math.sin(pose.yaw)
    if person.bag == "backpack":
        if behind and abs(sin) > 0.35:
            x, w = -0.125 * sin * (0.6 + 0.4 * person.build), 0.07
            pen.shape(BAG, (x - w, 0.20), (x + w, 0.19), (x + w, 0.42), (x - w, 0.42))
            pen.shape(BAG_FLAP, (x - w, 0.32), (x + w, 0.32), (x + w, 0.40), (x - w, 0.40), outline=False)
        elif not behind and cos > 0.3:
            for side in (-1, 1):
                pen.limb(BAG, [(side * 0.06, 0.165), (side * 0.075, 0.36)], [0.015, 0.012], outline=False)
        elif not behind and cos < -0.3:
            pen.shape(BAG, (-0.07, 0.18), (0.07, 0.18), (0.088, 0.24), (0.088, 0.43), (-0.088, 0.43), (-0.088, 0.24))
            pen.shape(BAG_FLAP, (-0.06, 0.32), (0.06, 0.32), (0.06, 0.41), (-0.06, 0.41), outline=False)
    elif person.bag == "shoulder_bag" and not behind:
        side = 1 if cos >= 0 else -1
        wide = 0.35 + 0.65 * abs(cos)
        x = side * 0.115 * wide * person.build
        pen.limb(BAG, [(-0.7 * x, 0.165), (x, 0.45)], [0.011, 0.011], outline=False)
        pen.shape(BAG, (x - 0.055, 0.44), (x + 0.055, 0.44), (x + 0.055, 0.55), (x - 0.055, 0.55))
        pen.shape(BAG_FLAP, (x - 0.055, 0.44), (x + 0.055, 0.44), (x + 0.03, 0.49), (x - 0.03, 0.49), outline=False)


def _draw_long_hair(pen: _Pen, person: Person, pose: Pose) -> None:
    """The hair that hangs below the head: drawn before the head, and before the torso unless the back is seen."""
    sin = math.sin(pose.yaw)
    back = -0.03 * sin
    if person.hair == "bob":
        pen.limb(HAIR, [(back, 0.06), (back, 0.145)], [0.062, 0.060])
    elif person.hair == "long":
        pen.limb(HAIR, [(back, 0.06), (back * 1.6, 0.19), (back * 1.6, 0.30)], [0.060, 0.066, 0.055])
    elif person.hair == "ponytail":
        pen.limb(HAIR, [(2.2 * back, 0.05), (3.2 * back, 0.12), (3.0 * back, 0.25)], [0.022, 0.030, 0.014])


def _draw_head(pen: _Pen, person: Person, pose: Pose) -> None:
    cos, sin = math.cos(pose.yaw), math.sin(pose.yaw)
    rx, ry, y = 0.049, 0.068, 0.078
    if person.hair == "afro":
        pen.oval(HAIR | SHADE, 0, 0.062, 0.089, 0.083)
        pen.oval(HAIR, 0, 0.062, 0.084, 0.078)
    pen.oval(SKIN | SHADE, 0, y, rx + 0.005, ry + 0.005)
    pen.oval(SKIN, 0, y, rx, ry)
    if person.hair != "bald":
        if cos < -0.5:
            pen.oval(HAIR, 0, y, rx + 0.006, ry + 0.006)
        else:
            pen.oval(HAIR, -0.012 * sin, y - 0.012, rx + 0.006, ry - 0.002, 180, 360)
            if abs(sin) > 0.4:  # the back of the head
                pen.oval(HAIR, -0.028 * sin, y - 0.008, 0.036, 0.060)
    if person.hair == "bun":
        pen.oval(HAIR | SHADE, -0.05 * sin, 0.012, 0.036, 0.034)
        pen.oval(HAIR, -0.05 * sin, 0.010, 0.032, 0.030)
    if cos > -0.5:
        face = 0.030 * sin
        eyes = (-0.021, 0.021) if abs(sin) < 0.6 else (0.012 * (1 if sin > 0 else -1),)
        for x in eyes:
            pen.oval(EYE, face + x, y + 0.002, 0.0065, 0.0065)
        if abs(sin) < 0.6:
            pen.limb(
                SKIN | SHADE, [(face - 0.012, y + 0.038), (face + 0.012, y + 0.038)], [0.004, 0.004], outline=False
            )
        if person.eyewear != "none":
            for x in eyes:
                pen.oval(GLASSES, face + x, y + 0.002, 0.021, 0.019)
                if person.eyewear == "glasses":
                    pen.oval(SKIN, face + x, y + 0.002, 0.011, 0.010)
            pen.limb(GLASSES, [(-rx, y - 0.004), (rx, y - 0.004)], [0.005, 0.005], outline=False)
    if person.hat != "none":
        band = 0.052
        pen.oval(HAT | SHADE, 0, band, rx + 0.016, 0.066, 180, 360)
        pen.oval(HAT, 0, band, rx + 0.011, 0.061, 180, 360)
        if person.hat == "cap":
            pen.limb(HAT, [(0.02 * sin, band), (0.085 * sin + 0.001, band + 0.004)], [0.012 + 0.02 * abs(cos), 0.011])
        elif person.hat == "beanie":
            pen.limb(HAT_BAND, [(-rx, band - 0.006), (rx, band - 0.006)], [0.014, 0.014])
            pen.oval(HAT_BAND, 0, -0.012, 0.020, 0.020)
        else:
            pen.oval(HAT | SHADE, 0, band, 0.117, 0.022)
            pen.oval(HAT, 0, band - 0.002, 0.112, 0.018)
            pen.limb(HAT_BAND, [(-rx, band - 0.016), (rx, band - 0.016)], [0.010, 0.010], outline=False)


def _print_mask(kind: str, x: np.ndarray, y: np.ndarray, yaw: float) -> np.ndarray:
    """bool[h, w]: where a print shows on cloth at the body coordinates x[1, w] (or [h, w]) and y[h, 1]."""
    if kind == "wide_stripes":
        return (y / 0.074) % 1 < 0.5
    if kind == "narrow_stripes":
        return (y / 0.038) % 1 < 0.5
    if kind == "vertical_stripes":
        return (x / 0.048 + 0.25) % 1 < 0.5
    if kind == "check":
        return ((y / 0.088) % 1 < 0.5) ^ ((x / 0.088 + 0.25) % 1 < 0.5)
    if kind == "grid":
        return ((y / 0.07) % 1 < 0.25) | ((x / 0.07 + 0.125) % 1 < 0.25)
    if kind == "band":
        return (y > 0.255) & (y < 0.335)
    if kind == "yoke":
        return y < 0.27
    if kind == "sash":
        return np.abs(x * (1 if math.cos(yaw) >= 0 else -1) - (y - 0.33) * 0.8) < 0.035
    if kind == "logo":
        centre = 0.07 * math.sin(yaw)
        return (x - centre) ** 2 + (y - 0.29) ** 2 < 0.052**2
    if kind == "dots":
        row = np.floor(y / 0.052)
        return ((x / 0.062 + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + ((y / 0.052) % 1 - 0.5) ** 2 < 0.11
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)


def _draw_figure(
    person: Person, pose: Pose, size: tuple[int, int], centre: float, top: float, scale: float
) -> np.ndarray:
    """uint8[h, w]: the materials of a figure `scale` pixels tall, whose crown is at (centre, top) before it leans."""
    pen = _Pen(size, centre, top, scale, pose.lean)
    back_view = math.cos(pose.yaw) < -0.5
    far = -1 if math.sin(pose.yaw) >= 0 else 1
    pen.oval(SHADOW, 0.0, 0.985, 0.16, 0.022)
    _draw_arm(pen, person, pose, far)
    _draw_bag(pen, person, pose, behind=True)
    _draw_leg(pen, person, pose, far)
    _draw_leg(pen, person, pose, -far)
    if not back_view:
        _draw_long_hair(pen, person, pose)
    _draw_torso(pen, person, pose)
    if person.bag == "backpack":
        _draw_bag(pen, person, pose, behind=False)
    _draw_arm(pen, person, pose, -far)
    if person.bag == "shoulder_bag":
        _draw_bag(pen, person, pose, behind=False)
    if back_view:
        _draw_long_hair(pen, person, pose)
    _draw_head(pen, person, pose)
    figure = np.array(pen.map)
    y = ((np.arange(size[1], dtype=np.float32) - top) / scale)[:, None]
    x = ((np.arange(size[0], dtype=np.float32) - centre) / scale)[None, :] - pose.lean * (1 - y)
    material = figure & np.uint8(SHADE - 1)
    for cloth, printed, kind, texture in (
        (TOP, TOP_PRINT, person.top_print, person.top_texture),
        (BOTTOM, BOTTOM_PRINT, person.bottom_print, person.bottom_texture),
    ):
        if texture != "smooth":
            threads = (y if texture == "ribs" else x) / 0.017 % 1 < 0.5
            figure[((material == cloth) | (material == printed)) & threads] |= WEAVE
        if kind not in ("plain", "side_stripe", "hem_band"):
            figure[(material == cloth) & _print_mask(kind, x, y, pose.yaw)] += printed - cloth  # keeps SHADE and WEAVE
    return figure


# --- places and cameras ---

_SCENE_SIZE = (720, 360)


@functools.lru_cache(maxsize=64)
def _draw_scene(seed: int, scene: int, modality: int) -> Image.Image:
    """A panorama of the place numbered `scene` as a modality sees it; an image shows a part of it."""
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
        palette[material] = tone if modality == INFRARED else _tint(tones, tone, saturation=tones.uniform(0.05, 0.5))
    picture = (255 * palette[np.asarray(place)]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5))


@dataclass(frozen=True)
class Camera:
    """How a camera renders light: exposure, cast, tone curve, fall-off, blur in pixels and noise in grey levels."""

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
    """Draw image `number` of identity `pid` in camera `camid`, which looks at the place `scene`.

    `size` is (width, height) in pixels. The image is RGB; an infrared one has three equal channels, as the real files
    have. The same arguments give the same pixels.
    """
    rng = np.random.default_rng([seed, 7, pid, camid, modality, number])
    person, camera = draw_person(seed, pid), _make_camera(seed, camid, modality)
    width, height = size
    zoom = 2 if height <= 200 else 1  # small images are drawn at twice their size, for smooth edges
    big = (width * zoom, height * zoom)

    scale = big[1] * rng.uniform(0.88, 0.97) * person.height
    top = (big[1] - scale) * rng.uniform(0.15, 0.85)
    centre = big[0] * (0.5 + rng.normal(0, 0.045))
    figure = _draw_figure(person, _draw_pose(rng), big, centre, top, scale)

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
