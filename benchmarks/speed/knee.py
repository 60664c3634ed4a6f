"""The batch size beyond which more samples in a step gain little: predicted by training runs, and measured.

Predicted is the gradient noise scale that a run with `train.noise_every` logs. Measured is a result of the benchmark
`knee` of the same name.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import read_result
from benchmarks.tables import Row, is_number
from dist_train.recipe import METRICS_NAME

ESTIMATES = ("noise_scale", "noise_scale_norms")  # of all parameters, of the layer norms'


def predicted_knee(runs: Sequence[Path]) -> Row:
    """The estimates that run folders logged last, with the `_low` and `_high` ends of their intervals, in samples: the
    medians over those runs that have one. {} where none has."""
    found: Row = {}
    logged = [_last_logged(run / METRICS_NAME) for run in runs]
    for name in ESTIMATES:
        estimates = [last for last in logged if is_number(last.get(name))]
        for key in (name, f"{name}_low", f"{name}_high"):
            # An end that is not known is infinite, which a median may be too.
            values = [last[key] if is_number(last.get(key)) else float("inf") for last in estimates]
            middle = statistics.median(values) if values else float("inf")
            if middle < float("inf"):
                found[key] = round(middle, 1)
    return found


def measured_knee(name: str) -> list[Row]:
    """The knees of the result `knee/NAME.json`, each of a setting at a stage of its training; none where it has not
    been measured."""
    return [knee for knee in read_result("knee", name).get("knees") or [] if isinstance(knee, dict)]


def _last_logged(metrics: Path) -> dict[str, Any]:
    """The last entry of a run's metrics that has an estimate; {} where none has."""
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:  # cut when the disk was full
            continue
        if isinstance(entry, dict) and any(is_number(entry.get(name)) for name in ESTIMATES):
            return entry
    return {}
