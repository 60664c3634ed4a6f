"""What the GPU suite measures (`benchmarks/gpu_plan.py` says with what): steps, loaders.

The device is the GPU if there is one, else the CPU.
"""

from __future__ import annotations

import ast
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend

from benchmarks import ifa
from benchmarks.bare import bare_step
from benchmarks.gpu_profile import kernels_of
from benchmarks.memory import allocated, free_memory, peak_mb
from benchmarks.own_step import OwnStep, synthetic_batch
from benchmarks.peers import PREPARED, Task, dali_native
from benchmarks.step import PAPER_CLASSES, SYNTHETIC_VOCABULARY, describe, load, recipe_from_dict, utilisation
from benchmarks.timing import EnergyMeter, median_ms, ratio, timed, timed_in_turns
from dist_train.config import Recipe
from dist_train.data.loader import Batch
from dist_train.models.backbones import timm_name
from dist_train.models.names import vit_shape
from dist_train.place import Place
from dist_train.train.engine import init_process_group, torch_device
from dist_train.train.meters import forget_peak_memory, memory_figures, synchronize

Row = dict[str, Any]
WARM_UP = 3  # steps of each contestant: the first is looked at, the second compiles, all allocate
PROFILED = 3  # steps whose kernels are looked at
ENERGY_S = 1.0  # of steps; a GPU's counter moves every tenth of a second or so


def measure_steps(point: Row) -> Row:
    """As `steps_of` says, which this frees."""
    with ExitStack() as let_go:
        return steps_of(point, let_go)


def steps_of(point: Row, let_go: ExitStack) -> Row:
    """Training steps of a recipe's model on one batch, in turns with whatever it is compared with.

    step_ms is of PyTorch's operators or compiled kernels launched one by one, graphs_ms of the same in a CUDA graph.
    NAME_ms is a plain loop's, over_NAME the ratio to it (turn by turn, as all ratios); ifa_over_cls that of the IFA
    head to the CLS head. memory_mb is torch's peak, device_mb what the whole GPU then has in use, both before anything
    else is built. loaded_ms is a step on images that are loaded, over_model its ratio to one that loads nothing.
    point: as `gpu_plan.steps` makes it.
    """
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
    row.pop("out_of_memory", None)  # how often it was in this process so far, in other points
    own_mb = peak_mb(lambda: own(batches), device, base)

    contestants: dict[str, Callable[[int], Any]] = {"own": lambda _: own(batches)}
    if point["ifa"]:
        with_ifa = let_go.enter_context(closing(own_step(recipe, place, "ifa")))
        contestants["ifa"] = lambda _: with_ifa(batches)
        warm_up(contestants["ifa"], device)
        row |= ifa_memory(recipe, lambda: own(batches), lambda: with_ifa(batches), device)
    for which, how in point["bare"].items():
        base = allocated(device)
        step = bare_contestant(recipe, synthetic, how)
        contestants[which] = lambda _, step=step: step()
        warm_up(contestants[which], device)
        if not which.endswith("graphs"):  # what a graph holds is no part of the allocator's peak
            peak = peak_mb(step, device, base)
            row |= {f"{which}_memory_mb": round(peak, 1), f"memory_over_{which}": round(own_mb / peak, 4)}

    # Graph against graph, and launched one by one against the like.
    graphed = {which for which in point["bare"] if which.endswith("graphs")}
    alike = {which: step for which, step in contestants.items() if which not in graphed}
    times = timed_in_turns(alike, point["turns"], 1, point["steps"], device)
    row |= {"step_ms": median_ms(times["own"]), "images_per_s": per_second(batch, times["own"])}
    for which in (name for name in point["bare"] if name not in graphed):
        row |= {f"{which}_ms": median_ms(times[which]), f"over_{which}": ratio(times["own"], times[which])}
    if point["ifa"]:
        turns = [ratio([mine], [cls]) for mine, cls in zip(times["ifa"], times["own"], strict=True)]
        row |= {"ifa_ms": median_ms(times["ifa"]), "ifa_over_cls": ratio(times["ifa"], times["own"])}
        row |= {"ifa_over_cls_lowest": min(turns), "ifa_over_cls_highest": max(turns)}

    profiles: dict[str, Row] = {}
    if device.type == "cuda":
        profiles = {which: kernels_of(partial(step, 0), PROFILED) for which, step in alike.items()}
    seconds = float(np.median(np.concatenate(times["own"])))
    if point["record"] and device.type == "cuda":
        own.record()
        recorded = {"own": contestants["own"]}
        if point["ifa"]:
            with_ifa.record()
            recorded["ifa"] = contestants["ifa"]
        for step in recorded.values():
            warm_up(step, device)
        contestants = recorded | {which: contestants[which] for which in graphed}
        times = timed_in_turns(contestants, point["turns"], 1, point["steps"], device)
        if point["ifa"]:
            row |= {"ifa_graphs_ms": median_ms(times["ifa"])}
            row |= {"ifa_over_cls_graphs": ratio(times["ifa"], times["own"])}
        row |= {"graphs_ms": median_ms(times["own"]), "graphs_images_per_s": per_second(batch, times["own"])}
        for which in graphed:
            row |= {f"{which}_ms": median_ms(times[which]), f"over_{which}": ratio(times["own"], times[which])}
        names = {"own": "graphs", "ifa": "ifa_graphs"}
        profiles |= {
            names.get(which, which): kernels_of(partial(step, 0), PROFILED) for which, step in contestants.items()
        }
        seconds = min(seconds, float(np.median(np.concatenate(times["own"]))))
    row |= utilisation(recipe, own.flops, seconds, device)
    row["joules_per_image"] = joules_per_image(lambda: own(batches), batch, seconds, device)
    if point["loaded"]:
        row |= beside_loading(own, batches, loaded, point["loaded_steps"])
    return row | {"profiles": profiles or None}


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
                warm_up(lambda _, own=own, batches=batches: own(batches), device)
            del own
            free_memory()
        for how in arguments["bare"].values():
            step = bare_contestant(recipe, batch, how)
            warm_up(lambda _, step=step: step(), device)
            del step
            free_memory()
    return {"points": len(point["points"])}


def own_step(recipe: Recipe, place: Place, head: str) -> OwnStep:
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
    more = ifa.peak_bytes(with_ifa, device) - ifa.peak_bytes(cls, device)
    shape = vit_shape(recipe.model.backbone)
    floats = recipe.train.batch_size * shape.dim * shape.depth
    return {"ifa_over_cls_mb": round(more / 1e6, 3), "ifa_over_cls_in_bdl": round(more / (4 * floats), 3)}


def measure_loader(point: Row) -> Row:
    """The training loader in turns with DALI's usual pipeline, on the same device, threads and shards.

    cpu_s_per_1000: processor time of this process for 1,000 images. point: recipe, turns, batches (of a turn).
    """
    recipe = recipe_from_dict(point["recipe"])
    place = init_process_group()
    on_gpu = torch.cuda.is_available() and recipe.data.device != "cpu"
    threads = recipe.data.threads or len(os.sched_getaffinity(0))
    data, batch = recipe.data, recipe.train.batch_size
    row: Row = {"loader": "this project", "batch_size": batch, "image_size": data.image_size, "threads": threads}
    row["data_device"] = "gpu" if on_gpu else "cpu"
    row |= decoder(on_gpu)
    own, _, figures = load(recipe, place)
    task = Task(data.shards, data.image_size, data.crop_margin, batch, threads, "")
    streams = {"own": own, "dali": dali_native.batches(task, place.device_id if on_gpu else None)}
    rates: dict[str, list[float]] = {name: [] for name in streams}
    cpu: dict[str, list[float]] = {name: [] for name in streams}
    device = torch.device("cuda" if on_gpu else "cpu")
    highest: list[int] = []
    for turn in range(point["turns"]):
        for name in list(streams)[:: 1 if turn % 2 == 0 else -1]:
            with JpegEngine(watch=on_gpu and name == "own") as jpeg:
                seconds, used = take(streams[name], point["batches"], device)
            rates[name].append(point["batches"] * batch / seconds)
            cpu[name].append(1e3 * used / (point["batches"] * batch))
            highest += [] if jpeg.highest is None else [jpeg.highest]
    row |= {"images_per_s": round(float(np.median(rates["own"])), 1)}
    row |= {"dali_images_per_s": round(float(np.median(rates["dali"])), 1)}
    row |= {"over_dali": round(float(np.median(np.divide(rates["own"], rates["dali"]))), 4)}
    row |= {"cpu_s_per_1000": round(float(np.median(cpu["own"])), 4)}
    row |= {"dali_cpu_s_per_1000": round(float(np.median(cpu["dali"])), 4)}
    row |= {"cpu_over_dali": round(float(np.median(cpu["own"]) / np.median(cpu["dali"])), 4)}
    row |= figures | {"jpeg_engine_busy_highest": max(highest, default=None)}
    if on_gpu:
        row["profiles"] = {name: kernels_of(partial(next, stream), PREPARED) for name, stream in streams.items()}
    return row


def take(stream: Iterator[Any], batches: int, device: torch.device) -> tuple[float, float]:
    """Take that many batches, after as many as may have been prepared. Returns seconds, and seconds of processor."""
    for _ in range(PREPARED):
        next(stream)
    synchronize(device)
    before, begin = time.process_time(), time.perf_counter()
    for _ in range(batches):
        next(stream)
    synchronize(device)
    return time.perf_counter() - begin, time.process_time() - before


KINDS: dict[str, Callable[[Row], Row]] = {
    "steps": measure_steps,
    "compile": compile_points,
    "loader": measure_loader,
}


def warm_up(step: Callable[[int], Any], device: torch.device) -> None:
    """A few steps before any that count."""
    for number in range(WARM_UP):
        step(number)
    synchronize(device)


def per_second(batch: int, turns: list[list[float]]) -> float:
    """Images a second at the median step."""
    return round(batch / float(np.median(np.concatenate(turns))), 1)


def joules_per_image(step: Callable[[], Any], batch: int, seconds: float, device: torch.device) -> float | None:
    """Energy of as many steps of about `seconds` as its counter needs to be true; None where there is no counter."""
    meter, steps = EnergyMeter(device), math.ceil(ENERGY_S / seconds)
    if meter.read() is None:
        return None
    synchronize(device)
    meter.start()
    for _ in range(steps):
        step()
    synchronize(device)
    return round(meter.read() / (steps * batch), 4)


def decoder(on_gpu: bool) -> dict[str, Any]:
    """Which of DALI's decoders the pipeline uses, and what share of the images it may give to the hardware decoder.

    hw_decoder_load is the operator's default, which the pipeline does not change: an upper bound where the GPU has such
    a decoder, not a measurement. None on the CPU.
    """
    if not on_gpu:
        return {"decoder": "cpu", "hw_decoder_load": None}
    schema = backend.TryGetSchema("decoders__Image")
    return {
        "decoder": "mixed",
        "hw_decoder_load": ast.literal_eval(schema.GetArgumentDefaultValueString("hw_decoder_load")),
    }


class JpegEngine:
    """While this lasts, watches the GPU's JPEG decoder through NVML.

    highest: the largest utilisation that was read, in percent of the driver's sampling period; None where there is no
    GPU, no NVML, or none that knows such a figure.
    """

    def __init__(self, watch: bool) -> None:
        self.highest: int | None = None
        self._end = threading.Event()
        watch = watch and torch.cuda.is_available()
        self._thread = threading.Thread(target=self._watch, daemon=True) if watch else None

    def __enter__(self) -> JpegEngine:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
            while not self._end.wait(0.05):
                self.highest = max(self.highest or 0, int(pynvml.nvmlDeviceGetJpgUtilization(handle)[0]))
        except Exception:  # no library, or no such figure
            return
