"""Training steps in turns with whatever they are compared with: what the GPU suite measures of them.

`benchmarks/speed/gpu_plan.py` says with what. The device is the GPU if there is one, else the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch

from benchmarks.speed.bare import bare_step
from benchmarks.speed.energy import EnergyMeter, joules_per_step
from benchmarks.speed.gpu_profile import kernels_of
from benchmarks.speed.memory import allocated, free_memory, peak_bytes, peak_mb
from benchmarks.speed.own_step import OwnStep, synthetic_batch
from benchmarks.speed.peers import PREPARED
from benchmarks.speed.step import PAPER_CLASSES, SYNTHETIC_VOCABULARY, describe
from benchmarks.speed.step_point import load, utilisation
from benchmarks.speed.timing import median_ms, ratio, timed, timed_in_turns
from benchmarks.tables import Row
from dist_train.config import Head, Recipe, recipe_from_dict
from dist_train.data.loader import Batch
from dist_train.models.backbones import timm_name
from dist_train.models.names import vit_shape
from dist_train.place import Place
from dist_train.train.engine import init_process_group, torch_device
from dist_train.train.meters import forget_peak_memory, memory_figures, synchronize

WARM_UP = 3  # steps of each contestant: the first is looked at, the second compiles, all allocate
PROFILED = 3  # steps whose kernels are looked at
Contestants = dict[str, Callable[[int], Any]]


def measure_steps(point: Row) -> Row:
    """Training steps of a recipe's model on one batch, in turns with whatever it is compared with.

    step_ms is of PyTorch's operators or compiled kernels launched one by one, graphs_ms of the same in a CUDA graph.
    NAME_ms is a plain loop's, over_NAME the ratio to it (turn by turn, as all ratios); ifa_over_cls that of the IFA
    head to the CLS head. memory_mb is torch's peak, device_mb what the whole GPU then has in use, both before anything
    else is built. loaded_ms is a step on images that are loaded, over_model its ratio to one that loads nothing.
    point: as `gpu_plan.steps` makes it.
    """
    with ExitStack() as let_go:
        return _steps(point, let_go)


def _steps(point: Row, let_go: ExitStack) -> Row:
    recipe = recipe_from_dict(point["recipe"])
    place = init_process_group()
    batch = recipe.train.batch_size
    row: Row = describe(recipe, "synthetic")

    begin, base = time.perf_counter(), allocated(torch_device(place))
    own = let_go.enter_context(closing(own_step(recipe, place, recipe.model.head)))
    device = own.device
    synthetic = synthetic_batch(recipe, batch, PAPER_CLASSES, device)
    batches = repeat(synthetic)
    warm_up(lambda _: own(batches), device)
    row |= {"ready_s": round(time.perf_counter() - begin, 1), "matrix_products": own.products}
    loaded: Iterator[Batch] = iter(())
    if point["loaded"]:
        loaded, _, figures = load(recipe, place)
        row |= figures
    forget_peak_memory(device)
    timed(lambda _: own(loaded if point["loaded"] else batches), 0, 2, device)
    row |= memory_figures(device)
    for count in ("allocation_retries", "out_of_memory"):  # of this process so far, of other points too
        row.pop(count, None)
    own_mb = peak_mb(lambda: own(batches), device, base)

    contestants: Contestants = {"own": lambda _: own(batches)}
    recording = [own]
    if point["ifa"]:
        with_ifa = let_go.enter_context(closing(own_step(recipe, place, "ifa")))
        contestants["ifa"] = lambda _: with_ifa(batches)
        recording.append(with_ifa)
        warm_up(contestants["ifa"], device)
        row |= ifa_memory(recipe, lambda: own(batches), lambda: with_ifa(batches), device)
    for which, how in point["bare"].items():
        base = allocated(device)
        step = bare_contestant(recipe, synthetic, how)
        contestants[which] = launched(step)
        warm_up(contestants[which], device)
        if not which.endswith("graphs"):  # what a graph holds is no part of the allocator's peak
            peak = peak_mb(step, device, base)
            row |= {f"{which}_memory_mb": round(peak, 1), f"memory_over_{which}": round(own_mb / peak, 4)}

    # Graph against graph, and launched one by one against the like.
    graphed = {which: step for which, step in contestants.items() if which.endswith("graphs")}
    alike = {which: step for which, step in contestants.items() if which not in graphed}
    figures, seconds, profiles = in_turns(alike, point, batch, device)
    row |= figures
    if point["record"] and device.type == "cuda":
        for contestant in recording:
            contestant.record()
        recorded = {which: step for which, step in alike.items() if which in ("own", "ifa")}
        for again in recorded.values():
            warm_up(again, device)
        figures, graphs_seconds, more = in_turns(recorded | graphed, point, batch, device, graphs=True)
        row |= figures
        seconds, profiles = min(seconds, graphs_seconds), profiles | more
    row |= utilisation(recipe, own.flops, seconds, device)
    joules = joules_per_step(lambda: own(batches), seconds, EnergyMeter(device), device)
    row["joules_per_image"] = None if joules is None else round(joules / batch, 4)
    if point["loaded"]:
        row |= beside_loading(own, batches, loaded, point["loaded_steps"])
        if device.type == "cuda":  # the loader's kernels among the model's, and how long neither runs
            profiles["loaded"] = kernels_of(lambda: own(loaded), PREPARED)
    return row | {"profiles": profiles or None}


def in_turns(
    contestants: Contestants, point: Row, batch: int, device: torch.device, graphs: bool = False
) -> tuple[Row, float, dict[str, Row]]:
    """Figures of the contestants in turns, the median seconds of our own step, and on a GPU each one's kernels.

    graphs: whether our own steps are CUDA graphs.
    """
    times = timed_in_turns(contestants, point["turns"], 1, point["steps"], device)
    mine = times["own"]
    row: Row = {"graphs_ms" if graphs else "step_ms": median_ms(mine)}
    row["graphs_images_per_s" if graphs else "images_per_s"] = per_second(batch, mine)
    for which in (name for name in contestants if name not in ("own", "ifa")):
        row |= {f"{which}_ms": median_ms(times[which]), f"over_{which}": ratio(mine, times[which])}
    if "ifa" in times:
        suffix = "_graphs" if graphs else ""
        row |= {f"ifa{suffix}_ms": median_ms(times["ifa"]), f"ifa_over_cls{suffix}": ratio(times["ifa"], mine)}
        if not graphs:
            turns = [ratio([its], [cls]) for its, cls in zip(times["ifa"], mine, strict=True)]
            row |= {"ifa_over_cls_lowest": min(turns), "ifa_over_cls_highest": max(turns)}
    profiles = {}
    if device.type == "cuda":
        names = {"own": "graphs", "ifa": "ifa_graphs"} if graphs else {}
        kernels = {which: kernels_of(partial(step, 0), PROFILED) for which, step in contestants.items()}
        profiles = {names.get(which, which): found for which, found in kernels.items()}
    return row, float(np.median(np.concatenate(mine))), profiles


def compile_points(point: Row) -> Row:
    """Compile all that points of kind `steps` will measure, one after the other, and throw it away: torch keeps the
    kernels on disk, for whoever compiles the same. point: points, as `gpu_plan.steps` makes their arguments."""
    place = init_process_group()
    device = torch_device(place)
    for arguments in point["points"]:
        recipe = recipe_from_dict(arguments["recipe"])
        batch = synthetic_batch(recipe, recipe.train.batch_size, PAPER_CLASSES, device)
        batches = repeat(batch)
        for head in (recipe.model.head, "ifa") if arguments["ifa"] else (recipe.model.head,):
            with closing(own_step(recipe, place, head)) as own:
                own.train_step.products = "not looked at"  # the first step would else be one that compiles nothing
                warm_up(launched(partial(own, batches)), device)
            del own
            free_memory()
        for how in arguments["bare"].values():
            step = bare_contestant(recipe, batch, how)
            warm_up(launched(step), device)
            del step
            free_memory()
    return {"points": len(point["points"])}


def own_step(recipe: Recipe, place: Place, head: Head) -> OwnStep:
    """The recipe's step with a head, not as a CUDA graph."""
    vocabulary = SYNTHETIC_VOCABULARY if recipe.model.text_tokens else 0
    recipe = replace(recipe, model=replace(recipe.model, head=head))
    return OwnStep(recipe, place, PAPER_CLASSES, vocabulary, graphs=False)


def bare_contestant(recipe: Recipe, batch: Batch, how: tuple[str, str]) -> Callable[[], Any]:
    """The plain loop's step of the recipe's model. how: autocast or pure, and what compiles it."""
    arithmetic, compile = how
    name, arguments = timm_name(recipe.model.backbone, recipe.data.image_size)
    pure = arithmetic == "pure"
    return bare_step(name, arguments, PAPER_CLASSES, batch.images, batch.labels, pure=pure, compile=compile)


def beside_loading(own: OwnStep, batches: Iterator[Batch], loaded: Iterator[Batch], steps: int) -> Row:
    """Steps on what is loaded, in turns with the same on a batch that is there.

    A turn begins after as many steps as the loader may have prepared batches meanwhile.
    """
    waited: list[float] = []  # before each turn, and where its steps begin to count

    def on_loaded(number: int) -> None:
        if number in (0, PREPARED):
            waited.append(own.meter.data_wait())
        own(loaded)

    contestants = {"model": lambda _: own(batches), "loaded": on_loaded}
    times = timed_in_turns(contestants, 2, PREPARED, steps, own.device)
    waited.append(own.meter.data_wait())
    waits = [after - before for before, after in zip(waited[1::2], waited[2::2], strict=True)]
    total = sum(map(sum, times["loaded"]))
    return {
        "loaded_ms": median_ms(times["loaded"]),
        "loaded_images_per_s": per_second(own.recipe.train.batch_size, times["loaded"]),
        "over_model": ratio(times["loaded"], times["model"]),
        "data_wait_share": round(sum(waits) / total, 4),
    }


def ifa_memory(recipe: Recipe, cls: Callable[[], Any], with_ifa: Callable[[], Any], device: torch.device) -> Row:
    """What a step with the IFA head allocates more than one with the CLS head: in MB, and in (B, D, L) floats."""
    more = peak_bytes(with_ifa, device) - peak_bytes(cls, device)
    shape = vit_shape(recipe.model.backbone)
    assert shape is not None  # the suite's own backbones are ViTs
    floats = recipe.train.batch_size * shape.dim * shape.depth
    return {"ifa_over_cls_mb": round(more / 1e6, 3), "ifa_over_cls_in_bdl": round(more / (4 * floats), 3)}


def warm_up(step: Callable[[int], Any], device: torch.device) -> None:
    """A few steps before any that count."""
    for number in range(WARM_UP):
        step(number)
    synchronize(device)


def launched(step: Callable[[], Any]) -> Callable[[int], Any]:
    """The step as `timed` calls it, with a number that it does not need."""
    return lambda _: step()


def per_second(batch: int, turns: list[list[float]]) -> float:
    """Images a second at the median step."""
    return round(batch / float(np.median(np.concatenate(turns))), 1)
