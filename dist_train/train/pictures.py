"""Pictures of what a model sees and confuses, drawn with Pillow alone: for TensorBoard, and for files of `use`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_train.config import DataConfig

MOST_CLASSES = 2000
"""A matrix of more classes is not drawn, nor written cell by cell."""
_NUMBERED, _SIDE, _LARGEST_CELL = 50, 1200, 30
"""Classes up to which cells have numbers; pixels of a large matrix; of a cell of a small one."""
_RIGHT, _WRONG = (20, 80, 160), (200, 40, 20)
_NAME = 22
"""Letters of a class's name."""


def to_pixels(images: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """Normalised images (B, 3, S, S) as they look: (B, S, S, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = ((images.detach().float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def contact_sheet(
    pixels: Sequence[NDArray[np.uint8]],
    captions: Sequence[Sequence[tuple[str, str]]],
    columns: int = 8,
    side: int = 128,
) -> Image.Image:
    """Images (H, W, 3) uint8 in rows, each above its lines of (text, colour)."""
    lines = max((len(caption) for caption in captions), default=0)
    height = side + 4 + 15 * lines
    sheet = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        x, y = i % columns * side, i // columns * height
        sheet.paste(Image.fromarray(image).resize((side, side)), (x, y))
        for line, (text, colour) in enumerate(caption):
            draw.text((x + 3, y + side + 2 + 15 * line), text[: side // 6 - 1], fill=colour)
    return sheet


def confusion_picture(counts: NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """A confusion matrix (C, C), samples of true class (row) and predicted class (column), at most MOST_CLASSES.

    A cell is the darker the larger its share of its row (by the square root, so that single errors among thousands of
    classes are seen), blue on the diagonal and red beside it. Up to 50 classes have their numbers in it. As many names
    as there is room for stand at both sides; one that the font lacks letters for is called by its class id.
    """
    classes = len(counts)
    cell = min(_LARGEST_CELL, max(2, _SIDE // classes)) if classes <= _SIDE else 1
    share = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    faintest = 0.25 if cell < 8 else 0.12  # of a cell that is not empty
    depth = np.where(counts > 0, np.maximum(share, faintest), 0)[..., None]
    colour = np.where(np.eye(classes, dtype=bool)[..., None], _RIGHT, _WRONG)
    pixels = (255 + depth * (colour - 255)).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    font = ImageFont.load_default(11)
    shown = [_drawable(name, number) for number, name in enumerate(names)]
    left = 12 + round(max(font.getlength(name) for name in shown))
    top = left + 18
    picture = Image.new("RGB", (left + len(pixels) + 8, top + len(pixels) + 8), "white")
    draw = ImageDraw.Draw(picture)
    picture.paste(Image.fromarray(pixels), (left, top))
    draw.rectangle((left - 1, top - 1, left + len(pixels), top + len(pixels)), outline="grey")
    draw.text((4, 4), "rows: true class, columns: predicted", fill="black", font=font)
    step = -(-14 // cell)
    for number in range(0, classes, step):
        at = number * cell + cell // 2
        draw.text((left - 5, top + at), shown[number], fill="black", font=font, anchor="rm")
        label = Image.new("RGB", (left - 8, 14), "white")
        ImageDraw.Draw(label).text((0, 7), shown[number], fill="black", font=font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (left + at - 7, top - 5 - label.width))
    if classes <= _NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if share[row, column] > 0.6 else "black"
            centre = left + (column + 0.5) * cell, top + (row + 0.5) * cell
            draw.text(centre, str(counts[row, column]), fill=ink, font=font, anchor="mm")
    return picture


def _drawable(name: str, number: int) -> str:
    """A name as the font, which has the Latin letters, can draw it."""
    return name[:_NAME] if all(" " <= letter < "\u0250" for letter in name) and name else f"class {number}"
