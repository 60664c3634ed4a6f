"""What is asked of the benchmark `landscape`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_train.errors import UseError


@dataclass(frozen=True)
class Arguments:
    """The loss over a plane of two filter-normalised random directions (Li et al. 2018) and on the line from the
    initial weights, the same directions and samples for all runs. Where it was stopped, the same command continues it.
    """

    runs: list[Path] = field(metadata={"positional": True})
    """run folders"""
    name: str
    """of the result: benchmarks/results/landscape/NAME.json"""
    split: str = "test"
    """whose samples are looked at"""
    samples: int = 256
    """the first of the split, or all if it has fewer"""
    points: int = 21
    """on each side of the plane, an odd number"""
    radius: float = 1.0
    """half of that side, in units of the filters' norms"""
    line_points: int = 29
    """on the line from the initial weights (0) to the trained ones (1), from -0.2 to 1.2"""
    directions: int = 8
    """more directions, over which and over the samples the excess loss has an error; 0 for none"""
    hessian_steps: int = 50
    """products with the Hessian, at most, for its largest eigenvalue; 0 for none"""
    seed: int = 0
    """of the directions"""

    @property
    def settings(self) -> dict[str, Any]:
        """What is measured of every run."""
        return {key: value for key, value in asdict(self).items() if key not in ("runs", "name")}

    def __post_init__(self) -> None:
        """Raise UseError for arguments that cannot be."""
        if self.samples < 1:
            raise UseError(f"--samples: {self.samples} is not at least 1")
        if self.points < 3 or self.points % 2 == 0:
            raise UseError(
                f"--points: {self.points} is not an odd number from 3, with the trained weights amid them; "
                f"use {max(3, self.points + 1)}"
            )
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise UseError(f"--radius: {self.radius} is not above 0; 1 moves every filter by its own norm")
        if self.line_points < 2:
            raise UseError(f"--line-points: {self.line_points} is not at least 2")
        for key in ("directions", "hessian_steps"):
            if getattr(self, key) < 0:
                raise UseError(f"--{key.replace('_', '-')}: {getattr(self, key)} is below 0")
