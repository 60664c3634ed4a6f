"""Where in an image a model looks: what it loses when a part is covered.

Occlusion (Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks", section 4.2): a window of the
image's mean colour is put over one place after the other, and each place counts for as much as the class's
log-probability falls. It asks the model and nothing inside of it, so it is the same for every backbone and every head,
and what it shows is what happens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from dist_train.data.loader import Batch
from dist_train.train.evaluate import Forward

GRID = 8
"""Cells along a side; a window covers 2 x 2 of them, so that each place is covered by up to four windows."""


@torch.no_grad()
def find_importance(forward: Forward, batch: Batch, class_id: int, of_tags: bool = False) -> NDArray[np.float64]:
    """How much each cell of an image counts for a class: (GRID, GRID), by how many nats the log-probability falls, on
    average over the windows that cover the cell. Negative where the class gains.

    batch: of one image, (1, 3, S, S), normalised. of_tags: logits are of tags, each on its own, not of classes.
    """
    image = batch.images
    side = image.shape[-1]
    edges = [round(side * i / GRID) for i in range(GRID + 1)]
    mean = image.mean(dim=(2, 3), keepdim=True)
    places = [(row, column) for row in range(GRID - 1) for column in range(GRID - 1)]

    def log_probability(batch: Batch) -> torch.Tensor:
        logits = forward(batch).float()
        return (functional.logsigmoid(logits) if of_tags else logits.log_softmax(dim=1))[:, class_id]

    covered = image.repeat(len(places), 1, 1, 1)
    for i, (row, column) in enumerate(places):
        covered[i, :, edges[row] : edges[row + 2], edges[column] : edges[column + 2]] = mean[0]
    falls = log_probability(batch) - log_probability(_with_images(batch, covered))
    total, count = np.zeros((GRID, GRID)), np.zeros((GRID, GRID))
    for (row, column), fall in zip(places, falls.tolist(), strict=True):
        total[row : row + 2, column : column + 2] += fall
        count[row : row + 2, column : column + 2] += 1
    return total / count


def _with_images(batch: Batch, images: torch.Tensor) -> Batch:
    """The batch of one image with others in its place, its text with each of them."""
    several = len(images)
    repeated = {name: getattr(batch, name).repeat(several) for name in ("labels", "weights", "samples")}
    if batch.text_ids is not None and batch.text_mask is not None:
        repeated |= {"text_ids": batch.text_ids.repeat(several, 1), "text_mask": batch.text_mask.repeat(several, 1)}
    return replace(batch, images=images, **repeated)


def overlay(pixels: NDArray[np.uint8], importance: NDArray[np.float64], side: int = 480) -> Image.Image:
    """An image (S, S, 3) with the cells that count in red, the more the redder; grey where nothing does."""
    strength = np.clip(importance, 0, None)
    strength = strength / strength.max() if strength.max() > 0 else strength
    heat = Image.fromarray((255 * strength).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    share = np.asarray(heat, np.float32)[..., None] / 255
    picture = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    base = grey + share * (picture - grey)
    red = np.array([230, 30, 30], np.float32)
    return Image.fromarray((base + 0.5 * share * (red - base)).clip(0, 255).astype(np.uint8))
