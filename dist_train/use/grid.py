"""A picture of a finished run's predictions."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from dist_train.data.loader import EvalLoader
from dist_train.errors import written
from dist_train.files import write_atomically
from dist_train.use.trained import TrainedModel, set_to_look_at


def grid(trained: TrainedModel, split: str = "test", shards: str | None = None, output: Path | None = None) -> Path:
    """Draw 48 samples spread over the split, each with its prediction and its class. Returns the picture's file.

    output: a PNG file; None: RUN/predictions.png. The others are as for `evaluate`.
    """
    from PIL import Image, ImageDraw

    data, manifest = set_to_look_at(trained, shards)
    loader = EvalLoader(data, manifest, split, trained.place, batch_size=48, tokenizer=trained.tokenizer)
    batch = next(iter(loader))
    with torch.no_grad():
        predicted = trained.forward(batch).argmax(dim=1).tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = ((batch.images.cpu() * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    columns, side, caption = 8, 128, 34
    picture = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * (side + caption)), "white")
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(pixels):
        x, y = i % columns * side, i // columns * (side + caption)
        picture.paste(Image.fromarray(image).resize((side, side)), (x, y))
        label = int(batch.labels[i])
        colour = "darkgreen" if predicted[i] == label else "crimson"
        draw.text((x + 3, y + side + 2), trained.class_names[predicted[i]][:20], fill=colour)
        draw.text((x + 3, y + side + 17), f"is {trained.class_names[label][:17]}", fill="grey")
    file = io.BytesIO()
    picture.save(file, "PNG")
    output = output or trained.run / "predictions.png"
    with written(output, "--output FILE puts it elsewhere"):
        write_atomically(output, file.getvalue())
    return output
