"""The parts of a figure of the synthetic data set, each drawn in a pose: legs, arms, torso, bag, hair and head.

The numbers are body coordinates (`synthetic_pen.py`).
"""

import math
from dataclasses import dataclass

import numpy as np

from mpanet_jax.datasets.synthetic_pen import Pen, along
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
    SCARF,
    SHADE,
    SHOE,
    SKIN,
    SOLE,
    TOP,
    TOP_PRINT,
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


def draw_leg(pen: Pen, person: Person, pose: Pose, side: int) -> None:
    """A leg with trousers and shoe; `side` is -1 or 1."""
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
        cloth = along(path, covered)
        pen.limb(BOTTOM | far, cloth, widths[: len(cloth)])
        if person.bottom_print == "side_stripe":
            pen.limb(BOTTOM_PRINT | far, cloth, [0.012] * len(cloth), outline=False)
        if person.bottom_print == "hem_band":
            band = [along(path, covered - 0.16)[-1], cloth[-1]]
            pen.limb(BOTTOM_PRINT | far, band, [0.045 * b] * 2, outline=False)
    if person.shoes:
        t = person.shoes
        start = (ankle[0] + t * (knee[0] - ankle[0]), ankle[1] + t * (knee[1] - ankle[1]))
        pen.limb(SHOE | far, [start, ankle], [0.043 * b, 0.034 * b])
        pen.oval(SHOE | far, *start, 0.043 * b, 0.012)
    pen.limb(SHOE | far, [(ankle[0], ankle[1] + 0.004), toe], [0.030, 0.025])


def draw_arm(pen: Pen, person: Person, pose: Pose, side: int) -> None:
    """An arm with its sleeve, and a handbag in one hand; `side` is -1 or 1."""
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
    cloth = along(path, person.sleeves)
    material = (TOP_PRINT if person.contrast_sleeves else TOP) | far
    pen.limb(material, cloth, [0.036 * b, 0.036 * b, 0.033 * b][: len(cloth)])
    if person.bag == "handbag" and side == 1:
        pen.limb(BAG, [(wrist[0], wrist[1] + 0.01), (wrist[0], wrist[1] + 0.05)], [0.008, 0.008])
        x, y = wrist[0], wrist[1] + 0.05
        pen.shape(BAG, (x - 0.05, y), (x + 0.05, y), (x + 0.062, y + 0.095), (x - 0.062, y + 0.095))
        pen.shape(BAG_FLAP, (x - 0.05, y), (x + 0.05, y), (x + 0.053, y + 0.03), (x - 0.053, y + 0.03), outline=False)


def draw_torso(pen: Pen, person: Person, pose: Pose) -> None:
    """The trunk with skirt or waistband, top, jacket and scarf."""
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


def draw_bag(pen: Pen, person: Person, pose: Pose, behind: bool) -> None:
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


def draw_long_hair(pen: Pen, person: Person, pose: Pose) -> None:
    """The hair that hangs below the head: drawn before the head, and before the torso unless the back is seen."""
    sin = math.sin(pose.yaw)
    back = -0.03 * sin
    if person.hair == "bob":
        pen.limb(HAIR, [(back, 0.06), (back, 0.145)], [0.062, 0.060])
    elif person.hair == "long":
        pen.limb(HAIR, [(back, 0.06), (back * 1.6, 0.19), (back * 1.6, 0.30)], [0.060, 0.066, 0.055])
    elif person.hair == "ponytail":
        pen.limb(HAIR, [(2.2 * back, 0.05), (3.2 * back, 0.12), (3.0 * back, 0.25)], [0.022, 0.030, 0.014])


def draw_head(pen: Pen, person: Person, pose: Pose) -> None:
    """The head with face, hair, glasses and hat."""
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
