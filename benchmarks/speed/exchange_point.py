"""A rank whose contestants exchange gradients over a slow cable: the child's end of the benchmark `exchange`.

All contestants have a model of their own in the same two processes and take turns at every step, so that whatever else
the machine does meets all of them.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.speed.engine_point import (
    CLASSES,
    Step,
    bare_loop,
    changed_engine,
    engine_loop,
    make_recipe,
    timed_step,
    updating,
)
from dist_train.config import Recipe, ZeroStage
from dist_train.models.build import Classifier, build_model
from dist_train.train.engine import build_optimizer, init_process_group
from dist_train.train.exchange import GradientExchange, forward_order

BUCKETS_MB = (2.0, 5.0, 10.0, 25.0)
_SMALL = {"reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000}
# Settings of ZeRO that cost nothing to change, over those of our configuration; bucket sizes in numbers.
ZERO_SETTINGS: dict[str, dict[str, Any]] = {
    "overlap_comm": {"overlap_comm": True},
    "small buckets": _SMALL,
    "small buckets, overlap_comm": {"overlap_comm": True, **_SMALL},
    "not contiguous": {"contiguous_gradients": False},
}
COMPUTING_STEPS = 5  # of the latest, for what computing takes
WARM_UP = 2  # steps of each: the first allocates, and DDP orders its buckets after it

AnyStep = Callable[[Tensor, Tensor], Any]


def measure_rank(point: dict[str, Any]) -> dict[str, Any]:
    """The rows, and what was measured besides; both ranks call this."""
    place = init_process_group()
    torch.manual_seed(place.rank)
    images = torch.randn(point["micro_batch"], 3, point["size"], point["size"])
    labels = torch.arange(point["micro_batch"]) % CLASSES
    loops, gradient_bytes = contestants(point)
    for _ in range(WARM_UP):
        for step in loops.values():
            timed(step, images, labels)
    computing_s = deque((timed(loops["alone"], images, labels)[0] for _ in range(COMPUTING_STEPS)), COMPUTING_STEPS)
    turns: dict[str, list[tuple[float, int]]] = {name: [] for name in loops}
    limits = []
    for turn in range(-1, point["turns"]):  # the first meets the limit and is not counted
        # Other work on the machine comes and goes: the cable stays as slow as the computing is just now. Two ranks send
        # each byte once: half of it as it is, half of it summed.
        mbit = gradient_bytes * 8 / 1e6 / statistics.median(computing_s)
        limit_bandwidth(mbit)
        limits.append(round(mbit))
        for name in list(loops) if turn % 2 == 0 else list(loops)[::-1]:
            turns[name].append(timed(loops[name], images, labels))
        computing_s.append(turns["alone"][-1][0])
    counted = {name: its[1:] for name, its in turns.items()}
    return {
        "measured": {
            "gradients_mb": round(gradient_bytes / 1e6, 1),
            "bandwidth_mbit_lowest": min(limits[1:]),
            "bandwidth_mbit_highest": max(limits[1:]),
        },
        "rows": rows_of(counted, round(statistics.median(limits[1:]))),
    }


def contestants(point: dict[str, Any]) -> tuple[dict[str, AnyStep], int]:
    """A step of each contestant by name, and the bytes of the gradients."""

    def recipe(stage: ZeroStage) -> Recipe:
        return make_recipe(point["backbone"], 2 * point["micro_batch"], stage)

    def model() -> Classifier:
        torch.manual_seed(0)
        return build_model(recipe(0).model, point["size"], CLASSES, 0)[0]

    def engine(stage: ZeroStage, whole_blocks: bool = True, **changes: Any) -> Step:
        changed = changed_engine(model(), recipe(stage), 2, point["micro_batch"], changes, whole_blocks=whole_blocks)
        return engine_loop(changed)

    gradient_bytes = sum(parameter.nbytes for parameter in model().parameters())
    flat = torch.zeros(gradient_bytes // 4)
    loops: dict[str, AnyStep] = {
        "alone": bare_loop(model(), recipe(0)),
        "exchange": lambda *_: torch.distributed.all_reduce(flat),
        "ddp": ddp_loop(model(), recipe(0)),
    }
    if point["set"] == "buckets":
        for bucket_mb in BUCKETS_MB:
            loops[f"ours, {bucket_mb:g} MB"] = our_loop(model(), recipe(0), bucket_mb=bucket_mb)
        return loops, gradient_bytes
    loops["ours"] = our_loop(model(), recipe(0))
    for stage in point["stages"]:
        loops[f"ZeRO {stage}" if stage else "DeepSpeed, ZeRO 0"] = engine(stage)
        for what, changes in ZERO_SETTINGS.items() if stage and point["set"] == "settings" else ():
            if not (stage == 3 and "contiguous_gradients" in changes):  # which ZeRO 3 needs
                loops[f"ZeRO {stage}, {what}"] = engine(stage, **changes)
        if stage == 3 and point["set"] == "settings":
            loops["ZeRO 3, layer by layer"] = engine(stage, whole_blocks=False)
    return loops, gradient_bytes


def our_loop(model: Classifier, recipe: Recipe, **options: float) -> Step:
    """A step with `GradientExchange`."""
    optimizer = build_optimizer(recipe.optim, model)
    exchange = GradientExchange(forward_order(model), 2, **options)

    def backward(loss: Tensor) -> None:
        exchange.begin()
        loss.backward()
        exchange.finish()

    return timed_step(model, backward, updating(optimizer))


def ddp_loop(model: Classifier, recipe: Recipe) -> Step:
    """A step with torch's DistributedDataParallel."""
    optimizer = build_optimizer(recipe.optim, model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return timed_step(wrapped, lambda loss: loss.backward(), updating(optimizer))


def timed(step: AnyStep, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """Seconds of one step, begun together, on the rank that took longer; bytes that this rank put on the cable."""
    torch.distributed.barrier()
    sent, start = sent_bytes(), time.perf_counter()
    step(images, labels)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return float(seconds), sent_bytes() - sent


def sent_bytes() -> int:
    """What this namespace has put on the cable, with all headers."""
    return psutil.net_io_counters(pernic=True)["eth0"].bytes_sent


def limit_bandwidth(mbit: float) -> None:
    """Limit what this namespace sends to so many 10^6 bits a second."""
    # What may leave at once is small beside a step's bytes, and the queue long enough that nothing is dropped.
    shape = f"tc qdisc replace dev eth0 root tbf rate {mbit * 1000:.0f}kbit burst 256kb limit 16mb"
    subprocess.run(shape.split(), check=True)


def rows_of(turns: dict[str, list[tuple[float, int]]], mbit: int) -> list[dict[str, Any]]:
    """A row for each contestant: medians over the turns, of ratios and differences within a turn."""
    seconds = {name: [spent for spent, _ in its] for name, its in turns.items()}
    rows = []
    for name, its in seconds.items():
        ratios = [mine / ddp for mine, ddp in zip(its, seconds["ddp"], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        row = {"contestant": name, "turns": len(its), "step_ms": round(1000 * statistics.median(its), 1)}
        if name != "exchange":
            exposed = [mine - alone for mine, alone in zip(its, seconds["alone"], strict=True)]
            shares = [left / whole for left, whole in zip(exposed, seconds["exchange"], strict=True)]
            row |= {
                "step_over_ddp": round(middle, 4),
                "step_over_ddp_lower_quartile": round(lower, 4),
                "step_over_ddp_upper_quartile": round(upper, 4),
                "exposed_ms": round(1000 * statistics.median(exposed), 1),
                "exposed_share": round(statistics.median(shares), 4),
            }
        row["sent_mb"] = round(statistics.median(sent for _, sent in turns[name]) / 1e6, 2)
        rows.append(row | {"bandwidth_mbit": mbit})
    return rows
