"""How good a finished run is on a split."""

from __future__ import annotations

import csv
import io
import sys
from typing import Any

import torch
from torch import Tensor

from dist_train.data.loader import EvalLoader
from dist_train.train.checkpoint import read_state
from dist_train.train.evaluate import Evaluation
from dist_train.train.evaluate import evaluate as evaluate_batches
from dist_train.use.trained import TrainedModel, set_to_look_at


def evaluate(
    trained: TrainedModel, split: str = "test", shards: str | None = None, batch_size: int | None = None
) -> tuple[dict[str, Any], str]:
    """How good a model is on a split: the figures that `dist-train evaluate` prints, and a CSV table of the classes.

    shards: another set of the same classes; None: the run's. batch_size: samples of one pass; None: the run's.
    """
    data, manifest = set_to_look_at(trained, shards)
    if note := manifest.resize_note(data):
        print(f"{data.shards}: {note}", file=sys.stderr)
    batch_size = batch_size or trained.recipe.train.eval_batch_size
    loader = EvalLoader(data, manifest, split, trained.place, batch_size=batch_size, tokenizer=trained.tokenizer)
    result = evaluate_batches(trained.forward, loader, manifest.split(split).samples)
    counts = [info.count for info in manifest.classes]
    chosen = {"checkpoint": str(trained.checkpoint), "step": read_state(trained.checkpoint).step}
    figures = {"split": split, **chosen, **_describe(result, torch.tensor(counts))}
    return figures, _class_table(result, trained.class_names, counts)


def _describe(result: Evaluation, class_counts: Tensor) -> dict[str, Any]:
    tenth = max(1, len(class_counts) // 10)
    by_count = class_counts.argsort(descending=True, stable=True)
    return {
        "samples": result.samples,
        "bad_samples": result.bad_samples,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "class_mean_top1": result.class_mean(),
        "most_frequent_tenth_of_classes_top1": result.class_mean(by_count[:tenth]),
        "least_frequent_tenth_of_classes_top1": result.class_mean(by_count[-tenth:]),
    }


def _class_table(result: Evaluation, names: list[str], counts: list[int]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class_id", "class", "images_in_set", "samples", "correct", "top5_correct", "top1"])
    rows = zip(names, counts, result.seen.tolist(), result.correct.tolist(), result.top5_correct.tolist(), strict=True)
    for number, (name, count, seen, correct, top5) in enumerate(rows):
        writer.writerow([number, name, count, seen, correct, top5, f"{correct / seen:.4f}" if seen else ""])
    return text.getvalue()
