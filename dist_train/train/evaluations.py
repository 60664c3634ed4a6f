"""One evaluation in a run, of classes or of tags, and what the run's record holds of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dist_train.data.features import FeatureEvalLoader
from dist_train.data.loader import Batch, EvalLoader
from dist_train.train.engine import Engine
from dist_train.train.evaluate import Evaluation, Forward, evaluate
from dist_train.train.multilabel import CHOOSE, TagEvaluation, chosen_thresholds, evaluate_tags


def evaluate_split(
    loader: EvalLoader | FeatureEvalLoader,
    model: Engine,
    forward: Forward,
    threshold: float,
    of_val: Evaluation | TagEvaluation | None,
    each: Callable[[Batch, torch.Tensor], None] | None = None,
) -> Evaluation | TagEvaluation:
    """Evaluate the model on a loader's split, in eval mode. For tags: at train.threshold, and at thresholds that are
    chosen on val or, on another split, were chosen in `of_val`. For classes: each as for `evaluate`."""
    model.eval()
    samples = loader.manifest.split(loader.split).samples
    result: Evaluation | TagEvaluation
    if isinstance(loader, FeatureEvalLoader) or loader.tag_targets is None:
        result = evaluate(forward, loader, samples, each)
    else:
        tuned = CHOOSE if loader.split == "val" else chosen_thresholds(of_val)
        result = evaluate_tags(forward, loader, samples, threshold, tuned)
    model.train()
    return result


def evaluation_figures(split: str, step: int, result: Evaluation | TagEvaluation) -> dict[str, Any]:
    """An evaluation as metrics.jsonl and summary.json hold it."""
    return {"split": split, "step": step, **result.figures()}
