"""`train.micro_batch_size: auto`: the largest micro-batch that fits, found before a run builds its model.

It changes how a step is computed, and not of what: the same samples, augmented and mixed alike, make each global batch.
On a GPU real steps are tried, in this process. On a CPU the system ends a process that takes too much, so there the
memory is predicted (`memory.py`) and compared with what the process may still take.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch

from dist_train.config import Recipe
from dist_train.data.loader import UNDER_WAY
from dist_train.data.plan import micro_batches
from dist_train.errors import WorkError
from dist_train.machine import available_memory
from dist_train.models.build import build_model
from dist_train.models.saved import read_document
from dist_train.place import Place
from dist_train.train.ema import WeightAverage
from dist_train.train.engine import torch_device
from dist_train.train.memory import blank_batch, predict_step
from dist_train.train.meters import synchronize
from dist_train.train.ranks import from_rank_zero, gather
from dist_train.train.setup import build_step

log = logging.getLogger(__name__)

MARGIN = 0.1
"""Share of the device's memory that stays free: for DALI, which decodes beside the steps, for evaluations, and for what
an allocator cannot use of what it has."""
# Bytes that a CPU's process holds beyond its tensors, freed blocks most of all: up to 360 MB in `benchmarks memory`.
_MALLOC = 400e6
_STEPS = 2  # the first allocates gradients and the optimizer's state, the second has all of it


def with_micro_batch(
    recipe: Recipe, place: Place, outputs: int, vocabulary: int = 0, checkpoint: Path | None = None
) -> Recipe:
    """The recipe with a number for train.micro_batch_size `auto`, the same on all ranks, which call this together.

    outputs, vocabulary: as for `predict_step`. A run that goes on from a checkpoint, on as many ranks, keeps the number
    that it had as long as that fits: with dropout a run that was stopped then learns to the bit what it would have.
    Raises WorkError where not even the smallest fits.
    """
    if recipe.train.micro_batch_size != "auto":
        return recipe
    sizes = micro_batches(recipe.train.batch_size, place.world_size, recipe.data.mixup + recipe.data.cutmix > 0)
    device = torch_device(place)
    limit = max(0.0, min(gather(memory_limit(recipe, place), place)))

    def predicted(size: int) -> bool:
        step = predict_step(of_micro_batch(recipe, size), outputs, vocabulary, place.world_size, device.type == "cuda")
        return 1e6 * step.peak_mb + loader_bytes(recipe, size, device) <= limit

    def search(fits: Callable[[int], bool], guess: int) -> int:
        return kept if kept in sizes and fits(kept) else largest_that_fits(sizes, fits, guess)

    kept = from_rank_zero(lambda: _recorded(checkpoint, place), place)
    found = from_rank_zero(lambda: search(predicted, sizes[-1]), place)
    if device.type == "cuda":
        found = search(_by_steps(recipe, place, outputs, vocabulary, limit), found)
    if not found:
        raise WorkError(
            f"train.micro_batch_size auto: not even {sizes[0]} of {sizes[-1]} samples at a time fit into the "
            f"{limit / 1e6:,.0f} MB that a rank may take here; set model.checkpoint_blocks, raise "
            "deepspeed.zero_stage, or take fewer ranks on this machine or a smaller model"
        )
    log.info(
        "train.micro_batch_size auto: %d of a rank's %d samples at a time, in %.0f MB", found, sizes[-1], limit / 1e6
    )
    return of_micro_batch(recipe, found)


def of_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """The recipe with that micro-batch."""
    return replace(recipe, train=replace(recipe.train, micro_batch_size=size))


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool], guess: int) -> int:
    """The largest of `sizes`, ascending, that fits, 0 if none; what is larger than one that does not fit is not asked.

    guess: where to begin. From there in doubled strides to the first answer of the other kind, then halving between.
    """
    low, high = -1, len(sizes)  # the size at `low` fits, that at `high` does not
    at, stride = sum(size < guess for size in sizes[:-1]), 1
    while high - low > 1:
        low, high = (at, high) if fits(sizes[at]) else (low, at)
        if 0 <= low and high < len(sizes):
            at = (low + high) // 2
        else:
            at = min(low + stride, len(sizes) - 1) if 0 <= low else max(high - stride, 0)
        stride *= 2
    return sizes[low] if low >= 0 else 0


# ---------------------------------------------------------------- what there is
def memory_limit(recipe: Recipe, place: Place) -> float:
    """Bytes that this rank's steps and its loader's batches may take, now that nothing of them is there."""
    device = torch_device(place)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - MARGIN * total - loader_bytes(recipe, recipe.train.eval_batch_size, device)
    # All ranks have come so far before any goes on, which would take of what the others count.
    free = min(gather(available_memory(), place))
    share = (1 - MARGIN) * free / place.local_world_size - _MALLOC
    return share - loader_bytes(recipe, recipe.train.eval_batch_size, device)


def loader_bytes(recipe: Recipe, size: int, device: torch.device) -> int:
    """Bytes of the batches that wait or are being made; on a CPU also of those in DALI's hands, as pixels too."""
    data = recipe.data
    normalised, decoded = 12 * data.image_size**2, 3 * (data.image_size + data.crop_margin) ** 2
    if device.type == "cuda":
        return size * (data.prefetch + 1) * normalised
    return size * ((data.prefetch + UNDER_WAY) * normalised + UNDER_WAY * decoded)


def _recorded(checkpoint: Path | None, place: Place) -> int:
    """The micro-batch that a checkpoint's run had, 0 where it is not to be kept."""
    if checkpoint is None:
        return 0
    document = read_document(checkpoint)
    size = document["recipe"]["train"]["micro_batch_size"]
    ranks = document["state"]["world_size"]
    return (size or document["state"]["batch_size"] // ranks) if ranks == place.world_size else 0


# ---------------------------------------------------------------- by real steps
def _by_steps(recipe: Recipe, place: Place, outputs: int, vocabulary: int, limit: float) -> Callable[[int], bool]:
    """Whether steps of a micro-batch fit into `limit` bytes of a GPU, on all ranks."""
    device = torch_device(place)

    def fits(size: int) -> bool:
        # Every rank has the same limit, so that all run out of memory at the same operator: one that did alone would
        # leave the others waiting in a collective.
        allowed = limit - loader_bytes(recipe, size, device)
        if allowed <= 0:
            return False
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
        try:
            return steps_fit(of_micro_batch(recipe, size), place, outputs, vocabulary)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    return fits


def steps_fit(recipe: Recipe, place: Place, outputs: int, vocabulary: int = 0) -> bool:
    """Whether steps of the recipe, which has a number for its micro-batch, fit into the memory on every rank.

    Makes them, on blank images, by PyTorch's own operators, which take the most; compiling for each size would take
    minutes. All ranks call this together, and must run out of memory together. Leaves nothing behind.
    """
    try:
        _make_steps(recipe, place, outputs, vocabulary)
        done = True
    except torch.OutOfMemoryError:
        done = False
    gc.collect()  # here, where the error no longer refers to what did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return all(gather(done, place))


def _make_steps(recipe: Recipe, place: Place, outputs: int, vocabulary: int) -> None:
    device = torch_device(place)
    recipe = replace(recipe, model=replace(recipe.model, weights="none", compile="none"))
    with device:
        model, _ = build_model(recipe.model, recipe.data.image_size, outputs, vocabulary, [""] * outputs)
    step = build_step(model, recipe, place, [1] * outputs, graphs=False)
    try:
        average = WeightAverage(model, recipe.train.ema) if recipe.train.ema else None
        size = recipe.train.micro_batch_size
        assert isinstance(size, int)
        batches = repeat(blank_batch(recipe, size or recipe.train.batch_size // place.world_size, outputs, device))
        for number in range(_STEPS):
            step(batches, 0.0, number)
            if average is not None:
                average.update(number + 1)
        synchronize(device)
    finally:
        step.engine.destroy()  # which something of DeepSpeed's refers to
