"""What heads cost over the CLS head, and what IFA would cost computed as the reference does (`ifa_point.py`)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from benchmarks.arguments import check_words, numbers, words
from benchmarks.benchmark import Benchmark
from benchmarks.charts import GREY, HEAD_COLOURS, Chart, bars
from benchmarks.points import run_point
from benchmarks.result import write_result
from benchmarks.speed.head_cost import STEP_SECONDS, Size, share_of_step
from benchmarks.speed.step import PAPER_SAMPLES
from benchmarks.tables import Document, Row, Table, describe_row, figures, having, short_backbone, span, table_of
from dist_train.config import Head, ModelConfig
from dist_train.errors import UseError, WorkError
from dist_train.models.names import check_model, vit_shape
from dist_train.output import say
from dist_train.ranges import AT_LEAST_1

CONTESTANTS = (*get_args(Head), "stacked")
"""The heads, and IFA as the reference computes it."""
PAPER = {
    "what": "ViT-B/16, batch 256, 128 px, DAF, float32, on one GPU",
    "cls_minutes_per_epoch": 18,
    "ifa_minutes_per_epoch": 19,
    "cls_gb": 13.1,
    "ifa_gb": 14.4,
    "why": "the reference stacks all tokens of all blocks, (B, S, D, L), then takes token 0: 0.61 GB in float32 for "
    "S = 65, D = 768, L = 12, and as much for its gradient. Taking token 0 first needs (B, D, L), 9.4 MB",
}
"""What the paper says of the IFA head's cost, and where it comes from."""
_NAMES = {"ifa": "IFA, ours", "stacked": "IFA, stacked", "last_n": "last four", "all_layers": "all layers"}


@dataclass(frozen=True)
class Arguments:
    """Time and peak memory of a training step with the CLS head, our IFA head, IFA as the reference computes it (all
    tokens of all blocks stacked), and any other head, in turns; and what each adds to a GPU's step on paper."""

    name: str
    """of the result: benchmarks/results/ifa/NAME.json"""
    backbones: str = "vit_base_patch16"
    """names separated by commas"""
    heads: str = "cls,ifa,stacked"
    """of those of a recipe, and stacked, separated by commas; cls must be there to compare with"""
    text_tokens: str = "0"
    """numbers separated by commas"""
    batch: Annotated[int, AT_LEAST_1] = 16
    """images of a step"""
    size: Annotated[int, AT_LEAST_1] = 128
    """side of an image"""
    classes: Annotated[int, AT_LEAST_1] = 3263
    """of the head (DAF has 3263)"""
    pairs: Annotated[int, AT_LEAST_1] = 10
    """turns"""
    precision: Literal["float32", "bf16", "bf16_autocast"] = "float32"
    """as a recipe's deepspeed.precision"""


def run(arguments: Arguments) -> Path:
    """Measure every backbone with every number of text tokens, say a line of each row and write the result."""
    heads = words(arguments.heads)
    check_words("--heads", "head", heads, CONTESTANTS)
    if "cls" not in heads:
        raise UseError(f"--heads: the others are compared with cls; use cls,{arguments.heads}")
    rows = []
    tokens_of = numbers("--text-tokens", arguments.text_tokens, least=0)
    for backbone in words(arguments.backbones):
        for which in heads:  # the reference `stacked` reads what ifa reads
            head: Head = "ifa" if which == "stacked" else cast(Head, which)
            model = ModelConfig(backbone=backbone, head=head, head_init="default", text_tokens=max(tokens_of))
            check_model(model, arguments.size)
    shared: Row = {"classes": arguments.classes, "precision": arguments.precision}
    for backbone in words(arguments.backbones):
        for tokens in tokens_of:
            point = {"backbone": backbone, "text_tokens": tokens, "batch": arguments.batch, "size": arguments.size}
            memory = {which: _measure(point | shared | {"memory_of": which}) for which in heads}
            turns = _measure(point | shared | {"pairs": arguments.pairs, "heads": heads})
            for which in heads:
                rows.append(row_of(point | shared, which, memory, turns))
                say(describe_row(rows[-1], f"{backbone} {which}, {tokens} text tokens, batch {arguments.batch}"))
    parameters: Row = {"batch_size": arguments.batch, "image_size": arguments.size, "pairs": arguments.pairs}
    parameters |= shared | {"epoch_samples": PAPER_SAMPLES, "paper": PAPER}
    return write_result("ifa", arguments.name, parameters, rows)


def _measure(point: dict[str, Any]) -> Any:
    try:
        return run_point("benchmarks.speed.ifa_point:measure", point)
    except WorkError as error:
        raise WorkError(f"{point}: {error}") from None


def row_of(point: dict[str, Any], which: str, memory: dict[str, Any], turns: dict[str, list[float]]) -> Row:
    """One contestant beside the CLS head: ratios are medians over the pairs, memory is the excess over CLS."""
    ratios = [mine / cls for mine, cls in zip(turns[which], turns["cls"], strict=True)]
    its, cls = memory[which], memory["cls"]
    excess = its["peak_bytes"] - cls["peak_bytes"]
    return {
        "backbone": point["backbone"],
        "text_tokens": point["text_tokens"],
        "head": which,
        "step_ms": round(1000 * statistics.median(turns[which]), 1),
        "epoch_minutes": round(statistics.median(turns[which]) * PAPER_SAMPLES / point["batch"] / 60, 1),
        "time_over_cls": round(statistics.median(ratios), 4),
        "time_over_cls_lowest": round(min(ratios), 4),
        "time_over_cls_highest": round(max(ratios), 4),
        "peak_mb": round(its["peak_bytes"] / 1e6, 2),
        "peak_over_cls_mb": round(excess / 1e6, 3),
        "peak_over_cls_in_bdl": round(excess / (4 * its["bdl"]), 3),
        "parameters": its["parameters"],
        "parameters_over_cls": its["parameters"] - cls["parameters"],
        "gflops_per_image": round(its["flops"] / 1e9, 4),
        **counted(point, which),
    }


def counted(point: dict[str, Any], which: str) -> Row:
    """What the head adds to a step on a GPU on paper, percent; nothing for a backbone that is not the paper's ViT."""
    shape = vit_shape(point["backbone"])
    if shape is None:
        return {}
    patches = (point["size"] // shape.patch) ** 2
    size = Size(
        point["batch"], patches, shape.dim, shape.depth, point["classes"], shape.patch, text=point["text_tokens"]
    )
    return {f"counted_percent_{how}": round(100 * share_of_step(which, size, how), 3) for how in STEP_SECONDS}


def headline(document: Document) -> str:
    """Time and memory of both ways over the CLS head's."""
    parts = []
    ways = {"ifa": "IFA as here", "stacked": "stacked as in the reference"}
    for head in ("ifa", *(head for head in CONTESTANTS if head not in ("cls", "ifa"))):
        rows = [row for row in document["rows"] if row.get("head") == head]
        if its := having(rows, "time_over_cls", "peak_over_cls_in_bdl"):
            times, floats = (figures(its, key) for key in ("time_over_cls", "peak_over_cls_in_bdl"))
            way = ways.get(head) or _NAMES.get(head, head)
            parts.append(
                f"{way} {span(times, '.3f')} times CLS's time and {span(floats, ',.1f')} (B, D, L) floats more"
            )
    return "; ".join(parts)


def charts(document: Document) -> list[Chart]:
    """Time and memory over the CLS head's."""
    rows = [row for row in document["rows"] if row.get("head") != "cls"]
    found = []
    if timed := having(rows, "time_over_cls"):
        ends = [
            tuple(row.get(f"time_over_cls_{which}") or row["time_over_cls"] for which in ("lowest", "highest"))
            for row in timed
        ]
        caption = "Time of a training step over that of the CLS head: median and range of the pairs."
        draw = partial(_draw, timed, "time_over_cls", "step time / CLS", form=".3f", ranges=ends)
        found.append(Chart("time", caption, draw))
    if weighed := having(rows, "peak_over_cls_in_bdl"):
        caption = "Peak memory over the CLS head's, in floats of one [CLS] of every block, (B, D, L)."
        label = "peak over CLS, in (B, D, L) floats"
        found.append(Chart("memory", caption, partial(_draw, weighed, "peak_over_cls_in_bdl", label, form=",.2f")))
    return found


def _draw(rows: list[Row], key: str, label: str, **more: Any) -> Any:
    names = []
    for row in rows:
        text = f", {row['text_tokens']} text tokens" if row.get("text_tokens") else ""
        head = _NAMES.get(str(row.get("head")), str(row.get("head")))
        names.append(f"{head}: {short_backbone(row.get('backbone', ''))}{text}")
    colours = [HEAD_COLOURS.get(row.get("head", ""), GREY) for row in rows]
    return bars(names, [row[key] for row in rows], label, colours=colours, **more)


def tables(document: Document) -> list[Table]:
    """The rows, and what the paper prints."""
    found = [table_of("", COLUMNS, document["rows"])]
    paper = (document.get("parameters") or {}).get("paper")
    if isinstance(paper, dict) and paper:
        said = [{"what": name.replace("_", " "), "figure": figure} for name, figure in paper.items()]
        found.append(table_of("What the paper prints", None, said))
    return found


COLUMNS = [
    ("backbone", "backbone", ""),
    ("text_tokens", "text tokens", "d"),
    ("head", "head", ""),
    ("step_ms", "step ms", ",.0f"),
    ("epoch_minutes", "epoch minutes", ",.1f"),
    ("time_over_cls", "time / CLS", ".4f"),
    ("time_over_cls_lowest", "lowest", ".3f"),
    ("time_over_cls_highest", "highest", ".3f"),
    ("peak_mb", "peak MB", ",.1f"),
    ("peak_over_cls_mb", "over CLS MB", ",.2f"),
    ("peak_over_cls_in_bdl", "in (B, D, L) floats", ",.2f"),
    ("parameters_over_cls", "parameters over CLS", ",d"),
    ("gflops_per_image", "GFLOPs an image", ".3f"),
    ("counted_percent_eager", "GPU, counted %", ".2f"),
    ("counted_percent_compiled", "compiled %", ".2f"),
]
BENCHMARK = Benchmark(
    "ifa", "What the IFA head, and others, cost over the CLS head", Arguments, run, COLUMNS, headline, charts, tables
)
