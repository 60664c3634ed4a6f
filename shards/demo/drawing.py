"""Draws one picture of one character: background, figure, what lies before it, light; returned as JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from shards.demo.figure import Character, Pose, draw_figure
from shards.demo.pen import BLACK, WHITE, Colour, Pen, ellipse, mix, polygon, smooth

BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "bokeh", "sky", "hills", "night", "room", "sunburst")
OCCLUSIONS = ("none", "bar", "speech_bubble", "petals", "paw", "book")

_OVERSAMPLING = 2
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Scene:
    """What one picture adds to the character and its pose.

    background, occlusion: one of BACKGROUNDS and OCCLUSIONS. colours: three, of the background. noise: uniform numbers
    in [0, 1) that place its details, at least 64. line_colour; line_width: in figure units, 0 for no outlines. gain:
    brightness of red, green and blue. slope: how much brighter the right and the bottom edge are than the middle.
    """

    background: str
    occlusion: str
    colours: tuple[Colour, Colour, Colour]
    noise: tuple[float, ...]
    line_colour: Colour
    line_width: float
    gain: tuple[float, float, float]
    slope: tuple[float, float]


def draw_picture(character: Character, pose: Pose, scene: Scene, size: int) -> bytes:
    """The picture as a JPEG of size x size pixels. It depends on the arguments (and Pillow's version) alone."""
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), scene.colours[0])
    half = side / 2
    line = max(1.0, scene.line_width * half) if scene.line_width else 0.0
    pen = Pen(ImageDraw.Draw(image), np.eye(2) * half, np.array([half, half]), scene.line_colour, line)
    _draw_background(pen, scene)
    draw_figure(pen, character, pose)
    _draw_occlusion(pen, scene)
    lit = _light(np.asarray(image.reduce(_OVERSAMPLING)), scene.gain, scene.slope)
    stream = io.BytesIO()
    Image.fromarray(lit).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _light(pixels: np.ndarray, gain: Sequence[float], slope: Sequence[float]) -> np.ndarray:
    """Brighten each channel by its gain, more towards one side of the picture than the other."""
    across = np.linspace(-1, 1, len(pixels), dtype=np.float32)
    field = 1 + slope[0] * across[None, :, None] + slope[1] * across[:, None, None]
    return np.clip(pixels * (field * np.array(gain, np.float32)), 0, 255).astype(np.uint8)


def _draw_gradient(pen: Pen, top: Colour, bottom: Colour, steps: int = 24) -> None:
    for step in range(steps):
        y = -1 + 2 * step / steps
        slab = polygon((-1, y), (1, y), (1, y + 2.2 / steps), (-1, y + 2.2 / steps))
        pen.fill(slab, mix(top, bottom, step / (steps - 1)), outline=False)


def _draw_background(pen: Pen, scene: Scene) -> None:
    """Cover the picture; without outlines, so that the figure stands out."""
    first, second, third = scene.colours
    noise = scene.noise
    match scene.background:
        case "gradient":
            _draw_gradient(pen, first, second)
        case "stripes":
            turned = pen.moved(rotate=np.pi * noise[0])
            width = 0.12 + 0.2 * noise[1]
            for x in np.arange(-1.5, 1.5, 2 * width):
                band = polygon((x, -1.5), (x + width, -1.5), (x + width, 1.5), (x, 1.5))
                turned.fill(band, second, outline=False)
        case "checks":
            width = 0.2 + 0.2 * noise[0]
            count = int(2 / width) + 1
            for row in range(count):
                for column in range(row % 2, count, 2):
                    x, y = column * width - 1, row * width - 1
                    square = polygon((x, y), (x + width, y), (x + width, y + width), (x, y + width))
                    pen.fill(square, second, outline=False)
        case "bokeh":
            for i in range(14):
                x, y, radius = 2 * noise[3 * i] - 1, 2 * noise[3 * i + 1] - 1, 0.08 + 0.2 * noise[3 * i + 2]
                pen.fill(ellipse(x, y, radius, radius), mix(first, (second, third)[i % 2], 0.6), outline=False)
        case "sky":
            _draw_gradient(pen, mix((70, 140, 230), first, 0.5), mix(WHITE, second, 0.3))
            for i in range(4):
                _draw_cloud(pen, 2 * noise[2 * i] - 1, 1.2 * noise[2 * i + 1] - 0.9, 0.10 + 0.08 * noise[20 + i])
        case "hills":
            _draw_gradient(pen, mix(WHITE, first, 0.5), WHITE)
            for i, colour in enumerate((second, mix(second, third, 0.5), third)):
                x, y = 2 * noise[2 * i] - 1, 0.5 + 0.25 * i + 0.3 * noise[2 * i + 1]
                pen.fill(ellipse(x, y, 1.3, 0.7), colour, outline=False)
        case "night":
            _draw_gradient(pen, mix(first, BLACK, 0.8), mix(second, BLACK, 0.5))
            for i in range(20):
                x, y, radius = 2 * noise[2 * i] - 1, 2 * noise[2 * i + 1] - 1, 0.012 + 0.03 * noise[40 + i]
                pen.fill(polygon((x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)), WHITE, False)
            pen.fill(ellipse(2 * noise[60] - 1, -0.6 + 0.4 * noise[61], 0.18, 0.18), (250, 240, 190), outline=False)
        case "room":
            x, y = 1.2 * noise[0] - 1, 0.6 * noise[1] - 0.9
            frame, floor = mix(second, WHITE, 0.6), 0.55 + 0.3 * noise[2]
            pen.fill(polygon((-1, floor), (1, floor), (1, 1), (-1, 1)), third, outline=False)
            pen.fill(polygon((x, y), (x + 0.8, y), (x + 0.8, y + 0.9), (x, y + 0.9)), frame, outline=False)
            for left in (x + 0.05, x + 0.425):
                for top in (y + 0.05, y + 0.475):
                    pane = polygon((left, top), (left + 0.325, top), (left + 0.325, top + 0.375), (left, top + 0.375))
                    pen.fill(pane, second, outline=False)
        case "sunburst":
            centre = pen.moved(noise[0] - 0.5, noise[1] - 0.5, rotate=noise[2])
            rays = 8 + int(8 * noise[3])
            for angle in 2 * np.pi * np.arange(rays) / rays:
                edge = angle + np.pi / rays
                ray = polygon((0, 0), (3 * np.cos(angle), 3 * np.sin(angle)), (3 * np.cos(edge), 3 * np.sin(edge)))
                centre.fill(ray, second, outline=False)


def _draw_cloud(pen: Pen, x: float, y: float, radius: float) -> None:
    for dx, dy, share in ((-1.1, 0.2, 0.8), (0.0, -0.2, 1.1), (1.1, 0.1, 0.9), (2.0, 0.3, 0.6)):
        pen.fill(ellipse(x + dx * radius, y + dy * radius, share * radius, 0.8 * share * radius), WHITE, outline=False)


def _draw_occlusion(pen: Pen, scene: Scene) -> None:
    """Draw what lies before the figure: it hides some of it, seldom most of it."""
    noise = scene.noise[::-1]
    colour = scene.colours[2]
    match scene.occlusion:
        case "bar":
            bar = pen.moved(1.4 * noise[0] - 0.7, 1.4 * noise[1] - 0.7, np.pi * noise[2])
            width = 0.05 + 0.07 * noise[3]
            bar.fill(polygon((-3, -width), (3, -width), (3, width), (-3, width)), colour)
        case "speech_bubble":
            side = 1 if noise[0] < 0.5 else -1
            bubble = pen.moved(side * (0.55 + 0.2 * noise[1]), -0.7 + 0.5 * noise[2], mirror=side < 0)
            bubble.fill(polygon((-0.16, 0.10), (0.05, 0.20), (-0.30, 0.38)), WHITE)
            bubble.fill(ellipse(0.0, 0.0, 0.34, 0.24), WHITE)
            bubble.fill(polygon((-0.16, 0.10), (0.04, 0.18), (-0.12, 0.06)), WHITE, outline=False)
            for row in (-0.09, 0.0, 0.09):
                bubble.stroke(polygon((-0.2, row), (0.2 - 0.15 * noise[3], row)), BLACK, 0.025)
        case "petals":
            for i in range(9):
                petal = pen.moved(2 * noise[4 * i] - 1, 2 * noise[4 * i + 1] - 1, 6.3 * noise[4 * i + 2])
                length = 0.10 + 0.06 * noise[4 * i + 3]
                petal.fill(smooth((-length, 0), (0, -0.5 * length), (length, 0), (0, 0.5 * length), steps=4), colour)
        case "paw":
            side = 1 if noise[0] < 0.5 else -1
            paw = pen.moved(side * (0.40 + 0.3 * noise[1]), 0.45 + 0.35 * noise[2], side * 0.3, mirror=side < 0)
            paw.fill(polygon((-0.15, 0.0), (0.15, 0.0), (0.22, 1.5), (-0.22, 1.5)), colour)
            paw.fill(ellipse(0.0, 0.0, 0.22, 0.21), colour)
            for x, y in ((-0.11, -0.10), (0.0, -0.14), (0.11, -0.10)):
                paw.fill(ellipse(x, y, 0.04, 0.05), mix(colour, BLACK, 0.5), outline=False)
            paw.fill(ellipse(0.0, 0.05, 0.10, 0.08), mix(colour, BLACK, 0.5), outline=False)
        case "book":
            book = pen.moved(1.0 * noise[0] - 0.5, 0.85, 0.4 * noise[1] - 0.2)
            book.fill(polygon((-0.42, -0.26), (0.42, -0.26), (0.42, 0.6), (-0.42, 0.6)), colour)
            book.fill(polygon((-0.30, -0.16), (0.30, -0.16), (0.30, 0.02), (-0.30, 0.02)), mix(colour, WHITE, 0.7))
