"""The runs of the benchmark `gap`: heads, remedies for a large batch, and how a row of a result is found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.claims.study_runs import Seeds
from benchmarks.tables import Row
from dist_train.config import Head, HeadInit, LrScaling, OptimName


@dataclass(frozen=True)
class Start:
    """A head and how it starts."""

    head: Head
    head_init: HeadInit


HEADS: dict[str, Start] = {
    "cls": Start("cls", "reference"),
    "ifa": Start("ifa", "reference"),
    "ifa from the mean": Start("ifa", "mean"),
    "ifa from the last block": Start("ifa", "last"),
    "mean": Start("mean", "default"),
    "last four": Start("last_n", "default"),
    "all layers": Start("all_layers", "default"),
    "attentive": Start("attentive", "mean"),
}
"""By what they are called in a result; the first two as in the paper's code."""


@dataclass(frozen=True)
class Remedy:
    """What a run at the largest batch does otherwise.

    scaling: of the rate with the batch size. by_samples: momentum whose half-life is as many samples as the smallest
    batch's (Marek et al. 2025, arXiv 2507.07101). steps: as many steps as the smallest batch has, so more epochs.
    own_rate: found by a search at this batch size, not at the smallest. frozen_embedding: patches and positions keep
    their starting weights (Kumar et al. 2022, arXiv 2211.09359). layer_decay: as optim.layer_decay, so that the
    backbone learns slower than the head.
    """

    optimizer: OptimName = "sgd"
    scaling: LrScaling = "none"
    by_samples: bool = False
    steps: bool = False
    own_rate: bool = False
    frozen_embedding: bool = False
    layer_decay: float = 1.0

    @property
    def of_backbone(self) -> bool:
        """Whether it says how the backbone is trained, and nothing where that is frozen."""
        return self.frozen_embedding or self.layer_decay != 1.0


FIXED = "fixed"
ADAMW = "adamw"
REMEDIES: dict[str, Remedy] = {
    FIXED: Remedy(),
    "square root": Remedy(scaling="sqrt"),
    "linear": Remedy(scaling="linear"),
    "momentum by samples": Remedy(by_samples=True),
    "linear + momentum by samples": Remedy(scaling="linear", by_samples=True),
    "own rate": Remedy(own_rate=True),
    "equal steps": Remedy(steps=True),
    ADAMW: Remedy(optimizer="adamw"),
    "adamw + square root": Remedy(optimizer="adamw", scaling="sqrt"),
    "adamw + own rate": Remedy(optimizer="adamw", own_rate=True),
    "adamw + own rate + layer decay": Remedy(optimizer="adamw", own_rate=True, layer_decay=0.1),
    "frozen embedding": Remedy(frozen_embedding=True),
}
"""By name. `fixed` is none: SGD at the rate that is best for the smallest batch, in as many epochs."""


@dataclass(frozen=True)
class Run:
    """One training. rate: in a search, else 0 for the one that the search has found."""

    head: str
    remedy: str
    batch_size: int
    seed: int
    rate: float = 0.0

    @property
    def name(self) -> str:
        """Of its folder."""
        words = f"{self.head}-{self.remedy}-batch{self.batch_size}-seed{self.seed}".replace(" +", "").replace(" ", "_")
        return f"search-{words}-{self.rate:g}" if self.rate else words


def searched_as(remedy: str, batches: Sequence[int]) -> tuple[str, int]:
    """Whose search gives a remedy its rate."""
    if REMEDIES[remedy].own_rate:
        return remedy, batches[-1]
    return (ADAMW if REMEDIES[remedy].optimizer == "adamw" else FIXED), batches[0]


def searches(remedies: Sequence[str], batches: Sequence[int]) -> list[tuple[str, int]]:
    """(remedy, batch size) at which the rate of each head is searched, each once."""
    return list(dict.fromkeys(searched_as(remedy, batches) for remedy in remedies))


def plan(heads: Sequence[str], remedies: Sequence[str], batches: Sequence[int], seeds: int) -> list[Run]:
    """Every run but those of the searches, a seed after the other, so that what is there early is comparable."""
    runs = []
    for seed in range(seeds):
        for head in heads:
            for remedy in remedies:
                at = batches if remedy == FIXED else (batches[0], batches[-1]) if remedy == ADAMW else batches[-1:]
                runs += [Run(head, remedy, batch, seed) for batch in at]
    return runs


def accuracies(rows: Sequence[Row], head: str, remedy: str, batch_size: int) -> Seeds:
    """Test top-1 in percent by seed; none of runs that diverged."""
    its = _runs(rows, head, remedy, batch_size)
    return Seeds({row["seed"]: 100 * row["top1"] for row in its if row.get("top1") is not None})


def diverged(rows: Sequence[Row], head: str, remedy: str, batch_size: int) -> int:
    """Runs whose loss was not finite."""
    return sum(bool(row.get("diverged")) for row in _runs(rows, head, remedy, batch_size))


def _runs(rows: Sequence[Row], head: str, remedy: str, batch_size: int) -> list[Row]:
    return [row for row in rows if (row["head"], row["remedy"], row["batch_size"]) == (head, remedy, batch_size)]
