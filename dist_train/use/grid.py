"""A picture of a finished run's predictions."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from dist_train.data.loader import EvalLoader
from dist_train.errors import written
from dist_train.files import write_atomically
from dist_train.train.pictures import contact_sheet, to_pixels
from dist_train.use.trained import TrainedModel, set_to_look_at


def grid(trained: TrainedModel, split: str = "test", shards: str | None = None, output: Path | None = None) -> Path:
    """Draw 48 samples spread over the split, each with its prediction and its class. Returns the picture's file.

    output: a PNG file; None: RUN/predictions.png. The others are as for `evaluate`.
    """
    data, manifest = set_to_look_at(trained, shards)
    loader = EvalLoader(data, manifest, split, trained.place, batch_size=48, tokenizer=trained.tokenizer)
    batch = next(iter(loader))
    with torch.no_grad():
        predicted = trained.forward(batch).argmax(dim=1).tolist()
    captions = []
    for label, guess in zip(batch.labels.tolist(), predicted, strict=True):
        colour = "darkgreen" if guess == label else "crimson"
        captions.append([(trained.class_names[guess], colour), (f"is {trained.class_names[label]}", "grey")])
    picture = contact_sheet(list(to_pixels(batch.images, data)), captions)
    file = io.BytesIO()
    picture.save(file, "PNG")
    output = output or trained.run / "predictions.png"
    with written(output, "--output FILE puts it elsewhere"):
        write_atomically(output, file.getvalue())
    return output
