"""Outlined shapes on a Pillow image, given in coordinates of their own: what the demo's pictures are drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

Colour = tuple[int, int, int]
Points = NDArray[np.float64]

BLACK: Colour = (24, 20, 28)
WHITE: Colour = (252, 250, 246)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour `share` (0 to 1) of the way from `first` to `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def polygon(*points: tuple[float, float]) -> Points:
    """The points as an (n, 2) array."""
    return np.array(points, np.float64)


def smooth(*points: tuple[float, float], closed: bool = True, steps: int = 6) -> Points:
    """A Catmull-Rom curve through the points (Catmull, Rom 1974), `steps` points per piece; closed by default."""
    knots = np.array(points, np.float64)
    if closed:
        padded = np.concatenate([knots[-1:], knots, knots[:2]])
    else:
        padded = np.concatenate([knots[:1], knots, knots[-1:]])
    before, start, end, after = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(steps) / steps)[None, :, None]
    before, start, end, after = (knot[:, None, :] for knot in (before, start, end, after))
    curve = 0.5 * (
        2 * start
        + (end - before) * t
        + (2 * before - 5 * start + 4 * end - after) * t**2
        + (3 * start - before - 3 * end + after) * t**3
    ).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, knots[-1:]])


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> Points:
    """An ellipse round (x, y), or its arc from `start` to `end` degrees (0 is right, 90 is down)."""
    steps = 24 if abs(end - start) > 200 else 14
    angle = np.radians(np.linspace(start, end, steps, endpoint=abs(end - start) < 360))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def both_sides(points: Points) -> tuple[Points, Points]:
    """The points and their mirror image, reflected left to right."""
    return points, points * (-1.0, 1.0)


@dataclass(frozen=True)
class Pen:
    """Draws shapes given in a frame's coordinates: pixel = matrix @ point + offset.

    line_width is in pixels; 0 draws no outlines.
    """

    draw: ImageDraw.ImageDraw
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    line_colour: Colour
    line_width: float

    def moved(
        self, x: float = 0.0, y: float = 0.0, rotate: float = 0.0, scale: float = 1.0, mirror: bool = False
    ) -> Pen:
        """A pen whose frame is mirrored, scaled, turned by `rotate` radians and then shifted to (x, y) of this one."""
        cos, sin = np.cos(rotate) * scale, np.sin(rotate) * scale
        turn = np.array([[-cos if mirror else cos, -sin], [-sin if mirror else sin, cos]])
        return replace(self, matrix=self.matrix @ turn, offset=self.matrix @ (x, y) + self.offset)

    def _pixels(self, points: Points) -> list[tuple[float, float]]:
        return list(map(tuple, (points @ self.matrix.T + self.offset).tolist()))

    def fill(self, points: Points, colour: Colour, outline: bool = True) -> None:
        """A filled polygon, with an outline in the pen's line unless told otherwise."""
        pixels = self._pixels(points)
        self.draw.polygon(pixels, fill=colour)
        if outline and self.line_width:
            pixels.append(pixels[0])
            self.draw.line(pixels, fill=self.line_colour, width=round(self.line_width))

    def fill_all(self, shapes: Sequence[Points], colour: Colour, outline: bool = True) -> None:
        """Several filled polygons of one colour."""
        for points in shapes:
            self.fill(points, colour, outline)

    def stroke(self, points: Points, colour: Colour, width: float) -> None:
        """An open line; `width` in the frame's units."""
        pixels = width * abs(np.linalg.det(self.matrix)) ** 0.5
        self.draw.line(self._pixels(points), fill=colour, width=max(1, round(pixels)))
