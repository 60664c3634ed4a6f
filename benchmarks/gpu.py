"""A GPU measured in one command, `benchmarks/gpu_suite.sh`: is it right, how fast is it, does the data keep up.

A list of points, the most important first (`gpu_plan.py`), which one process measures one after the other
(`gpu_worker.py`). The result, `benchmarks/results/gpu/NAME.json`, is written anew after every point, so a run that is
cut off at any moment leaves all rows that were finished, and the same command goes on after them (on the same machine
and commit). A point for which the time left may not do is skipped, and one that fails, hangs or ends its process
becomes a row with "error": none of them ends the suite.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import result
from benchmarks.gpu_plan import FULL, SMOKE, Point, plan
from benchmarks.gpu_targets import targets
from benchmarks.gpu_worker import Worker
from benchmarks.tables import describe_row
from dist_train.errors import UseError, run_command

Row = dict[str, Any]

BUDGET_S = 480.0
POINT_LIMIT_S = 200.0  # a point that takes longer, and twice as long as expected, hangs
SMOKE_RESULTS = Path("data/gpu-suite-smoke/results")


def main(arguments: list[str] | None = None) -> int:
    """Run the suite. Returns the exit status: 1 if a correctness point failed, 2 for wrong use, else 0."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="A GPU measured in one command: use benchmarks/gpu_suite.sh."
    )
    parser.add_argument("--shards", type=Path, required=True, metavar="SET", help="images baked to the training square")
    parser.add_argument("--smoke", action="store_true", help="small models and a few steps, on the CPU if need be")
    parser.add_argument("--name", help="of the result: benchmarks/results/gpu/NAME.json (default: the device's name)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="S", help="seconds to finish within (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help=f"in place of benchmarks/results (smoke: {SMOKE_RESULTS})"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options, begin))


def _run(options: argparse.Namespace, begin: float) -> int:
    gpu = torch.cuda.is_available()
    if not gpu and not options.smoke:
        raise UseError("there is no GPU here; --smoke runs the suite with small models on the CPU")
    if options.results or options.smoke:
        result.RESULTS = options.results or SMOKE_RESULTS
    name = options.name or re.sub(r"\W+", "-", torch.cuda.get_device_name() if gpu else "cpu").strip("-").lower()
    scale = SMOKE if options.smoke else FULL
    points = [point for point in plan(scale, str(options.shards)) if point.smoke or not options.smoke]
    parameters = asdict(scale) | {"smoke": options.smoke, "shards": str(options.shards)}
    command = shlex.join(["benchmarks/gpu_suite.sh", *(["--smoke"] if options.smoke else []), "--name", name])

    def write(rows: list[Row]) -> None:
        result.write_result("gpu", name, parameters, rows, {"command": command, "targets": targets(rows, scale)})

    with Worker() as worker:

        def measure(point: Point, limit: float) -> Row:
            if not point.ahead:
                return worker.measure(point.kind, point.arguments, limit)
            with Worker() as beside:
                return beside.measure(point.kind, point.arguments, limit)

        kept = result.finished_rows("gpu", name, parameters)
        rows = run_points(points, kept, begin + options.budget, gpu, measure, write)
    for target in targets(rows, scale):
        print(describe_row(target, target["what"]))
    return int(any(row.get("met") is False or "error" in row for row in rows if row["what"].startswith("check: ")))


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
                print(f"{point.what}: kept from before")
            else:
                row = {"what": point.what} | (ahead[point.what].result() if point.ahead else row_of(point))
                rows[point.what] = row
                write([rows[done.what] for done in points if done.what in rows])
                print(describe_row(row, point.what), flush=True)
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
        figures = {"error": f"no result after {limit:g} s"} if left > limit else None
    return {"skipped": "out of time"} if figures is None else figures | {"seconds": round(time.monotonic() - begin, 2)}


if __name__ == "__main__":
    sys.exit(main())
