"""What an engine costs over a bare PyTorch loop on the same batch, and where; measured in `engine_point.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tqdm import tqdm

from benchmarks.arguments import numbers
from benchmarks.benchmark import Benchmark
from benchmarks.charts import COLOURS, Chart, legend, new_axes
from benchmarks.points import run_point
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, by, describe_row, figures, having, span, text_of
from dist_train.errors import WorkError
from dist_train.output import say
from dist_train.ranges import AT_LEAST_1, NOT_NEGATIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOST_SIZE, HOST_BATCH = 32, 2
PHASES = ("forward", "backward", "step")
SPENT = ("copies", "norms", "update", "collectives")
WHOSE = {"ours": "ours", "default": "defaults"}


@dataclass(frozen=True)
class Arguments:
    """Time of a training step through our engine and through DeepSpeed's against a bare loop on the same batch."""

    name: str
    """of the result: benchmarks/results/engine/NAME.json"""
    backbone: str = "vit_base_patch16"
    """of the model"""
    size: Annotated[int, AT_LEAST_1] = 128
    """side of an image"""
    stages: str = "0,1,2,3"
    """ZeRO stages"""
    micro_batches: str = "8,16,32,64"
    """images of a step"""
    pairs: Annotated[int, AT_LEAST_1] = 3
    """turns at least"""
    seconds: Annotated[float, NOT_NEGATIVE] = 60
    """more turns up to this time"""
    arm: Literal["model", "settings", "host"] = "model"
    """model: the backbone beside a bare loop and DeepSpeed's defaults; settings: our settings turned back, one at a
    time; host: the host's time for a step, with a model too small to compute (backbone, size and micro-batches are its
    own)"""


def run(arguments: Arguments) -> Path:
    """Measure every combination of ZeRO stage and micro-batch in a process of its own, say each row and write them."""
    import torch

    stages = numbers("--stages", arguments.stages, least=0)
    micro_batches = numbers("--micro-batches", arguments.micro_batches)
    backbone, size, threads = arguments.backbone, arguments.size, torch.get_num_threads()
    if arguments.arm == "host":
        backbone, size, micro_batches, threads = "ViT of depth 12 with 24 channels", HOST_SIZE, [HOST_BATCH], 1
    rows = []
    points = [(stage, micro_batch) for stage in stages for micro_batch in micro_batches]
    for stage, micro_batch in tqdm(points, desc="engine", disable=not sys.stderr.isatty()):
        where = f"ZeRO {stage}, micro-batch {micro_batch}"
        point = {"backbone": backbone, "size": size, "zero_stage": stage, "micro_batch": micro_batch}
        point |= {"arm": arguments.arm, "pairs": arguments.pairs, "seconds": arguments.seconds}
        try:
            found = run_point("benchmarks.speed.engine_point:measure", point)
        except WorkError as error:
            raise WorkError(f"{where}: {error}") from None
        for row in found:
            say(describe_row(row, f"{backbone}, {where}"))
        rows += found
    parameters = {"backbone": backbone, "size": size, "head": "cls", "optimizer": "sgd", "threads": threads}
    return write_result("engine", arguments.name, parameters, rows)


def headline(document: Document) -> str:
    """Ratios to the bare loop's step, or which of our settings saves the most."""
    rows = document["rows"]
    if turned_back := having(rows, "it_excess_ms_per_million", "ours_excess_ms_per_million"):
        saved, most = max(
            ((row["it_excess_ms_per_million"] - row["ours_excess_ms_per_million"], row) for row in turned_back),
            key=lambda pair: pair[0],
        )
        return (
            f"Of our settings {text_of(most.get('turned_back'))} save the most: {saved:.1f} ms a step and "
            f"million parameters under ZeRO {text_of(most.get('zero_stage'))}"
        )
    ours, default = figures(rows, "ours_ratio"), figures(rows, "default_ratio")
    if not ours or not default:
        return ""
    if not having(rows, "ours_excess_ms_per_million"):
        stages = ", ".join(f"{row['ours_ratio']:.2f} (ZeRO {row['zero_stage']})" for row in having(rows, "ours_ratio"))
        return f"The host's time for a step over a bare loop's: {stages}; DeepSpeed's defaults {span(default, '.2f')}"
    return f"Ours takes {span(ours, '.3f')} of a bare loop's step, DeepSpeed's defaults {span(default, '.3f')}"


def charts(document: Document) -> list[Chart]:
    """What the time over a bare loop's step is spent on, and in which phase it is; a figure a ZeRO stage."""
    found = []
    for name, parts, said in (
        ("spent", SPENT, "what it is spent on (the host's own time in operators)"),
        ("phases", PHASES, "phase of the step"),
    ):
        complete = having(document["rows"], *(f"{which}_{part}_ms_per_million" for which in WHOSE for part in parts))
        for stage, its in by(complete, "zero_stage").items():
            caption = (
                f"ZeRO {stage}: time over a bare loop's step, by {said}. A diamond: the whole, measured by itself."
            )
            found.append(Chart(f"{name}-{stage}", caption, partial(_draw, its, parts)))
    return found


def _draw(rows: Sequence[Row], parts: Sequence[str]) -> Figure:
    """A group of bars for each micro-batch and engine, a bar for each part."""
    bars = [(row, which) for row in rows for which in WHOSE]
    figure, axes = new_axes(0.7 * len(bars) + 1.2)
    for i, part in enumerate(parts):
        places = [place + 0.8 * (i + 0.5) / len(parts) - 0.4 for place in range(len(bars))]
        values = [row[f"{which}_{part}_ms_per_million"] for row, which in bars]
        axes.barh(places, values, height=0.8 / len(parts), color=COLOURS[i], label=part)
    for place, (row, which) in enumerate(bars):
        for whole in figures([row], f"{which}_excess_ms_per_million"):
            axes.plot(whole, place, "D", color="black", markersize=5)
    axes.set_yticks(range(len(bars)), [f"{row.get('micro_batch', '?')}, {WHOSE[which]}" for row, which in bars])
    axes.invert_yaxis()
    axes.set_ylabel("micro-batch, engine")
    axes.set_xlabel("ms per million parameters over a bare loop")
    legend(figure, len(parts))
    return figure


def _parts(which: str, what: str) -> list[tuple[str, str, str]]:
    phases = [(f"{which}_{phase}_ms_per_million", f"in {phase}", ".2f") for phase in PHASES]
    headings = [f"{what}: {SPENT[0]}", *SPENT[1:]]
    spent = zip(SPENT, headings, strict=True)
    return phases + [(f"{which}_{part}_ms_per_million", heading, ".3f") for part, heading in spent]


COLUMNS = [
    ("zero_stage", "ZeRO", "d"),
    ("micro_batch", "micro-batch", "d"),
    ("turned_back", "ours with DeepSpeed's", ""),
    ("turns", "turns", "d"),
    ("bare_ms", "bare step ms", ",.0f"),
    ("it_ratio", "that / bare", ".3f"),
    ("ours_ratio", "ours / bare", ".3f"),
    ("default_ratio", "DeepSpeed's defaults / bare", ".3f"),
    ("it_excess_ms_per_million", "that: excess ms per 10^6 parameters", ".2f"),
    ("ours_excess_ms_per_million", "ours: excess ms per 10^6 parameters", ".2f"),
    *_parts("ours", "ours"),
    ("default_excess_ms_per_million", "defaults: excess", ".2f"),
    *_parts("default", "defaults"),
]
BENCHMARK = Benchmark(
    "engine", "DeepSpeed's engine beside a bare PyTorch loop", Arguments, run, COLUMNS, headline, charts
)
