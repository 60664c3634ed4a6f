"""The training loader beside DALI's usual pipeline: what the GPU suite measures of loading."""

from __future__ import annotations

import ast
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend

from benchmarks.speed.energy import nvml_device
from benchmarks.speed.gpu_profile import kernels_of
from benchmarks.speed.peers import PREPARED, Task, dali_native
from benchmarks.speed.step_point import load
from benchmarks.tables import Row
from dist_train.config import recipe_from_dict
from dist_train.train.engine import init_process_group
from dist_train.train.meters import synchronize


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


def decoder(on_gpu: bool) -> dict[str, Any]:
    """Which of DALI's decoders the pipeline uses, and what share of the images it may give to the hardware decoder.

    hw_decoder_load is the operator's default, which the pipeline does not change: an upper bound where the GPU has such
    a decoder, not a measurement. None on the CPU.
    """
    if not on_gpu:
        return {"decoder": "cpu", "hw_decoder_load": None}
    schema = backend.TryGetSchema("decoders__Image")  # type: ignore[attr-defined]
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
        with suppress(Exception):  # no library, or no such figure
            nvml, handle = nvml_device(torch.device("cuda", 0))
            while not self._end.wait(0.05):
                self.highest = max(self.highest or 0, int(nvml.nvmlDeviceGetJpgUtilization(handle)[0]))
