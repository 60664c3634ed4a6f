"""The largest micro-batch that fits into a device's memory, found by real steps: a helper of `batch_size`.

The search is that of `train.micro_batch_size: auto` (`dist_train/train/micro_batch.py`), over any sizes and not the
divisors of a batch alone, and begins at what is predicted. On a GPU one process tries size after size: running out of
memory is an exception there, and what was tried is freed. On a CPU the system ends a process that takes too much, so
each size has a process of its own.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from benchmarks.points import run_point
from benchmarks.speed.step import PAPER_CLASSES, SYNTHETIC_VOCABULARY, measure
from dist_train.config import Recipe, recipe_from_dict
from dist_train.errors import WorkError

STEPS = 2  # the first allocates the gradients and the optimizer's state, the second has all of it


def largest_micro_batch(recipe: Recipe, most: int, limit: int) -> int:
    """The largest micro-batch of which a training step fits, to an eighth of it; `most` if that fits, 0 if none.

    By PyTorch's own operators, which take the most memory: compiling again for every size would take minutes. limit:
    bytes that a process may take, 0 for no limit.
    """
    import torch

    from dist_train.machine import available_memory
    from dist_train.train.micro_batch import largest_that_fits

    recipe = replace(recipe, model=replace(recipe.model, compile="none"))
    if not torch.cuda.is_available():

        def fits(size: int) -> bool:
            # A GPU's row counts here how often it ran out of memory before.
            row = measure(of_size(recipe, size), "synthetic", 0, STEPS, memory_limit=limit)
            return row.get("out_of_memory") is not True

        sizes = sizes_to(most)
        return largest_that_fits(sizes, fits, predicted(recipe, sizes, limit or available_memory()))
    point = {"recipe": asdict(recipe), "most": most, "memory_limit": limit}
    try:
        return run_point("benchmarks.speed.fit:search_here", point)
    except WorkError as error:
        raise WorkError(f"search for the largest micro-batch: {error}") from None


def search_here(point: dict[str, Any]) -> int:
    """Search in this process."""
    import torch

    from benchmarks.speed.memory import limit_memory
    from dist_train.machine import available_memory
    from dist_train.train.engine import init_process_group
    from dist_train.train.micro_batch import largest_that_fits, steps_fit

    limit_memory(point["memory_limit"])
    recipe, sizes, place = recipe_from_dict(point["recipe"]), sizes_to(point["most"]), init_process_group()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
    guess = predicted(recipe, sizes, point["memory_limit"] or free)
    vocabulary = SYNTHETIC_VOCABULARY if recipe.model.text_tokens else 0
    return largest_that_fits(
        sizes, lambda size: steps_fit(of_size(recipe, size), place, PAPER_CLASSES, vocabulary), guess
    )


def sizes_to(most: int) -> list[int]:
    """Sizes up to `most`, each at most an eighth larger than the one before, or by one sample."""
    sizes = [1]
    while sizes[-1] < most:
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(min(most, sizes[-1] + max(1, octave // 8)))
    return sizes


def predicted(recipe: Recipe, sizes: list[int], limit: float) -> int:
    """The largest of the sizes of which a step is predicted to fit into `limit` bytes, or the smallest."""
    import torch

    from dist_train.train.memory import predict_step
    from dist_train.train.micro_batch import largest_that_fits

    vocabulary = SYNTHETIC_VOCABULARY if recipe.model.text_tokens else 0

    def fits(size: int) -> bool:
        step = predict_step(of_size(recipe, size), PAPER_CLASSES, vocabulary, 1, torch.cuda.is_available())
        return 1e6 * step.peak_mb <= limit

    return largest_that_fits(sizes, fits, sizes[-1]) or sizes[0]


def of_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with a batch of that size, as one micro-batch."""
    return replace(recipe, train=replace(recipe.train, batch_size=size, micro_batch_size=0))
