"""Draws shapes of materials in body coordinates.

Body coordinates: y is 0 at the crown and 1 at the soles, x is 0 on the body's axis, both in units of the body's height.
"""

import math

from PIL import Image, ImageDraw

from mpanet_jax.datasets.synthetic_people import NOTHING, SHADE


class Pen:
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


def along(points: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    """The first `share` of a path of two equally long parts."""
    (x0, y0), (x1, y1), (x2, y2) = points
    if share <= 0.5:
        t = 2 * share
        return [points[0], (x0 + t * (x1 - x0), y0 + t * (y1 - y0))]
    t = 2 * share - 1
    return [points[0], points[1], (x1 + t * (x2 - x1), y1 + t * (y2 - y1))]
