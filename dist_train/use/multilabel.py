"""What is different with a finished run that predicts tags: its figures, its table, and which tags it predicts."""

from __future__ import annotations

import csv
import io
import sys

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.loader import EvalLoader
from dist_train.data.targets import TagTargets
from dist_train.errors import UseError
from dist_train.models.saved import read_thresholds
from dist_train.train.multilabel import TagEvaluation, evaluate_tags
from dist_train.train.tagmetrics import Floats, probabilities
from dist_train.use.trained import TrainedModel


def predicts_tags(trained: TrainedModel) -> bool:
    """Whether a run's model predicts tags, and not a class."""
    return trained.recipe.data.labels == "tags"


def targets_of(trained: TrainedModel) -> TagTargets | None:
    """What gives a loader's samples the tags that the model predicts; None for a model of classes."""
    return TagTargets(trained.class_names) if predicts_tags(trained) else None


def probabilities_of(trained: TrainedModel, logits: Tensor) -> Tensor:
    """(B, classes) probabilities from logits: that sum to 1 over the classes, or of each tag on its own."""
    return probabilities(logits) if predicts_tags(trained) else logits.float().softmax(dim=-1)


# ---------------------------------------------------------------------- evaluate
def evaluate_run(trained: TrainedModel, loader: EvalLoader) -> TagEvaluation:
    """How good the model is on a loader's split, at the recipe's threshold and at those that the run chose on val; says
    on stderr where it has none."""
    chosen = read_thresholds(trained.checkpoint, trained.averaged)
    if chosen is None:
        print(
            f"{trained.checkpoint} has no thresholds, as it was not evaluated on val: the figures are at "
            f"train.threshold {trained.recipe.train.threshold} alone",
            file=sys.stderr,
        )
    tuned = None if chosen is None else np.array(chosen)
    samples = loader.manifest.split(loader.split).samples
    return evaluate_tags(trained.forward, loader, samples, trained.recipe.train.threshold, tuned)


def tag_table(result: TagEvaluation, tags: list[str]) -> str:
    """A CSV table with a row for each tag: at its threshold chosen on val, or without one at train.threshold."""
    at = result.tuned if result.tuned is not None else result.at_threshold
    text = io.StringIO()
    writer = csv.writer(text)
    header = "tag_id tag positives predicted hits threshold precision recall f1 average_precision"
    writer.writerow(header.split())
    columns = (at.thresholds, at.precision, at.recall, at.f1, result.average_precision)
    for number, tag in enumerate(tags):
        shares = [f"{column[number]:.4f}" for column in columns]
        if not at.positives[number]:
            shares[2] = shares[3] = shares[4] = ""  # there is nothing to find
        writer.writerow([number, tag, at.positives[number], at.predicted[number], at.hits[number], *shares])
    return text.getvalue()


# ---------------------------------------------------------------------- predict
def thresholds_for(trained: TrainedModel, threshold: str) -> Floats:
    """(T,) thresholds: the same for all tags, as `0.5`, or `best`, each tag's own that was chosen on val.

    Raises UseError where the model has none of its own, or predicts no tags.
    """
    if not predicts_tags(trained):
        raise UseError(f"--threshold: the model of {trained.run} predicts one class, not tags (data.labels is class)")
    if threshold != "best":
        return np.full(len(trained.class_names), float(threshold))
    chosen = read_thresholds(trained.checkpoint, trained.averaged)
    if chosen is None:
        raise UseError(
            f"--threshold best: {trained.checkpoint} was not evaluated on val, where thresholds are chosen; "
            "use another --checkpoint or a number, as --threshold 0.5"
        )
    return np.array(chosen)


def tags_above(trained: TrainedModel, probability: Tensor, thresholds: Floats) -> list[tuple[str, float]]:
    """The tags whose probability, of (T,), is at least their threshold, the most probable first."""
    values = probability.cpu().numpy()
    above = np.flatnonzero(values >= thresholds)
    ordered = above[np.argsort(-values[above], kind="stable")]
    return [(trained.class_names[i], float(values[i])) for i in ordered]


# ---------------------------------------------------------------------- grid
def captions(trained: TrainedModel, logits: Tensor, truth: Tensor) -> list[list[tuple[str, str]]]:
    """For each image tags in lines, each with its colour: those predicted and right, predicted and wrong, and missed;
    logits and truth (B, T). At the thresholds chosen on val, or else at train.threshold."""
    chosen = read_thresholds(trained.checkpoint, trained.averaged)
    same = np.full(len(trained.class_names), trained.recipe.train.threshold)
    predicted = probabilities(logits).cpu().numpy() >= (same if chosen is None else np.array(chosen))
    has = truth.cpu().numpy()

    def line(sign: str, which: NDArray[np.bool_]) -> str:
        return " ".join([sign, *(trained.class_names[i] for i in np.flatnonzero(which))])

    return [
        [
            (line("+", guess & real), "darkgreen"),
            (line("x", guess & ~real), "crimson"),
            (line("-", ~guess & real), "grey"),
        ]
        for guess, real in zip(predicted, has, strict=True)
    ]
