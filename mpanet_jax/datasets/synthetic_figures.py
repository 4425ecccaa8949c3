"""A person of the synthetic data set in a pose, as a map of materials."""

import math

import numpy as np

from mpanet_jax.datasets.synthetic_body import Pose, draw_arm, draw_bag, draw_head, draw_leg, draw_long_hair, draw_torso
from mpanet_jax.datasets.synthetic_pen import Pen
from mpanet_jax.datasets.synthetic_people import BOTTOM, BOTTOM_PRINT, SHADE, SHADOW, TOP, TOP_PRINT, WEAVE, Person


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
    pen = Pen(size, centre, top, scale, pose.lean)
    back_view = math.cos(pose.yaw) < -0.5
    far = -1 if math.sin(pose.yaw) >= 0 else 1
    pen.oval(SHADOW, 0.0, 0.985, 0.16, 0.022)
    draw_arm(pen, person, pose, far)
    draw_bag(pen, person, pose, behind=True)
    draw_leg(pen, person, pose, far)
    draw_leg(pen, person, pose, -far)
    if not back_view:
        draw_long_hair(pen, person, pose)
    draw_torso(pen, person, pose)
    if person.bag == "backpack":
        draw_bag(pen, person, pose, behind=False)
    draw_arm(pen, person, pose, -far)
    if person.bag == "shoulder_bag":
        draw_bag(pen, person, pose, behind=False)
    if back_view:
        draw_long_hair(pen, person, pose)
    draw_head(pen, person, pose)
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
