"""How good a finished run is on a split."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from dist_train.data.loader import EvalLoader
from dist_train.train.checkpoint import read_state
from dist_train.train.evaluate import Evaluation
from dist_train.train.evaluate import evaluate as evaluate_batches
from dist_train.use.multilabel import evaluate_run, predicts_tags, tag_table, targets_of
from dist_train.use.report import ClassScores, OutcomeCollector, class_table, report_files
from dist_train.use.trained import TrainedModel, set_to_look_at


def evaluate(
    trained: TrainedModel, split: str = "test", shards: str | None = None, batch_size: int | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """How good a model is on a split: the figures that `dist-train evaluate` prints, and the files that it writes, by
    the ends of their names: `.csv`, a table of the classes or of the tags, and for classes what `report_files` makes.

    shards: another set of the same classes; None: the run's. batch_size: samples of one pass; None: the run's.
    """
    data, manifest = set_to_look_at(trained, shards)
    if note := manifest.resize_note(data):
        print(f"{data.shards}: {note}", file=sys.stderr)
    batch_size = batch_size or trained.recipe.train.eval_batch_size
    loader = EvalLoader(
        data,
        manifest,
        split,
        trained.place,
        batch_size=batch_size,
        tokenizer=trained.tokenizer,
        tag_targets=targets_of(trained),
    )
    chosen = {"checkpoint": str(trained.checkpoint), "step": read_state(trained.checkpoint).step}
    if predicts_tags(trained):
        of_tags = evaluate_run(trained, loader)
        figures = {"split": split, **chosen, **of_tags.figures()}
        return figures, {".csv": tag_table(of_tags, trained.class_names).encode()}
    collector = OutcomeCollector()
    result = evaluate_batches(trained.forward, loader, manifest.split(split).samples, collector.add)
    outcomes = collector.outcomes()
    scores = ClassScores.of(outcomes, len(trained.class_names))
    counts = [info.count for info in manifest.classes]
    figures = {"split": split, **chosen, **_describe(result, torch.tensor(counts)), "macro_f1": scores.macro_f1()}
    table = class_table(trained.class_names, counts, result.top5_correct.tolist(), scores)
    title = f"{trained.run.name}, {split}: {result.samples:,} samples, top-1 {result.top1:.4f}"
    return figures, {".csv": table.encode(), **report_files(data, manifest, split, outcomes, title, scores)}


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
        "most_frequent_tenth_of_classes_top1": _known(result.class_mean(by_count[:tenth])),
        "least_frequent_tenth_of_classes_top1": _known(result.class_mean(by_count[-tenth:])),
    }


def _known(value: float) -> float | None:
    """None for NaN, which is no JSON: of classes of which the split has no sample."""
    return None if math.isnan(value) else value
