"""The classes of image files by a finished run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_train.data.images import BadImage
from dist_train.data.loader import Batch
from dist_train.data.reader import ImageReader
from dist_train.data.tags import tag_line
from dist_train.errors import UseError, WorkError
from dist_train.use.multilabel import probabilities_of, tags_above, thresholds_for
from dist_train.use.trained import TrainedModel


def predict(
    trained: TrainedModel, images: Iterable[Path], tags: str = "", top: int = 5, threshold: str | None = None
) -> Iterator[tuple[Path, list[tuple[str, float]] | WorkError]]:
    """Each image file with its `top` most probable classes and their probabilities, or with why it has none.

    tags: of all the images, for a model that reads them. threshold: for a model that predicts tags, instead of `top`:
    all that are at or above a probability, as `0.5`, or above their own that was chosen on val, `best`.
    """
    thresholds = None if threshold is None else thresholds_for(trained, threshold)
    if tags and trained.tokenizer is None:
        raise UseError(f"--tags: the model of {trained.run} reads no tags (model.text_tokens is 0)")
    tags = _known_tags(trained, tags)
    reader = ImageReader(trained.recipe.data, trained.place.device_id)
    for path in images:
        try:
            probability = _predict_file(trained, reader, path, tags)
        except WorkError as error:
            yield path, error
            continue
        if thresholds is not None:
            yield path, tags_above(trained, probability, thresholds)
            continue
        best = probability.topk(min(top, len(trained.class_names)))
        names = [trained.class_names[number] for number in best.indices.tolist()]
        yield path, list(zip(names, best.values.tolist(), strict=True))


def _known_tags(trained: TrainedModel, text: str) -> str:
    """--tags as the model reads them; says on stderr where the model is left without any."""
    tags = tag_line(text)
    if trained.tokenizer is None:
        return tags
    if not tags:
        print("warning: the model reads tags and is given none; say them with --tags", file=sys.stderr)
    elif trained.tokenizer.without_known_tags([tags], trained.tokenizer([tags])[0]):
        print(f"warning: the model knows none of the tags '{tags}'", file=sys.stderr)
    return tags


@torch.no_grad()
def _predict_file(trained: TrainedModel, reader: ImageReader, path: Path, tags: str) -> Tensor:
    """(classes,) probabilities. Raises WorkError naming a file that is no readable image."""
    try:
        images = reader.read(path.read_bytes())
    except OSError as error:
        raise WorkError(f"{path}: {error.strerror}") from None
    except BadImage as problem:
        raise WorkError(f"{path}: not an image that can be used ({problem})") from None
    ids = mask = None
    if trained.tokenizer is not None:
        ids, mask = (part.to(images.device) for part in trained.tokenizer([tags]))
    none = torch.zeros(1, dtype=torch.int64)
    batch = Batch(images, none, torch.ones(1), ids, mask, none.numpy())
    return probabilities_of(trained, trained.forward(batch))[0].cpu()
