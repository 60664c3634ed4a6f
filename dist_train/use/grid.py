"""A picture of a finished run's predictions."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import wrap

import torch
from torch import Tensor

from dist_train.data.loader import Batch, EvalLoader
from dist_train.errors import WorkError, written
from dist_train.files import write_atomically
from dist_train.train.pictures import contact_sheet, to_pixels
from dist_train.use.multilabel import captions, targets_of
from dist_train.use.trained import TrainedModel, set_to_look_at


def grid(trained: TrainedModel, split: str = "test", shards: str | None = None, output: Path | None = None) -> Path:
    """Draw the first 48 samples of the split, each with its prediction and its class, or with the tags that are right,
    wrong and missed. `shards build` has shuffled a split; tars that were adopted have their own order. Returns the
    picture's file.

    output: a PNG file; None: RUN/predictions.png. The others are as for `evaluate`.
    """
    data, manifest = set_to_look_at(trained, shards)
    targets = targets_of(trained)
    loader = EvalLoader(
        data, manifest, split, trained.place, batch_size=48, tokenizer=trained.tokenizer, tag_targets=targets
    )
    batch = next(iter(loader), None)
    if batch is None:
        raise WorkError(f"the split {split} holds no samples to draw")
    with torch.no_grad():
        logits = trained.forward(batch)
    pixels = list(to_pixels(batch.images, data))
    if batch.tags is None:
        picture = contact_sheet(pixels, _class_captions(trained, logits, batch))
    else:
        side, most = 256, 3  # most: rows of text for each line
        wrapped = [
            [(row, colour) for text, colour in lines for row in wrap(text, side // 6 - 1)[:most]]
            for lines in captions(trained, logits, batch.tags)
        ]
        picture = contact_sheet(pixels, wrapped, columns=4, side=side)
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
