"""A finished run's model as Python has it: what `dist_train.load` returns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_train.errors import UseError
from dist_train.use.evaluate import evaluate
from dist_train.use.formats import export_as
from dist_train.use.pictures import OneImage, pictures
from dist_train.use.predict import BATCH_SIZE, Prediction, predict
from dist_train.use.trained import TrainedModel


class Model(TrainedModel):
    """A trained model, with what one does with it as methods.

    `class_names` are its classes by id, `recipe` is the run's, `checkpoint` the folder of its weights, and `model` the
    PyTorch module: normalised images (B, 3, S, S) to logits (B, classes), in eval mode and float32.
    """

    def predict(
        self,
        images: OneImage | Iterable[OneImage],
        *,
        top: int | None = 5,
        tags: str = "",
        tags_from_sidecars: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> list[Prediction]:
        """The classes of images with their probabilities, in the order of the images.

        images: one or several of: the path of a file or folder (with all folders below it), an encoded image as bytes,
        an image of Pillow, an array (H, W, 3) or (H, W) of uint8. top: classes named for each; None: all. tags, for a
        model that reads them: of all images. tags_from_sidecars: each image's are in the .txt or .tags beside it.
        batch_size: images decoded and computed together.

        An image that cannot be read raises nothing: its prediction has an `error`, and no names. Raises UseError for
        a folder without images, for tags that the model cannot take, and for a top or batch_size below 1.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UseError(f"predict: {name} must be a number from 1 on, not {value}")
        found = pictures(images)
        return list(predict(self, found, tags, top, tags_from_sidecars=tags_from_sidecars, batch_size=batch_size))

    def evaluate(
        self, split: str = "test", *, shards: str | None = None, batch_size: int | None = None
    ) -> dict[str, Any]:
        """How good the model is on a split: top1, top5, loss, samples and more, as `dist-train evaluate` prints them.

        shards: another set of the same classes; None: the run's. batch_size: samples of one pass; None: the run's.
        Raises UseError where the set is not the one that it was trained on.
        """
        figures, _ = evaluate(self, split, shards, batch_size)
        return figures

    def export(self, file: str | Path) -> str:
        """Write the model for other programs, as `dist-train export` does: FILE.onnx, FILE.safetensors or a FOLDER in
        timm's format. Returns how it is loaded, in words. Raises UseError for any other target."""
        return export_as(self, Path(file))
