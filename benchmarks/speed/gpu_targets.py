"""What the GPU suite aims at, and whether its rows meet it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.speed.gpu_plan import LEFT_LIMIT_MB, PRODUCTS, RUN, Scale
from benchmarks.tables import Row


def targets(rows: Sequence[Row], scale: Scale) -> list[Row]:
    """All targets: value, limit, and whether it is met; value and met are None where nothing is there to say so.

    Of several rows the worst counts, but for MFU, which is the best variant's.
    """
    large, base, first, last = scale.large, scale.base, scale.batches[0], scale.batches[-1]
    found = [_target(f"MFU of the matrix product, {large} batch {first}", 0.55, best(rows, large, first), True)]
    for backbone in (large, base):
        over = values(rows, "over_bare", backbone, first, compile="kernels")
        found.append(_target(f"compiled step over a plain loop's, {backbone} batch {first}", 1.03, max_of(over)))
    rates = values(rows, "graphs_images_per_s", base, last, compile="kernels")
    found.append(_target(f"images/s in a CUDA graph, {base} batch {last}", 3300, max(rates, default=None), True))
    memory = values(rows, "memory_over_bare", large, first, compile="none")
    found.append(_target(f"peak memory over a plain loop's, {large} batch {first}", 1.1, max_of(memory)))
    launched = (("none", "ifa_over_cls", "eager"), ("kernels", "ifa_over_cls", "compiled"))
    for backbone in (large, base):
        for compile, key, words in (*launched, ("kernels", "ifa_over_cls_graphs", "compiled in a CUDA graph")):
            time = max_of(values(rows, key, backbone, first, compile=compile))
            over = None if time is None else round(time - 1, 4)
            found.append(_target(f"IFA over CLS, share of time, {backbone} batch {first}, {words}", 0.005, over))
    floats = values(rows, "ifa_over_cls_in_bdl", batch_size=first)
    found.append(_target(f"IFA over CLS, memory in (B, D, L) floats, batch {first}", 1.0, max_of(floats)))
    loaders = {key: values(rows, key, data_device="gpu") for key in ("over_dali", "cpu_over_dali")}
    found.append(_target("GPU loader over DALI's usual pipeline, images/s", 1.0, min_of(loaders["over_dali"]), True))
    found.append(_target("GPU loader over DALI's usual pipeline, host work", 1.0, max_of(loaders["cpu_over_dali"])))
    for backbone, limit in ((large, 1.02), (base, 1.04)):
        over = max_of(values(rows, "over_model", backbone, first, compile="kernels"))
        found.append(_target(f"end to end over the model alone, {backbone} batch {first}", limit, over))
    found.append(_target("share of a step that waits for data", 0.01, max_of(values(rows, "data_wait_share"))))
    found.append(_target("first batch of a run, s", 0.5, max_of(first_batches(rows))))
    found.append(_target("share of matrix products in bf16", 1.0, min_of(bf16_shares(rows)), True))
    found.append(_target("left by a point, MB of torch's memory", LEFT_LIMIT_MB, max_of(values(rows, "left_mb"))))
    return found


def values(
    rows: Sequence[Row], key: str, backbone: str | None = None, batch_size: int | None = None, **more: Any
) -> list[float]:
    """What the rows of such a model and batch have under a key."""
    wanted = more | ({"backbone": backbone} if backbone else {}) | ({"batch_size": batch_size} if batch_size else {})
    mine = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return [row[key] for row in mine if row.get(key) is not None]


def best(rows: Sequence[Row], backbone: str, batch: int) -> float | None:
    """The highest MFU."""
    return max(values(rows, "mfu_of_matmul", backbone, batch), default=None)


def first_batches(rows: Sequence[Row]) -> list[float]:
    """Of runs: in a process that has loaded before, a first batch comes sooner."""
    return values([row for row in rows if row["what"] == RUN], "first_batch_s")


def bf16_shares(rows: Sequence[Row]) -> list[float]:
    """Of the check that counts them."""
    checked = [row for row in rows if row["what"] == PRODUCTS]
    return [value for row in checked for key, value in row.items() if "bf16" in key]


def max_of(found: Sequence[float]) -> float | None:
    """The largest, None of nothing."""
    return max(found, default=None)


def min_of(found: Sequence[float]) -> float | None:
    """The smallest, None of nothing."""
    return min(found, default=None)


def _target(what: str, limit: float, value: float | None, at_least: bool = False) -> Row:
    met = None if value is None else value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "at most"
    return {"what": f"target: {what}", "value": value, "bound": bound, "limit": limit, "met": met}
