"""Which samples train, validate and test: drawn per class, so that each class keeps the ratios."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from dist_train.data.draws import permutation
from dist_train.errors import UseError

SPLITS = ("train", "val", "test")

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What sources call a split, in lower case, and what a shard set calls it."""


def split_named(name: str) -> str | None:
    """The split that the whole name means, in any case: "Training", "val_set", "test images"; None if none."""
    words = re.sub(r"[\s_.-]*(sets?|splits?|data|images|imgs)$", "", name.strip().lower())
    return SPLIT_NAMES.get(words)


def split_in_name(name: str) -> str | None:
    """The split that a name holds as one of its parts ("imagenet-train-000000.tar"), None if none or several."""
    parts = {SPLIT_NAMES[part] for part in re.split(r"[^a-z]+", name.lower()) if part in SPLIT_NAMES}
    return parts.pop() if len(parts) == 1 else None


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises UseError unless these are a share for each of the three splits."""
    if len(ratios) != 3 or not all(0 <= ratio <= 1 for ratio in ratios) or abs(sum(ratios) - 1) > 1e-6:
        raise UseError(f"--ratios must be three numbers that sum to 1, not {','.join(map(str, ratios))}")


@lru_cache(maxsize=4096)  # many classes have few sizes, and exact fractions take their time
def split_counts(samples: int, ratios: tuple[float, ...]) -> tuple[int, ...]:
    """How many of a class's samples go to each split: whole numbers within 1 of `samples * ratio`, summing to samples.

    Largest-remainder method; remainders that tie go to the earlier split. The first split (train) gets at least one
    sample if its ratio is above zero, taken from the split that was rounded up the most.
    """
    exact = [Fraction(str(ratio)) for ratio in ratios]
    quotas = [samples * ratio / sum(exact) for ratio in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    if samples and exact[0] and counts[0] == 0:
        giver = max(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
        counts[giver] -= 1
        counts[0] = 1
    return tuple(counts)


def draw_splits(samples: int, ratios: Sequence[float], *counters: int) -> list[str]:
    """The split of each of a class's samples; `counters` (seed, class) decide which sample goes where."""
    counts = split_counts(samples, tuple(ratios))
    by_rank = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    drawn = [""] * samples
    for rank, sample in enumerate(permutation(samples, *counters)):
        drawn[sample] = by_rank[rank]
    return drawn
