"""The epoch plan for more samples, shards and nodes than there are here: pure arithmetic, so none of them is needed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from dist_train.data.plan import EpochPlan
from dist_train.train.meters import peak_resident_mb

_STEPS_TIMED = 200


def make_plan(parameters: dict[str, int]) -> EpochPlan:
    """The plan, with shards of uneven sizes that sum to the number of samples."""
    even = parameters["samples"] // parameters["shards"]
    counts = np.full(parameters["shards"], even)
    uneven = np.random.default_rng(0).integers(0, even + 1, parameters["shards"] // 2)
    counts[: len(uneven)] -= uneven
    counts[len(uneven) : 2 * len(uneven)] += uneven
    counts[-1] += parameters["samples"] - counts.sum()
    return EpochPlan(counts, parameters["batch_size"], seed=0)


def measure_start(parameters: dict[str, int]) -> dict[str, Any]:
    """Time and memory of the last rank's first batch at parameters["step"] and of the batches after it."""
    step = parameters["step"]
    before = peak_resident_mb()
    plan_counts = make_plan(parameters).counts  # making up the counts is not part of the plan
    begin = time.perf_counter()
    plan = EpochPlan(plan_counts, parameters["batch_size"], seed=0)
    world_size = parameters["nodes"] * parameters["ranks_per_node"]
    consumed = step * parameters["batch_size"]
    plan.batch(consumed, world_size - 1, world_size)
    first_batch = time.perf_counter() - begin
    times = []
    for later in range(1, _STEPS_TIMED + 1):
        begin = time.perf_counter()
        plan.batch(consumed + later * parameters["batch_size"], world_size - 1, world_size)
        times.append(time.perf_counter() - begin)
    return {
        "what": f"start at step {step:,}",
        "first_batch_ms": round(1e3 * first_batch, 1),
        "batch_ms_median": round(1e3 * statistics.median(times), 3),
        "batch_ms_highest": round(1e3 * max(times), 3),
        "memory_mb": round(peak_resident_mb() - before, 1),
    }


def follow_node(parameters: dict[str, int]) -> dict[str, Any]:
    """One epoch of parameters["node"]: the share of the data that lies in the shards it touches, and how many of them
    are in use at once."""
    node = parameters["node"]
    plan = make_plan(parameters)
    ranks = range(node * parameters["ranks_per_node"], (node + 1) * parameters["ranks_per_node"])
    world_size = parameters["nodes"] * parameters["ranks_per_node"]
    first_use: dict[int, int] = {}
    last_use: dict[int, int] = {}
    seen = 0
    for step in range(parameters["samples"] // parameters["batch_size"]):
        for rank in ranks:
            chosen = plan.batch(step * parameters["batch_size"], rank, world_size)
            seen += len(chosen)
            for shard in set(chosen.shard.tolist()):
                first_use.setdefault(shard, step)
                last_use[shard] = step
    return {
        "what": f"one epoch of node {node}",
        "samples_seen": seen,
        "shards_read": len(first_use),
        "read_over_share": round(int(plan.counts[list(first_use)].sum()) / seen, 4),
        "shards_in_use_at_once": most_at_once(first_use.values(), last_use.values()),
    }


def most_at_once(begins: Iterable[int], ends: Iterable[int]) -> int:
    """The largest number of closed intervals that overlap."""
    changes = sorted([(begin, 1) for begin in begins] + [(end + 1, -1) for end in ends])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
