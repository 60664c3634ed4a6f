"""The runs of the study, and how they are compared: seed by seed.

The two runs of a pair have the same seed, and so the same order, augmentation and starting weights. A difference counts
if its mean over the seeds is further from 0 than the one-sided 95 % quantile of Student's t times its standard error.
With few seeds that is a hard rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.tables import Row
from dist_train.config import Head, HeadInit, LrScaling

DRAWN, PHOTOS = "drawn", "photos"
HEADS: tuple[Head, ...] = ("cls", "ifa")


@dataclass(frozen=True)
class Run:
    """One training run. budget: what is the same as in the other runs that it is compared with."""

    experiment: str
    data: str
    head: Head
    batch_size: int
    seed: int
    backbone: str = "vit_tiny_patch32"
    head_init: HeadInit = "reference"
    image_size: int = 64
    text_tokens: int = 0
    lr_scaling: LrScaling = "none"
    budget: str = "epochs"

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.experiment, self.data, self.backbone, f"{self.image_size}px", self.head, self.head_init]
        parts += [f"text{self.text_tokens}", f"batch{self.batch_size}", self.lr_scaling, self.budget]
        return "-".join([*parts, f"seed{self.seed}"])


BASE = {each.name: each.default for each in fields(Run) if isinstance(each.default, str | int)}
"""What a run is where a comparison does not say otherwise."""


class Seeds(dict[int, float]):
    """A number for each seed: the accuracy of runs in percent, or the difference of two accuracies in points."""

    def __sub__(self, other: Seeds) -> Seeds:
        """The difference in the seeds that both have."""
        return Seeds({seed: self[seed] - other[seed] for seed in sorted(self.keys() & other.keys())})

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values())

    @property
    def deviation(self) -> float:
        """Sample standard deviation; NaN for one seed."""
        return statistics.stdev(self.values()) if len(self) > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for one seed."""
        return self.deviation / math.sqrt(len(self))

    @property
    def sign(self) -> int:
        """1 or -1 where the mean is above or below 0 by the rule of this module, else 0; 0 for one seed."""
        from scipy import stats

        reach = stats.t.ppf(0.95, len(self) - 1) * self.error
        return 1 if self.mean > reach else -1 if self.mean < -reach else 0

    def __str__(self) -> str:
        """`+1.5 ± 0.2`: the mean and its standard error."""
        return with_spread(self.mean, self.error, "+.1f")


def with_spread(mean: float, spread: float, form: str) -> str:
    """`80.1 ± 0.3`; the mean alone where the spread is NaN."""
    return f"{mean:{form}}" + ("" if math.isnan(spread) else f" ± {spread:{form.lstrip('+')}}")


def share_of(won: Seeds, lost: Seeds) -> Seeds:
    """What is won as a share of what was lost, in the seeds that have both; empty where nothing was lost in them.

    The mean is that of what is won over that of what was lost. What a seed adds to it is linear in both (the delta
    method), so that the error is that of the ratio of paired numbers.
    """
    lost = Seeds({seed: lost[seed] for seed in sorted(won.keys() & lost.keys())})
    if sum(lost.values()) <= 0:
        return Seeds()
    share = sum(won[seed] for seed in lost) / sum(lost.values())
    return Seeds({seed: share + (won[seed] - share * lost[seed]) / lost.mean for seed in lost})


def is_run(row: Row, **conditions: Any) -> bool:
    """Whether the row's run meets the conditions and is BASE in everything else."""
    return all(row.get(key) == value for key, value in (BASE | conditions).items())


def accuracies(rows: Sequence[Row], **conditions: Any) -> Seeds:
    """Test top-1 in percent, of the runs that meet the conditions and are BASE in everything else."""
    return Seeds({row["seed"]: 100 * row["top1"] for row in rows if is_run(row, **conditions)})


def slope_per_doubling(by_batch: dict[int, Seeds]) -> Seeds:
    """Least-squares slope over log2 of the batch size, for each seed that has all batch sizes."""
    import numpy as np

    if len(by_batch) < 2:
        return Seeds()
    x = np.log2(list(by_batch))
    common = set.intersection(*(set(seeds) for seeds in by_batch.values()))
    return Seeds({seed: np.polyfit(x, [seeds[seed] for seeds in by_batch.values()], 1)[0] for seed in sorted(common)})
