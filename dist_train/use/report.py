"""What an evaluation leaves beside its figures: a table of the classes, the confusion matrix, and the pairs of classes
that are confused most, with pictures."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.fetch import ShardFetcher
from dist_train.data.images import BadImage, decode
from dist_train.data.loader import Batch
from dist_train.data.manifest import Manifest
from dist_train.data.plan import evaluation_batches, needs_of
from dist_train.train.confusion import first_choice
from dist_train.train.pictures import MOST_CLASSES, confusion_picture

_PAIRS, _EXAMPLES, _SIDE = 20, 6, 144
"""Pairs of classes on the page; pictures of each; their longer side, pixels."""


@dataclass(frozen=True)
class Outcomes:
    """What a model said of N samples: (N,) each. sample: index in the split; label, predicted: class ids; probability:
    that the model gave the predicted class."""

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]


class OutcomeCollector:
    """Collects them while one process evaluates: `add` is for `evaluate`'s `each`."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take a batch, without the samples that cannot be used. logits: (B, classes)."""
        usable = (batch.weights > 0).cpu().numpy()
        predicted = first_choice(logits)
        probability = logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0]
        columns = batch.samples, *(tensor.cpu().numpy() for tensor in (batch.labels, predicted, probability))
        self._parts.append(tuple(column[usable] for column in columns))

    def outcomes(self) -> Outcomes:
        """All that was collected, in order."""
        return Outcomes(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))


@dataclass(frozen=True)
class ClassScores:
    """By class, (C,) each: true positives, samples of the class, samples that were taken for it."""

    hits: NDArray[np.int64]
    samples: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @classmethod
    def of(cls, outcomes: Outcomes, classes: int) -> ClassScores:
        """Count the outcomes."""
        right = outcomes.label == outcomes.predicted
        columns = outcomes.label[right], outcomes.label, outcomes.predicted
        return cls(*(np.bincount(column, minlength=classes) for column in columns))

    def precision(self) -> NDArray[np.float64]:
        """Of the samples taken for a class the share that is of it; NaN where there are none."""
        return _share(self.hits, self.predicted)

    def recall(self) -> NDArray[np.float64]:
        """Of the samples of a class the share that was taken for it; NaN where there are none."""
        return _share(self.hits, self.samples)

    def f1(self) -> NDArray[np.float64]:
        """The harmonic mean of precision and recall, 2 hits / (samples + predicted); NaN where both are."""
        return _share(2 * self.hits, self.samples + self.predicted)

    def macro_f1(self) -> float:
        """The mean of f1 over the classes that have samples."""
        return float(self.f1()[self.samples > 0].mean())


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return part / whole


def class_table(names: Sequence[str], images: Sequence[int], top5: Sequence[int], scores: ClassScores) -> str:
    """A CSV line for each class. images: in the whole set, all splits; top5: samples whose class was among five."""
    text = io.StringIO()
    writer = csv.writer(text)
    columns = ["class_id", "class", "images_in_set", "samples", "correct", "top5_correct", "top1"]
    writer.writerow([*columns, "precision", "recall", "f1"])
    shares = zip(scores.precision(), scores.recall(), scores.f1(), strict=True)
    for i, (precision, recall, f1) in enumerate(shares):
        counts = [images[i], scores.samples[i], scores.hits[i], top5[i]]
        ratios = ("" if np.isnan(value) else f"{value:.4f}" for value in (recall, precision, recall, f1))
        writer.writerow([i, names[i], *counts, *ratios])
    return text.getvalue()


def confusion_matrix(outcomes: Outcomes, classes: int) -> NDArray[np.int64]:
    """(C, C): samples of true class (row) that were taken for a class (column)."""
    pairs = outcomes.label * classes + outcomes.predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def matrix_table(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    """The matrix as CSV: the header has the predicted classes, each line begins with the true one."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["true class", *names])
    for name, row in zip(names, counts.tolist(), strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


def confused_pairs(outcomes: Outcomes, classes: int) -> list[tuple[int, int, NDArray[np.int64]]]:
    """The pairs (true class, predicted class) with most samples, most first, equal ones by id; with each the indexes of
    its outcomes, those of which the model was surest first."""
    wrong = np.flatnonzero(outcomes.label != outcomes.predicted)
    keys, inverse, counts = np.unique(
        outcomes.label[wrong] * classes + outcomes.predicted[wrong], return_inverse=True, return_counts=True
    )
    found = []
    for k in np.argsort(-counts, kind="stable")[:_PAIRS]:
        of_pair = wrong[inverse == k]
        surest = of_pair[np.argsort(-outcomes.probability[of_pair], kind="stable")]
        found.append((*divmod(int(keys[k]), classes), surest))
    return found


# ---------------------------------------------------------------------- the page of confused pairs
def confused_page(
    data: DataConfig, manifest: Manifest, split: str, outcomes: Outcomes, title: str, scores: ClassScores
) -> str:
    """One HTML file with everything in it: for each confused pair its count and some of its pictures."""
    names = manifest.class_names
    pairs = confused_pairs(outcomes, len(names))
    wanted = np.concatenate([np.zeros(0, np.int64), *(indexes[:_EXAMPLES] for _, _, indexes in pairs)])
    pictures = _pictures(data, manifest, split, np.unique(outcomes.sample[wanted]))
    rows = []
    for true, taken, indexes in pairs:
        figures = []
        for i in indexes[:_EXAMPLES]:
            name, source = pictures[int(outcomes.sample[i])]
            said = f"{name}, {outcomes.probability[i]:.0%}"
            image = f'<img src="{source}" alt="">' if source else ""
            figures.append(f"<figure>{image}<figcaption>{html.escape(said)}</figcaption></figure>")
        rows.append(
            f"<section><h2>{html.escape(names[true])} <i>taken for</i> {html.escape(names[taken])}</h2>"
            f"<p>{len(indexes)} of {scores.samples[true]} samples</p><div>{''.join(figures)}</div></section>"
        )
    body = "\n".join(rows) or "<p>No sample was taken for another class.</p>"
    return _page(title, body)


_STYLE = """body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1000px; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 0 } h2 i { font-weight: normal; color: #777 }
p { margin: 0 0 .4rem; color: #555 } div { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0; width: 144px; font-size: .75rem; overflow-wrap: anywhere; color: #555 }
img { width: 144px; height: 144px; object-fit: contain; background: #f2f2f2 }"""


def _page(title: str, body: str) -> str:
    """HTML of a title, which is text, and a body, which is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
{_STYLE}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>The pairs of classes that were confused most. Under each picture: its sample, and the probability of the wrong class;
the surest first.</p>
{body}
</body></html>
"""


def _pictures(
    data: DataConfig, manifest: Manifest, split: str, samples: NDArray[np.int64]
) -> dict[int, tuple[str, str]]:
    """Of each sample, an index in the split, its name and its picture as a data URL, empty where it cannot be read."""
    info = manifest.split(split)
    fetcher = ShardFetcher(data.shards, info, len(manifest.classes), config=data, baked=manifest.baked_size())
    (everything,) = evaluation_batches(info.shard_samples, max(1, info.samples), rank=0, world_size=1)
    chosen = everything[samples]
    batches = [chosen[chosen.shard == shard] for shard in np.unique(chosen.shard)]
    found = {}
    with fetcher.following(lambda: needs_of(batches)):
        for k, positions in enumerate(batches):
            fetcher.advance(k)
            fetched = fetcher.fetch(positions, with_text=False)
            for i, sample in enumerate(positions.sample.tolist()):
                name = fetcher.name(int(positions.shard[i]), int(positions.place[i]))
                found[sample] = name, _thumbnail(np.asarray(fetched.images[i]).tobytes(), data.max_pixels)
    return found


def _thumbnail(encoded: bytes, max_pixels: int) -> str:
    try:
        picture = decode(encoded, max_pixels)
    except BadImage:
        return ""
    picture.thumbnail((2 * _SIDE, 2 * _SIDE), Image.Resampling.BICUBIC)  # twice, for screens of high density
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def report_files(
    data: DataConfig, manifest: Manifest, split: str, outcomes: Outcomes, title: str, scores: ClassScores
) -> dict[str, bytes]:
    """The files beside the table of the classes, by the ends of their names: the matrix as CSV and as a picture, for up
    to MOST_CLASSES classes, and the page of confused pairs."""
    classes = len(manifest.classes)
    files = {}
    if classes <= MOST_CLASSES:
        counts = confusion_matrix(outcomes, classes)
        files["_confusion.csv"] = matrix_table(counts, manifest.class_names).encode()
        picture = io.BytesIO()
        confusion_picture(counts, manifest.class_names).save(picture, "PNG", optimize=True)
        files["_confusion.png"] = picture.getvalue()
    files["_confused.html"] = confused_page(data, manifest, split, outcomes, title, scores).encode()
    return files
