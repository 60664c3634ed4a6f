"""Data loaders side by side: images/s, processor time, memory and time to the first batch on the same shards.

Each contestant has a process of its own; they take turns for several rounds, so that whatever else the machine does
meets all of them. The loaders of other projects are in `benchmarks/speed/peers/`.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
from tqdm import tqdm

from benchmarks.arguments import check_words, words
from benchmarks.benchmark import Benchmark
from benchmarks.charts import GREY, LIGHT, OURS, Chart, bars
from benchmarks.load import seconds_of, with_children
from benchmarks.points import Child
from benchmarks.result import write_result
from benchmarks.speed.peers import Task
from benchmarks.tables import Document, Row, figures, having, span, text_of
from dist_train.data.manifest import MANIFEST_NAME, read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.ranges import AT_LEAST_1, NOT_NEGATIVE, POSITIVE

# In the order of the table. The ceilings come last.
CONTESTANTS = {
    "ours": "this project",
    "ours_squash": "this project, the paper's augmentation",
    "ffcv_loader": "FFCV",
    "ffcv_no_jitter": "FFCV, no jitter",
    "dali_native": "DALI, its own reader and operators",
    "torchvision_v2": "torchvision v2 (tensors) + DataLoader",
    "torchvision_pil": "torchvision v2 (Pillow) + DataLoader",
    "timm_loader": "timm",
    "spdl_loader": "SPDL",
    "webdataset_library": "webdataset + torchvision v2 + DataLoader",
    "dali_decode": "ceiling: decode only",
    "bytes_only": "ceiling: bytes only",
}
# What only one of the two augmentations has a use for.
PAPER_ONLY, USUAL_ONLY = ("ffcv_no_jitter",), ("ours_squash",)
# What this project's loader may cost a baked sample in batches of 256: microseconds of the thread that prepares batches
# (Python, not decoding) and of the one that trains, seconds from the start of a loader to its first batch.
LIMITS = {"host_us_per_sample": 10.0, "training_thread_us_per_sample": 1.0, "first_batch_s": 0.5}


@dataclass(frozen=True)
class Arguments:
    """Images/s, processor time, memory and time to the first batch of data loaders on the same images."""

    images: Path
    """a shard set, or a folder or CSV that `python -m shards build` takes"""
    name: str
    """of the result: benchmarks/results/loader/NAME.json"""
    bake: Annotated[int | None, AT_LEAST_1] = None
    """build the shards resized to this square (not for a shard set)"""
    max_side: Annotated[int | None, AT_LEAST_1] = None
    """build the shards with at most this many pixels on a side"""
    size: Annotated[int, AT_LEAST_1] = 128
    """side of a training image"""
    margin: Annotated[int, NOT_NEGATIVE] = 32
    """resize to size + margin"""
    usual: bool = False
    """the usual recipe, RandomResizedCrop and flip, in place of the paper's augmentation"""
    batch: Annotated[int, AT_LEAST_1] = 64
    """images of a batch"""
    threads: Annotated[int, AT_LEAST_1] = len(os.sched_getaffinity(0))
    """threads, or worker processes (by default the cores of this machine)"""
    rounds: Annotated[int, AT_LEAST_1] = 7
    """of all loaders"""
    seconds: Annotated[float, POSITIVE] = 4
    """of a run"""
    only: str | None = None
    """these loaders only: names of modules in benchmarks/speed/peers, separated by commas"""
    scratch: Path = Path("data/benchmark")
    """folder for converted images"""
    check: bool = False
    """fail if our loader's host work or first batch is above its limit"""


@dataclass
class Contestant:
    """A running contestant and what was measured of it."""

    name: str
    child: Child
    rounds: list[dict[str, float]] = field(default_factory=list)
    first_batch_s: float = 0.0
    peak_mb: float = 0.0
    note: str = ""


def run(arguments: Arguments) -> Path:
    """Measure the loaders and write the result. What cannot run is reported in its row.

    Raises UseError for a set of which no batch can be made, and with --check WorkError where this project's loader is
    above its LIMITS, after the result is written.
    """
    without = PAPER_ONLY if arguments.usual else USUAL_ONLY
    names = words(arguments.only) if arguments.only else [name for name in CONTESTANTS if name not in without]
    check_words("--only", "loader", names, tuple(CONTESTANTS))
    if arguments.check and "ours" not in names:
        raise UseError("--check is about this project's loader; add ours to --only")
    shards = shards_of(arguments)
    images = read_manifest(str(shards)).split("train").samples
    if arguments.batch > images:
        raise UseError(f"--batch {arguments.batch} is more than the {images} training images of {shards}; lower it")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    scratch = str(arguments.scratch)
    task = Task(
        str(shards), arguments.size, arguments.margin, arguments.batch, arguments.threads, scratch, arguments.usual
    )
    rows = measure_loaders(task, names, arguments.rounds, arguments.seconds)
    parameters = {key: value for key, value in asdict(task).items() if key != "scratch"}
    parameters |= {"rounds": arguments.rounds, "seconds": arguments.seconds}
    path = write_result("loader", arguments.name, parameters, list(rows.values()))
    if arguments.check:
        check_limits(rows["ours"])
    return path


def shards_of(arguments: Arguments) -> Path:
    """The shard set, built first where there are only images."""
    from shards.build import build_shard_set
    from shards.plan import BuildOptions
    from shards.sources import read_source

    if (arguments.images / MANIFEST_NAME).exists():
        if arguments.bake or arguments.max_side:
            raise UseError(
                f"{arguments.images} is a shard set; --bake and --max-side are for images that are not one yet"
            )
        return arguments.images
    shards = arguments.scratch / arguments.name
    build = BuildOptions(size=arguments.bake, max_side=arguments.max_side, workers=arguments.threads)
    build_shard_set(read_source(arguments.images), shards, build)
    return shards


def measure_loaders(task: Task, names: Sequence[str], rounds: int, seconds: float) -> dict[str, Row]:
    """The row of each of the named contestants, in turns."""
    rows: dict[str, Row] = {name: {"loader": CONTESTANTS[name]} for name in names}

    def start(contestant: Contestant) -> None:
        started = contestant.child.ask({"start": contestant.name, "task": asdict(task)})
        contestant.note, contestant.first_batch_s = started["note"], started["first_batch_s"]

    def run_once(contestant: Contestant) -> None:
        contestant.rounds.append(contestant.child.ask({"run": seconds}))

    def look_at_memory(contestant: Contestant) -> None:
        contestant.peak_mb = _peak_memory(contestant, seconds)

    with ExitStack() as stack:
        serve = "benchmarks.speed.peers.serve:answer"
        running = [Contestant(name, stack.enter_context(Child(serve))) for name in names]
        turns = [start, *[run_once] * rounds, look_at_memory]
        for turn in tqdm(turns, desc="loaders", disable=not sys.stderr.isatty()):
            for contestant in list(running):
                try:
                    turn(contestant)
                except WorkError as error:
                    rows[contestant.name]["absent"] = f"{contestant.name}: {error}"
                    print(f"left out {contestant.name}: {error}", file=sys.stderr)
                    running.remove(contestant)
                _wait_for_idle(contestant)
    ours = next((contestant for contestant in running if contestant.name == "ours"), None)
    for contestant in running:
        rows[contestant.name] |= _row(contestant, ours)
    return rows


def _row(contestant: Contestant, ours: Contestant | None) -> Row:
    rates = [run["images"] / run["seconds"] for run in contestant.rounds]
    row = {
        "images_per_s": round(statistics.median(rates), 1),
        "images_per_s_lowest": round(min(rates), 1),
        "images_per_s_highest": round(max(rates), 1),
        "cpu_s_per_1000": round(statistics.median(1000 * run["cpu_s"] / run["images"] for run in contestant.rounds), 3),
        "training_thread_us_per_sample": _us_per_sample(contestant, "taking_s"),
        "peak_mb": round(contestant.peak_mb),
        "first_batch_s": round(contestant.first_batch_s, 2),
        "note": contestant.note,
    }
    if contestant is ours:
        row["host_us_per_sample"] = _us_per_sample(contestant, "preparing_s")
    if ours:  # round by round, so that both figures of a ratio met the same machine
        ratios = [mine["images"] / mine["seconds"] / rate for mine, rate in zip(ours.rounds, rates, strict=True)]
        row["ours_is_times"] = round(statistics.median(ratios), 3)
    return row


def _us_per_sample(contestant: Contestant, clock: str) -> float:
    return round(statistics.median(1e6 * run[clock] / run["images"] for run in contestant.rounds), 2)


def check_limits(row: Row) -> None:
    """Raise WorkError naming every figure of this project's row that is above its limit, or why it has none."""
    if "absent" in row:
        raise WorkError(f"{row['loader']} was not measured: {row['absent']}")
    above = [f"{name} {row[name]} is above {limit}" for name, limit in LIMITS.items() if not row[name] <= limit]
    if above:
        raise WorkError(f"{row['loader']}: {'; '.join(above)}; is the machine busy, or the batch small?")


def _tree(contestant: Contestant) -> list[psutil.Process]:
    process = contestant.child.process
    return with_children(process.pid) if process else []


def _wait_for_idle(contestant: Contestant) -> None:
    """Until its workers have filled their queues, so that they do not disturb the next one."""
    before = -1.0
    while (now := seconds_of(_tree(contestant))) - before > 0.02:
        before = now
        time.sleep(0.2)


def _peak_memory(contestant: Contestant, seconds: float) -> float:
    """MB that a run needs at most: private and shared memory, without mapped files, which the system can drop.

    A run of its own, as looking at the memory takes time.
    """
    peak = 0.0
    contestant.child.send({"run": seconds})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        peak = max(peak, sum(_resident_mb(process.pid) for process in _tree(contestant)))
        time.sleep(0.1)
    contestant.child.receive()
    return peak


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0
    kib = sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return kib * 1024 / 1e6


def headline(document: Document) -> str:
    """Our rate, and how many times the others' it is."""
    by_kind: dict[str, list[Row]] = {"ours": [], "ceiling": [], "other": []}
    for row in document["rows"]:
        name = text_of(row.get("loader"))
        if name == CONTESTANTS["ours_squash"]:
            continue
        by_kind["ours" if name == "this project" else "ceiling" if "ceiling" in name else "other"].append(row)
    ours, times = figures(by_kind["ours"], "images_per_s"), figures(by_kind["other"], "ours_is_times")
    return f"{ours[0]:,.0f} images/s, {span(times, '.2f')} times the {len(times)} others" if ours and times else ""


def charts(document: Document) -> list[Chart]:
    """Images a second."""
    rows = [row for row in having(document["rows"], "images_per_s") if "bytes only" not in text_of(row.get("loader"))]
    if not rows:
        return []
    names = [text_of(row.get("loader")) for row in rows]
    rates = [row["images_per_s"] for row in rows]
    ends = [
        (row.get("images_per_s_lowest") or r, row.get("images_per_s_highest") or r)
        for row, r in zip(rows, rates, strict=True)
    ]
    parameters = document.get("parameters") or {}
    size, batch, threads = (text_of(parameters.get(key, "?")) for key in ("size", "batch_size", "threads"))
    label = f"images/s to {size} px, batch {batch}, {threads} cores"
    colours = [OURS if name == "this project" else LIGHT if "ceiling" in name else GREY for name in names]
    caption = "Images per second: median of the rounds, whiskers from the slowest to the fastest."
    return [Chart("", caption, partial(bars, names, rates, label, form=",.0f", colours=colours, ranges=ends))]


COLUMNS = [
    ("loader", "loader", ""),
    ("images_per_s", "images/s", ",.0f"),
    ("images_per_s_lowest", "lowest", ",.0f"),
    ("images_per_s_highest", "highest", ",.0f"),
    ("ours_is_times", "ours / it", ".2f"),
    ("cpu_s_per_1000", "CPU s per 1,000", ".3f"),
    ("training_thread_us_per_sample", "us a sample: training thread", ".2f"),
    ("host_us_per_sample", "preparing thread", ".1f"),
    ("peak_mb", "peak MB", ",.0f"),
    ("first_batch_s", "first batch s", ".2f"),
    ("note", "what differs", ""),
]
BENCHMARK = Benchmark("loader", "Data loaders side by side", Arguments, run, COLUMNS, headline, charts, pictured=True)
