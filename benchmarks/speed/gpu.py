"""A GPU measured in one command, `benchmarks/gpu_suite.sh`: is it right, how fast is it, does the data keep up.

A list of points, the most important first (`gpu_plan.py`), which one process measures one after the other
(`gpu_child.py`). The result, `benchmarks/results/gpu/NAME.json`, is written after every point, so a run that is cut off
at any moment leaves all rows that were finished, and the same command continues after them (on the same machine and
commit). A point for which the time left may not do is skipped, and one that fails, hangs or ends its process becomes a
row with "error": none of them ends the suite.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from benchmarks import result
from benchmarks.benchmark import Benchmark
from benchmarks.points import Child
from benchmarks.speed.gpu_plan import FULL, SMOKE, Point, plan
from benchmarks.speed.gpu_targets import targets
from benchmarks.tables import Columns, Document, Row, Table, describe_row, table_of, text_of
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.ranges import NOT_NEGATIVE

BUDGET_S = 480.0
POINT_LIMIT_S = 200.0  # a point that takes longer, and twice as long as expected, hangs
SMOKE_RESULTS = Path("data/gpu-suite-smoke/results")
_TOO_MUCH_MB = 1000.0  # what a point leaves allocated would change the next one's figures: that one gets a new process


@dataclass(frozen=True)
class Arguments:
    """A GPU measured in one command; use benchmarks/gpu_suite.sh, which draws the images first."""

    shards: Path
    """a set of images baked to the training square"""
    smoke: bool = False
    """small models and a few steps, on the CPU if need be"""
    name: str | None = None
    """of the result: benchmarks/results/gpu/NAME.json (by default the device's name)"""
    budget: Annotated[float, NOT_NEGATIVE] = BUDGET_S
    """seconds to finish within"""
    results: Path | None = None
    """a folder in place of benchmarks/results (with --smoke: data/gpu-suite-smoke/results)"""


def run(arguments: Arguments) -> None:
    """Run the suite and say each row and target. Raises WorkError if a correctness point failed."""
    import torch

    begin = time.monotonic()
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.smoke:
        raise UseError("there is no GPU here; --smoke runs the suite with small models on the CPU")
    if arguments.results or arguments.smoke:
        result.RESULTS = arguments.results or SMOKE_RESULTS
    name = arguments.name or re.sub(r"\W+", "-", torch.cuda.get_device_name() if gpu else "cpu").strip("-").lower()
    scale = SMOKE if arguments.smoke else FULL
    points = [point for point in plan(scale, str(arguments.shards)) if point.smoke or not arguments.smoke]
    parameters = asdict(scale) | {"smoke": arguments.smoke, "shards": str(arguments.shards)}
    command = shlex.join(["benchmarks/gpu_suite.sh", *(["--smoke"] if arguments.smoke else []), "--name", name])

    def write(rows: list[Row]) -> None:
        result.write_result("gpu", name, parameters, rows, {"command": command, "targets": targets(rows, scale)})

    with new_child() as child:

        def measure(point: Point, limit: float) -> Row:
            if not point.ahead:
                return ask(child, point.kind, point.arguments, limit)
            with new_child() as beside:
                return ask(beside, point.kind, point.arguments, limit)

        kept = result.finished_rows("gpu", name, parameters)
        rows = run_points(points, kept, begin + arguments.budget, gpu, measure, write)
    for target in targets(rows, scale):
        say(describe_row(target, target["what"]))
    checks = [row for row in rows if row["what"].startswith("check: ")]
    if failed := [row["what"] for row in checks if not row.get("met") and "skipped" not in row]:
        raise WorkError(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")


def new_child() -> Child:
    """A process that measures points of the suite."""
    return Child("benchmarks.speed.gpu_child:measure")


def ask(child: Child, kind: str, arguments: Row, limit: float) -> Row:
    """Figures of a point, or {"error": one line}. Raises TimeoutError after `limit` seconds."""
    try:
        row = child.ask({"kind": kind} | arguments, limit)
    except (UseError, WorkError) as error:
        print("\n".join(child.said().splitlines()[-30:]), file=sys.stderr, flush=True)
        return {"error": str(error)}
    if row.get("left_mb", 0.0) > _TOO_MUCH_MB:
        child.close()
    return row


def run_points(
    points: list[Point],
    kept: Iterable[Row],
    end: float,
    gpu: bool,
    measure: Callable[[Point, float], Row],
    write: Callable[[list[Row]], None],
) -> list[Row]:
    """The rows of all points, those in `kept` that hold figures as they are; `write` gets all there are after each.

    end: by time.monotonic(), when to be done; a point that may take longer than until then is not begun.
    measure(point, limit) returns figures, or raises TimeoutError after `limit` seconds; for points that run `ahead` it
    is called in other threads.
    """
    finished = {row["what"]: row for row in kept if "error" not in row and "skipped" not in row}
    rows = {point.what: finished[point.what] for point in points if point.what in finished}
    longest: dict[str, float] = {}

    def row_of(point: Point) -> Row:
        return _row(point, end - time.monotonic(), longest.get(point.takes_as, point.seconds), gpu, measure)

    with ThreadPoolExecutor() as pool:
        ahead = {point.what: pool.submit(row_of, point) for point in points if point.ahead and point.what not in rows}
        for point in points:
            if point.what in rows:
                row = rows[point.what]
                say(f"{point.what}: kept from before")
            else:
                row = {"what": point.what} | (ahead[point.what].result() if point.ahead else row_of(point))
                rows[point.what] = row
                write([rows[done.what] for done in points if done.what in rows])
                say(describe_row(row, point.what))
            if "seconds" in row:
                longest[point.takes_as] = max(row["seconds"], longest.get(point.takes_as, 0.0))
    return [rows[point.what] for point in points]


def _row(point: Point, left: float, expected: float, gpu: bool, measure: Callable[[Point, float], Row]) -> Row:
    if point.needs_gpu and not gpu:
        return {"skipped": "needs a GPU"}
    if left <= expected:
        return {"skipped": "out of time"}
    begin, limit = time.monotonic(), max(POINT_LIMIT_S, 2 * point.seconds)
    try:
        figures = measure(point, min(left, limit))
    except TimeoutError:
        if left <= limit:
            return {"skipped": "out of time"}
        figures = {"error": f"no result after {limit:g} s"}
    return figures | {"seconds": round(time.monotonic() - begin, 2)}


def headline(document: Document) -> str:
    """How many targets are met."""
    known = [target for target in document.get("targets") or [] if target.get("met") is not None]
    met = sum(target["met"] is True for target in known)
    return f"{met} of {len(known)} targets met; {len(document['rows'])} rows" if known else ""


def tables(document: Document) -> list[Table]:
    """A table for each kind of point, and one for rows of no kind that is known."""
    rows = document["rows"]
    found, known = [], []
    for title, (begin, columns) in KINDS.items():
        if mine := [row for row in rows if text_of(row.get("what")).startswith(begin)]:
            found.append(table_of(title, columns, mine))
            known += mine
    others = [row for row in rows if row not in known]
    return found + ([table_of("", None, others)] if others or not rows else [])


_FAILED = [("skipped", "skipped", ""), ("error", "error", "")]

# Title: how the names of its rows begin, and its columns (key of a row, heading, format).
KINDS: dict[str, tuple[str, Columns]] = {
    "Correctness": (
        "check: ",
        [
            ("what", "check", ""),
            ("met", "met", ""),
            ("device", "device", ""),
            ("limit", "limit", "g"),
            ("images_per_s", "images/s", ",.0f"),
            ("first_batch_s", "first batch s", ".2f"),
            ("matrix_products", "arithmetic", ""),
            *_FAILED,
        ],
    ),
    "Training steps": (
        "step: ",
        [
            ("backbone", "backbone", ""),
            ("head", "head", ""),
            ("batch_size", "batch", ",d"),
            ("text_tokens", "text tokens", "d"),
            ("precision", "precision", ""),
            ("zero_stage", "ZeRO", "d"),
            ("compile", "compiled", ""),
            ("step_ms", "step ms", ",.2f"),
            ("images_per_s", "images/s", ",.0f"),
            ("graphs_ms", "in a CUDA graph ms", ",.2f"),
            ("graphs_images_per_s", "images/s", ",.0f"),
            ("over_bare", "step / plain loop's", ".3f"),
            ("over_bare_pure", "/ plain loop's in bf16 alone", ".3f"),
            ("over_bare_graphs", "graph / plain loop's graph", ".3f"),
            ("ifa_over_cls", "IFA / CLS", ".4f"),
            ("ifa_over_cls_in_bdl", "IFA over CLS, (B, D, L) floats", ".2f"),
            ("loaded_images_per_s", "end to end images/s", ",.0f"),
            ("over_model", "end to end / model", ".3f"),
            ("data_wait_share", "data wait", ".2%"),
            ("mfu_of_matmul", "MFU of matmul", ".3f"),
            ("memory_mb", "torch's peak MB", ",.0f"),
            ("memory_over_bare", "/ plain loop's", ".3f"),
            ("device_mb", "whole GPU MB", ",.0f"),
            ("dali_mb", "DALI's MB", ",.0f"),
            ("joules_per_image", "J an image", ".3f"),
            ("ready_s", "ready after s", ".0f"),
            *_FAILED,
        ],
    ),
    "Loaders": (
        "loader: ",
        [
            ("what", "loader", ""),
            ("threads", "threads", "d"),
            ("images_per_s", "images/s", ",.0f"),
            ("dali_images_per_s", "DALI's usual pipeline", ",.0f"),
            ("over_dali", "ours / it", ".3f"),
            ("cpu_s_per_1000", "CPU s per 1,000", ".3f"),
            ("dali_cpu_s_per_1000", "DALI's", ".3f"),
            ("jpeg_engine_busy_highest", "JPEG engine busy %, highest", "d"),
            *_FAILED,
        ],
    ),
}
BENCHMARK = Benchmark("gpu", "Correctness and speed on a GPU", Arguments, run, headline=headline, tables=tables)
