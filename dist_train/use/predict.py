"""The classes of images by a finished run: decoded in batches as its evaluation does it, answered in their order."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.data.background import Batch, made_ahead
from dist_train.data.device import decoding_gpu
from dist_train.data.folder import tags_beside
from dist_train.data.images import BadImage
from dist_train.data.reader import ImageReader
from dist_train.data.remote import IsStopped
from dist_train.data.tags import tag_line
from dist_train.errors import UseError, written
from dist_train.files import opened_atomically
from dist_train.train.engine import torch_device
from dist_train.use.multilabel import probabilities_of, tags_above, thresholds_for
from dist_train.use.pictures import Picture
from dist_train.use.trained import TrainedModel

BATCH_SIZE = 32
"""Images decoded and computed together. Whole photos of a camera take 36 MB each when decoded."""


@dataclass(frozen=True)
class Prediction:
    """What a model makes of one image.

    path: its file; None for an image that was in memory. names: its most probable classes, the most probable first.
    probabilities: theirs, in [0, 1]. error: why the image has no prediction, in one line; names is then empty.
    """

    path: Path | None
    names: list[str]
    probabilities: list[float]
    error: str | None = None


def predict(
    trained: TrainedModel,
    pictures: Sequence[Picture],
    tags: str = "",
    top: int | None = 5,
    *,
    threshold: str | None = None,
    tags_from_sidecars: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Prediction]:
    """The prediction for each picture, in order, as it is made: a batch or two are in memory. A bad one costs itself.

    tags: of all the images, for a model that reads them. tags_from_sidecars: each image's are in the .txt or .tags
    beside it; how many have none is said on stderr in the end. top: classes named; None: all. threshold: for a model
    that predicts tags, instead of `top`: all that are at or above a probability, as `0.5`, or above their own that was
    chosen on val, `best`.
    Raises UseError for tags that the model cannot take.
    """
    thresholds = None if threshold is None else thresholds_for(trained, threshold)
    _check_tags(trained, tags, tags_from_sidecars)
    line = _known_tags(trained, tags, tags_from_sidecars)
    reading = _Reading(trained, pictures, line, tags_from_sidecars, max(1, min(batch_size, len(pictures))))
    done = 0
    for batch in made_ahead(reading.batches, trained.recipe.data.prefetch, trained.place.device_id):
        for row in _probabilities(trained, batch):
            if done == len(pictures):  # the rest of the last batch
                break
            problem = reading.problems.pop(done, None)
            if problem is not None:
                found: list[tuple[str, float]] = []
            elif thresholds is not None:
                found = tags_above(trained, row, thresholds)
            else:
                found = _most_probable(trained, row, top)
            names, values = [name for name, _ in found], [probability for _, probability in found]
            yield Prediction(pictures[done].path, names, values, problem)
            done += 1
    reading.warn_of_missing_tags()


@torch.no_grad()
def _probabilities(trained: TrainedModel, batch: Batch) -> Tensor:
    """(B, classes), on the CPU."""
    return probabilities_of(trained, trained.forward(batch)).cpu()


def _most_probable(trained: TrainedModel, probabilities: Tensor, top: int | None) -> list[tuple[str, float]]:
    classes = len(trained.class_names)
    best = probabilities.topk(min(top or classes, classes))
    names = [trained.class_names[number] for number in best.indices.tolist()]
    return list(zip(names, best.values.tolist(), strict=True))


class _Reading:
    """Makes the batches, in a thread of its own, and notes what is wrong with single images.

    tags: the line of all images. batch_size: of every batch, also of the last, which is filled up.
    """

    def __init__(
        self, trained: TrainedModel, pictures: Sequence[Picture], tags: str, sidecars: bool, batch_size: int
    ) -> None:
        self.trained, self.pictures, self.batch_size = trained, pictures, batch_size
        self.tags, self.sidecars = tags, sidecars
        self.problems: dict[int, str] = {}
        """Why an image, by its number, has no prediction; there before its batch is."""
        self.without_tags: list[int] = []
        self.without_known_tags: list[int] = []

    def batches(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        """All images in order, `batch_size` at a time."""
        config, device = self.trained.recipe.data, torch_device(self.trained.place)
        threads = config.threads or len(os.sched_getaffinity(0))
        reader = ImageReader(config, decoding_gpu(config, self.trained.place.device_id), self.batch_size, threads)
        none = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        try:
            for first in range(0, len(self.pictures), self.batch_size):
                some = self.pictures[first : first + self.batch_size]
                images, problems = reader.read_batch([picture.read for picture in some])
                self.problems |= {first + i: _describe(some[i], problem) for i, problem in problems.items()}
                ids, mask = self._tokens(first, some, device)
                numbers = np.arange(first, first + self.batch_size)
                yield Batch(images.to(device), none, torch.ones_like(none, dtype=torch.float32), ids, mask, numbers)
        finally:
            reader.close()

    def _tokens(
        self, first: int, some: Sequence[Picture], device: torch.device
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        tokenizer = self.trained.tokenizer
        if tokenizer is None:
            return None, None
        texts = [self.tags] * self.batch_size
        if self.sidecars:
            for i, picture in enumerate(some):
                texts[i] = self._tags_of(picture, first + i)
        ids, mask = tokenizer(texts)
        if self.sidecars:
            self.without_known_tags += [first + i for i in tokenizer.without_known_tags(texts, ids)]
        return ids.to(device), mask.to(device)

    def _tags_of(self, picture: Picture, number: int) -> str:
        try:
            text = None if picture.path is None else tags_beside(picture.path)
        except OSError:
            text = None
        if not text:
            self.without_tags.append(number)
        return text or ""

    def warn_of_missing_tags(self) -> None:
        """Say on stderr for how many images the model knew no tag."""
        for numbers, what in (
            (self.without_tags, "have no tags in a .txt or .tags beside them"),
            (self.without_known_tags, "have tags beside them of which the model knows none"),
        ):
            if numbers:
                such = self.pictures[numbers[0]].path
                print(f"warning: {len(numbers):,} of {len(self.pictures):,} images {what}, as {such}", file=sys.stderr)


def _describe(picture: Picture, problem: BadImage | OSError) -> str:
    where = f"{picture.path}: " if picture.path is not None else ""
    if isinstance(problem, BadImage):
        return f"{where}not an image that can be used ({problem})"
    return f"{where}{problem.strerror or problem}"


def _check_tags(trained: TrainedModel, tags: str, sidecars: bool) -> None:
    option = "--tags-from-sidecars" if sidecars else "--tags" if tags else ""
    if option and trained.tokenizer is None:
        raise UseError(f"{option}: the model of {trained.run} reads no tags (model.text_tokens is 0)")
    if tags and sidecars:
        raise UseError("--tags and --tags-from-sidecars: give one of them")


def _known_tags(trained: TrainedModel, text: str, sidecars: bool) -> str:
    """--tags as the model reads them; says on stderr where the model is left without any."""
    tags = tag_line(text)
    if trained.tokenizer is None or sidecars:
        return tags
    if not tags:
        print(
            "warning: the model reads tags and is given none; say them with --tags or --tags-from-sidecars",
            file=sys.stderr,
        )
    elif trained.tokenizer.without_known_tags([tags], trained.tokenizer([tags])[0]):
        print(f"warning: the model knows none of the tags '{tags}'", file=sys.stderr)
    return tags


def write_csv(predictions: Iterable[Prediction], file: Path, top: int | None) -> int:
    """Write a table of predictions as they come. Returns how many failed.

    top: classes of a row, path, class_1, probability_1, ..., error. None, for tags, of which an image may have any
    number: a row for each tag, path, tag, probability, error, and one without a tag for an image that has none. The
    file has its name only when all rows are in it.
    """
    failed = 0
    columns = [f"{what}_{place}" for place in range(1, (top or 0) + 1) for what in ("class", "probability")]
    if top is None:
        columns = ["tag", "probability"]
    with written(file, "choose another"), opened_atomically(file) as binary:
        # A file's name need not be text.
        text = io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(["path", *columns, "error"])
        for prediction in predictions:
            named = zip(prediction.names, prediction.probabilities, strict=True)
            pairs = [[name, f"{probability:.6f}"] for name, probability in named]
            one_row = [cell for pair in pairs for cell in pair]
            for row in [one_row] if top is not None else pairs or [[]]:
                cells = row + [""] * (len(columns) - len(row))
                writer.writerow([prediction.path or "", *cells, prediction.error or ""])
            failed += prediction.error is not None
        text.detach()
    return failed
