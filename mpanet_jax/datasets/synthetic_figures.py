"""How a person of the synthetic data set stands in an image: a pose, and the figure as a map of materials.

Body coordinates: y is 0 at the crown and 1 at the soles, x is 0 on the body's axis, both in units of the body's height.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mpanet_jax.datasets.synthetic_people import (
    BAG,
    BAG_FLAP,
    BOTTOM,
    BOTTOM_PRINT,
    COVERED_LEG,
    EYE,
    GLASSES,
    HAIR,
    HAT,
    HAT_BAND,
    INNER,
    NOTHING,
    SCARF,
    SHADE,
    SHADOW,
    SHOE,
    SKIN,
    SOLE,
    TOP,
    TOP_PRINT,
    WEAVE,
    Person,
)


@dataclass(frozen=True)
class Pose:
    """How a person stands in one image.

    Attributes:
      yaw: radians; 0 faces the camera, π/2 to the right of the image, π away from the camera.
      phase: of the stride, in radians.
      stride: how far the legs swing at most, in radians.
      lean: how far the crown is beside the soles, in body heights.
    """

    yaw: float
    phase: float
    stride: float
    lean: float


def draw_pose(rng: np.random.Generator) -> Pose:
    """A random pose; most people face the camera, turn their back to it, or walk past it."""
    yaw = rng.choice([0, 0.5, 1, 1.5], p=[0.35, 0.2, 0.25, 0.2]) * math.pi + rng.normal(0, 0.22)
    return Pose(yaw, rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.5), rng.normal(0, 0.012))


class _Pen:
    """Draws materials, in body coordinates, on a map of materials."""

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


def draw_figure(
    person: Person, pose: Pose, size: tuple[int, int], centre: float, top: float, scale: float
) -> np.ndarray:
    """Draws a figure as a map of materials.

    Args:
      person: who it is.
      pose: how they stand.
      size: (width, height) of the map in pixels.
      centre, top: the pixel of the crown, before the figure leans.
      scale: the figure's height in pixels.

    Returns:
      uint8[height, width]: a material for each pixel, with the bits SHADE and WEAVE.
    """
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
