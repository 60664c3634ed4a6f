"""What a precision costs in accuracy: the same recipe trained to its end in each, with the same seeds.

Order, augmentation and initial weights of a seed are the same in every precision, so runs are compared in pairs.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.claims.runs import finish_runs, last_train_loss, test_evaluation, trained_at
from benchmarks.result import write_result
from dist_train.config import Recipe


def measure_precisions(base: Recipe, precisions: list[str], seeds: int, jobs: int, name: str) -> Path:
    """Train every precision with seeds 0, 1, ..., the first of `precisions` being what others are compared with.

    Writes the result after every run, goes on where it was stopped, and returns the result's path.
    """
    recipes = {
        (precision, seed): replace(
            base,
            deepspeed=replace(base.deepspeed, precision=precision),
            train=replace(base.train, seed=seed, run=str(Path(base.train.run) / f"{precision}-seed{seed}")),
        )
        for seed in range(seeds)
        for precision in precisions
    }
    parameters = {"recipe": asdict(base), "precisions": precisions, "seeds": seeds}
    rows: list[dict[str, Any]] = []
    path = write_result("precision", name, parameters, rows)
    for recipe in finish_runs(list(recipes.values()), jobs, "precision"):
        test = test_evaluation(recipe)
        rows.append(
            {
                "precision": recipe.deepspeed.precision,
                "seed": recipe.train.seed,
                "top1": test["top1"],
                "test_loss": test["loss"],
                "train_loss": last_train_loss(recipe),
                "trained_at": trained_at(recipe),
            }
        )
        rows.sort(key=lambda row: (precisions.index(row["precision"]), row["seed"]))
        path = write_result("precision", name, parameters, rows, {"differences": differences(rows, precisions)})
    return path


def differences(rows: list[dict[str, Any]], precisions: list[str]) -> list[dict[str, Any]]:
    """Each precision's test accuracy less that of the first with the same seed, in points: mean and standard error."""
    top1 = {(row["precision"], row["seed"]): 100 * row["top1"] for row in rows}
    found = []
    for precision in precisions[1:]:
        seeds = [seed for name, seed in top1 if name == precision and (precisions[0], seed) in top1]
        pairs = [top1[precision, seed] - top1[precisions[0], seed] for seed in seeds]
        if pairs:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None
            found.append(
                {
                    "precision": precision,
                    "compared_with": precisions[0],
                    "pairs": len(pairs),
                    "points": round(statistics.mean(pairs), 3),
                    "standard_error": None if error is None else round(error, 3),
                }
            )
    return found
