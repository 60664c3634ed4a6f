"""The largest micro-batch that fits into a device's memory, found by real steps.

On a GPU one process tries size after size: running out of memory is an exception there, and what was tried is freed. On
a CPU the system ends a process that takes too much, so each size has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.points import environment_of_one_process
from benchmarks.step import limit_memory, measure_point, recipe_from_dict, run_point
from dist_train.config import Recipe
from dist_train.errors import WorkError

STEPS = 2  # the first allocates the gradients and the optimizer's state, the second has all of it


def largest_micro_batch(recipe: Recipe, most: int, environment: dict[str, str], limit: int) -> int:
    """The largest micro-batch of which a training step fits, to an eighth of it; `most` if that fits, 0 if none.

    By PyTorch's own operators, which take the most memory: compiling anew for every size would take minutes. limit:
    bytes that a process may take, 0 for no limit.
    """
    recipe = replace(recipe, model=replace(recipe.model, compile="none"))
    if not torch.cuda.is_available():
        return search(most, lambda size: fits(run_point(of_size(recipe, size), "synthetic", 0, STEPS, {}, limit)))
    point = {"recipe": asdict(recipe), "most": most, "memory_limit": limit}
    command = [sys.executable, "-m", "benchmarks.fit", json.dumps(point)]
    environment = environment_of_one_process() | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        message = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise WorkError(f"search for the largest micro-batch: {message.removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])["largest_micro_batch"]


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


def main(point: dict[str, Any]) -> int:
    """Search in this process and print the answer."""
    limit_memory(point["memory_limit"])
    recipe = recipe_from_dict(point["recipe"])
    largest = search(point["most"], lambda size: fits(measure_point(of_size(recipe, size), "synthetic", 0, STEPS)))
    print(json.dumps({"largest_micro_batch": largest}))
    return 0


if __name__ == "__main__":
    from dist_train.errors import run_command

    sys.exit(run_command(lambda: main(json.loads(sys.argv[1]))))
