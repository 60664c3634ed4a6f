"""The largest micro-batch that fits into a device's memory, found by real steps: a helper of `batch_size`.

On a GPU one process tries size after size: running out of memory is an exception there, and what was tried is freed. On
a CPU the system ends a process that takes too much, so each size has a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from benchmarks.points import run_point
from benchmarks.speed.step import measure
from dist_train.config import Recipe, recipe_from_dict
from dist_train.errors import WorkError

STEPS = 2  # the first allocates the gradients and the optimizer's state, the second has all of it


def largest_micro_batch(recipe: Recipe, most: int, environment: Mapping[str, str], limit: int) -> int:
    """The largest micro-batch of which a training step fits, to an eighth of it; `most` if that fits, 0 if none.

    By PyTorch's own operators, which take the most memory: compiling again for every size would take minutes. limit:
    bytes that a process may take, 0 for no limit.
    """
    import torch

    recipe = replace(recipe, model=replace(recipe.model, compile="none"))
    if not torch.cuda.is_available():
        return search(most, lambda size: fits(measure(of_size(recipe, size), "synthetic", 0, STEPS, {}, limit)))
    point = {"recipe": asdict(recipe), "most": most, "memory_limit": limit}
    try:
        return run_point("benchmarks.speed.fit:search_here", point, environment)
    except WorkError as error:
        raise WorkError(f"search for the largest micro-batch: {error}") from None


def search_here(point: dict[str, Any]) -> int:
    """Search in this process."""
    from benchmarks.speed.memory import limit_memory
    from benchmarks.speed.step_point import measure_point

    limit_memory(point["memory_limit"])
    recipe = recipe_from_dict(point["recipe"])
    return search(point["most"], lambda size: fits(measure_point(of_size(recipe, size), "synthetic", 0, STEPS)))


def search(most: int, fits: Callable[[int], bool]) -> int:
    """The largest size that `fits`, to an eighth of it; `most` if that fits, 0 if none.

    Doubled from 16 until it does not fit, then halved between.
    """
    low, high = 0, 16
    while high <= most and fits(high):
        low, high = high, 2 * high
    if low * 2 > most:
        return low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def of_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with a batch of that size, as one micro-batch."""
    return replace(recipe, train=replace(recipe.train, batch_size=size, micro_batch_size=0))


def fits(row: dict[str, Any]) -> bool:
    """Whether a measured point did not run out of memory (a GPU's row also counts how often it did before)."""
    return row.get("out_of_memory") is not True
