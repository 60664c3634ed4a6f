"""A picture of a finished run's predictions."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import wrap

import torch
from torch import Tensor

from dist_train.data.loader import Batch, EvalLoader
from dist_train.errors import written
from dist_train.files import write_atomically
from dist_train.use.multilabel import captions, targets_of
from dist_train.use.trained import TrainedModel, set_to_look_at


def grid(trained: TrainedModel, split: str = "test", shards: str | None = None, output: Path | None = None) -> Path:
    """Draw 48 samples spread over the split, each with its prediction and its class, or with the tags that are
    right, wrong and missed. Returns the picture's file.

    output: a PNG file; None: RUN/predictions.png. The others are as for `evaluate`.
    """
    from PIL import Image, ImageDraw

    data, manifest = set_to_look_at(trained, shards)
    targets = targets_of(trained)
    loader = EvalLoader(
        data, manifest, split, trained.place, batch_size=48, tokenizer=trained.tokenizer, tag_targets=targets
    )
    batch = next(iter(loader))
    with torch.no_grad():
        logits = trained.forward(batch)
    lines = _class_captions(trained, logits, batch) if batch.tags is None else captions(trained, logits, batch.tags)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = ((batch.images.cpu() * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    columns, side, most = (8, 128, 1) if batch.tags is None else (4, 256, 3)  # most: rows of text for each line
    width = side // 6 - 1  # characters
    caption = 4 + 15 * most * len(lines[0])
    picture = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * (side + caption)), "white")
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(pixels):
        x, y = i % columns * side, i // columns * (side + caption)
        picture.paste(Image.fromarray(image).resize((side, side)), (x, y))
        wrapped = [
            (row[:width], colour)
            for text, colour in lines[i]
            for row in (wrap(text, width)[:most] if most > 1 else [text])
        ]
        for row, (text, colour) in enumerate(wrapped):
            draw.text((x + 3, y + side + 2 + 15 * row), text, fill=colour)
    file = io.BytesIO()
    picture.save(file, "PNG")
    output = output or trained.run / "predictions.png"
    with written(output, "--output FILE puts it elsewhere"):
        write_atomically(output, file.getvalue())
    return output


def _class_captions(trained: TrainedModel, logits: Tensor, batch: Batch) -> list[list[tuple[str, str]]]:
    """For each image the lines of its caption, each with its colour."""
    names = trained.class_names
    return [
        [(names[guess], "darkgreen" if guess == label else "crimson"), (f"is {names[label]}", "grey")]
        for guess, label in zip(logits.argmax(dim=1).tolist(), batch.labels.tolist(), strict=True)
    ]
