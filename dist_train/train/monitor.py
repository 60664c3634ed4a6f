"""Which evaluation on val is the best, and when a run has gone on long enough without a better one."""

from __future__ import annotations

import math

from dist_train.config import TrainConfig
from dist_train.train.checkpoint import RunState
from dist_train.train.evaluate import Evaluation
from dist_train.train.multilabel import TagEvaluation

_LOWER_IS_BETTER = {"loss"}


def monitored(result: Evaluation | TagEvaluation, metric: str) -> float:
    """What a run looks at in an evaluation: top1, top5, class_mean, loss, or map (of a model that predicts tags)."""
    if metric == "map":
        return result.score
    if metric == "class_mean" and isinstance(result, Evaluation):
        return result.class_mean()
    return float(getattr(result, metric))


def note_evaluation(state: RunState, value: float, score: float) -> None:
    """Let the state know of an evaluation on val at its step: the best so far, or one more since that.

    value: of what train.monitor names. One that is not a finite number is never the best. score: the top-1 in any case.
    """
    sign = -1 if state.monitor in _LOWER_IS_BETTER else 1
    if math.isfinite(value) and (state.best_value is None or sign * value > sign * state.best_value):
        state.best_value, state.best_top1, state.best_step = value, score, state.step
        state.evaluations_since_best = 0
    else:
        state.evaluations_since_best += 1
    state.evaluation_due = False


def out_of_patience(state: RunState, config: TrainConfig) -> bool:
    """Whether train.patience evaluations on val were no better than the best before them."""
    return 0 < config.patience <= state.evaluations_since_best


def why_ended(state: RunState, config: TrainConfig, total_steps: int) -> str:
    """Why a run has come to its end, for its summary."""
    if state.step >= total_steps or not out_of_patience(state, config):
        return f"train.epochs: {config.epochs} epochs are done"
    return (
        f"train.patience: {state.evaluations_since_best} evaluations on val without a better {state.monitor} than "
        f"{state.best_value or 0:.4f} after step {state.best_step}"
    )
