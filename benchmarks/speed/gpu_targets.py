"""What the GPU suite aims at, and whether its rows meet it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.speed.gpu_plan import LEFT_LIMIT_MB, PRODUCTS, RUN, Scale
from benchmarks.tables import Row

AT_LEAST, AT_MOST = "at least", "at most"


def targets(rows: Sequence[Row], scale: Scale) -> list[Row]:
    """All targets: value, limit, and whether it is met; value and met are None where nothing is there to say so.

    Of several rows the worst counts, but for MFU and images/s in a CUDA graph, which are the best variant's.
    """
    large, base, first, last = scale.large, scale.base, scale.batches[0], scale.batches[-1]
    eager, compiled = {"batch_size": first, "compile": "none"}, {"batch_size": first, "compile": "kernels"}
    on_gpu = {"data_device": "gpu"}
    mfu = values(rows, "mfu_of_matmul", backbone=large, batch_size=first)
    rates = values(rows, "graphs_images_per_s", backbone=base, batch_size=last, compile="kernels")
    # In a process that has loaded before, a first batch comes sooner: only those of runs count.
    first_batches = values(rows, "first_batch_s", what=RUN)
    bf16 = [value for row in rows if row["what"] == PRODUCTS for key, value in row.items() if "bf16" in key]
    found = [(f"MFU of the matrix product, {large} batch {first}", AT_LEAST, 0.55, sorted(mfu)[-1:])]
    for backbone in (large, base):
        over = values(rows, "over_bare", backbone=backbone, **compiled)
        found.append((f"compiled step over a plain loop's, {backbone} batch {first}", AT_MOST, 1.03, over))
    found.append((f"images/s in a CUDA graph, {base} batch {last}", AT_LEAST, 3300, sorted(rates)[-1:]))
    over = values(rows, "memory_over_bare", backbone=large, **eager)
    found.append((f"peak memory over a plain loop's, {large} batch {first}", AT_MOST, 1.1, over))
    ways = (
        ("ifa_over_cls", eager, "eager"),
        ("ifa_over_cls", compiled, "compiled"),
        ("ifa_over_cls_graphs", compiled, "compiled in a CUDA graph"),
    )
    for backbone in (large, base):
        for key, how, words in ways:
            over = [round(value - 1, 4) for value in values(rows, key, backbone=backbone, **how)]
            found.append((f"IFA over CLS, share of time, {backbone} batch {first}, {words}", AT_MOST, 0.005, over))
    floats = values(rows, "ifa_over_cls_in_bdl", batch_size=first)
    found += [
        (f"IFA over CLS, memory in (B, D, L) floats, batch {first}", AT_MOST, 1.0, floats),
        ("GPU loader over DALI's usual pipeline, images/s", AT_LEAST, 1.0, values(rows, "over_dali", **on_gpu)),
        ("GPU loader over DALI's usual pipeline, host work", AT_MOST, 1.0, values(rows, "cpu_over_dali", **on_gpu)),
    ]
    for backbone, limit in ((large, 1.02), (base, 1.04)):
        over = values(rows, "over_model", backbone=backbone, **compiled)
        found.append((f"end to end over the model alone, {backbone} batch {first}", AT_MOST, limit, over))
    found += [
        ("share of a step that waits for data", AT_MOST, 0.01, values(rows, "data_wait_share")),
        ("first batch of a run, s", AT_MOST, 0.5, first_batches),
        ("share of matrix products in bf16", AT_LEAST, 1.0, bf16),
        ("left by a point, MB of torch's memory", AT_MOST, LEFT_LIMIT_MB, values(rows, "left_mb")),
    ]
    return [_target(*target) for target in found]


def values(rows: Sequence[Row], key: str, **wanted: Any) -> list[float]:
    """What the rows that have all that is wanted have under a key."""
    mine = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return [row[key] for row in mine if row.get(key) is not None]


def _target(what: str, bound: str, limit: float, found: Sequence[float]) -> Row:
    worst = min if bound == AT_LEAST else max
    value = worst(found) if found else None
    met = None if value is None else value >= limit if bound == AT_LEAST else value <= limit
    return {"what": f"target: {what}", "value": value, "bound": bound, "limit": limit, "met": met}
