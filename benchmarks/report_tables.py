"""Tables of the report: what the rows of a result become, as plain text cells for Markdown and HTML alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report_gpu import GPU_TABLES
from benchmarks.report_study import (
    FIELDS,
    configuration_of,
    configurations,
    finished,
    heads_of,
    mean_and_sd,
    paired_difference,
    plus_minus,
)

Row = dict[str, Any]
Document = dict[str, Any]

# Columns of each bench's table: key of a row, heading, format. A bench that is not here gets all its keys.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "study": [
        ("experiment", "experiment", ""),
        ("data", "data", ""),
        ("backbone", "backbone", ""),
        ("head", "head", ""),
        ("head_init", "head starts", ""),
        ("image_size", "px", "d"),
        ("text_tokens", "text tokens", "d"),
        ("batch_size", "batch", ",d"),
        ("lr_scaling", "rate scaling", ""),
        ("budget", "equal", ""),
        ("lr", "rate", "g"),
        ("epochs", "epochs", "g"),
        ("steps", "steps", ",d"),
        ("images_seen", "images seen", ",d"),
        ("seed", "seed", "d"),
        ("top1", "test top-1", ".2%"),
        ("test_loss", "test loss", ".4f"),
        ("test_samples", "test samples", ",d"),
        ("train_loss", "train loss", ".4f"),
        ("seconds", "seconds", ",.0f"),
        ("trained_at", "trained at", ""),
    ],
    "paper": [
        ("table", "table", ""),
        ("cell", "cell", ""),
        ("paper_top1", "paper's top-1 %", ".2f"),
        ("top1", "ours %", ".2f"),
        ("difference_points", "ours - paper, points", "+.2f"),
        ("scale", "scale", ""),
        ("baseline", "paper's difference is to", ""),
        ("paper_difference_percent", "paper's difference %", "+.2f"),
        ("paper_difference_points", "in points", "+.2f"),
        ("our_difference_points", "our difference, points", "+.2f"),
        ("trained_at", "trained at", ""),
    ],
    "landscape": [
        ("run", "run", ""),
        ("backbone", "backbone", ""),
        ("head", "head", ""),
        ("batch_size", "batch", ",d"),
        ("image_size", "px", "d"),
        ("text_tokens", "text tokens", "d"),
        ("seed", "seed", "d"),
        ("loss", "loss", ".4f"),
        ("top1", "top-1", ".2%"),
        ("mean_excess_loss", "mean excess loss", ".4f"),
        ("max_excess_loss_half_radius", "highest excess within half the radius", ".4f"),
        ("curvature", "curvature", ",.4g"),
        ("line_barrier", "barrier on the line", ".4f"),
    ],
    "batch_size": [
        ("backbone", "backbone", ""),
        ("head", "head", ""),
        ("image_size", "px", "d"),
        ("text_tokens", "text tokens", "d"),
        ("batch_size", "batch", ",d"),
        ("micro_batch", "micro-batch", ",d"),
        ("accumulation", "accumulation", "d"),
        ("compile", "compiled", ""),
        ("precision", "precision", ""),
        ("step_ms", "step ms", ",.1f"),
        ("images_per_s", "images/s", ",.1f"),
        ("peak_mb", "peak MB", ",.0f"),
        ("largest_micro_batch", "largest micro-batch", ",d"),
        ("epoch_minutes", "epoch minutes", ",.2f"),
        ("epoch_price", "epoch price", ",.4g"),
        ("top1", "top-1", ".2%"),
        ("train_minutes", "training minutes", ",.2f"),
        ("train_price", "training price", ",.4g"),
        ("pareto", "on the Pareto front", ""),
        ("recommended", "recommended", ""),
        ("trained_at", "trained at", ""),
    ],
    "ifa": [
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
    ],
    "step": [
        ("arm", "arm", ""),
        ("backbone", "backbone", ""),
        ("head", "head", ""),
        ("image_size", "px", "d"),
        ("batch_size", "batch", "d"),
        ("micro_batch", "micro-batch", "d"),
        ("precision", "precision", ""),
        ("compile", "compiled", ""),
        ("step_ms", "step ms", ",.1f"),
        ("step_ms_p95", "p95", ",.1f"),
        ("images_per_s", "images/s", ",.1f"),
        ("data_wait_share", "data wait", ".2%"),
        ("first_batch_s", "first batch s", ".2f"),
        ("memory_mb", "peak MB", ",.0f"),
        ("device_mb", "whole GPU MB", ",.0f"),
        ("dali_mb", "DALI's MB", ",.0f"),
        ("saved_activations_mb", "saved MB", ",.0f"),
        ("mfu_of_matmul", "MFU of matmul", ".2f"),
    ],
    "engine": [
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
        ("ours_forward_ms_per_million", "in forward", ".2f"),
        ("ours_backward_ms_per_million", "in backward", ".2f"),
        ("ours_step_ms_per_million", "in step", ".2f"),
        ("ours_copies_ms_per_million", "ours: copies", ".3f"),
        ("ours_norms_ms_per_million", "norms", ".3f"),
        ("ours_update_ms_per_million", "update", ".3f"),
        ("ours_collectives_ms_per_million", "collectives", ".3f"),
        ("default_excess_ms_per_million", "defaults: excess", ".2f"),
        ("default_forward_ms_per_million", "in forward", ".2f"),
        ("default_backward_ms_per_million", "in backward", ".2f"),
        ("default_step_ms_per_million", "in step", ".2f"),
        ("default_copies_ms_per_million", "defaults: copies", ".3f"),
        ("default_norms_ms_per_million", "norms", ".3f"),
        ("default_update_ms_per_million", "update", ".3f"),
        ("default_collectives_ms_per_million", "collectives", ".3f"),
    ],
    "exchange": [
        ("contestant", "contestant", ""),
        ("turns", "turns", "d"),
        ("step_ms", "step ms", ",.0f"),
        ("step_over_ddp", "step / DDP's", ".3f"),
        ("step_over_ddp_lower_quartile", "lower quartile", ".3f"),
        ("step_over_ddp_upper_quartile", "upper", ".3f"),
        ("exposed_ms", "exposed ms", ",.0f"),
        ("exposed_share", "of the exchange's own time", ".2f"),
        ("sent_mb", "MB sent by a rank", ",.1f"),
        ("bandwidth_mbit", "Mbit/s", ",d"),
    ],
    "loader": [
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
    ],
    "scale": [
        ("what", "what", ""),
        ("first_batch_ms", "first batch ms", ",.0f"),
        ("batch_ms_median", "batch ms", ".3f"),
        ("batch_ms_highest", "highest", ".1f"),
        ("memory_mb", "memory MB", ",.0f"),
        ("shards_read", "shards read", ",.0f"),
        ("read_over_share", "read / share", ".4f"),
        ("shards_in_use_at_once", "shards in use at once", ",.0f"),
    ],
    "kill": [
        ("ranks", "ranks", "d"),
        ("kills", "kills", "d"),
        ("in_step", "in a step", "d"),
        ("in_evaluation", "in an evaluation", "d"),
        ("in_checkpoint", "in a checkpoint", "d"),
        ("in_between", "between", "d"),
        ("half_written", "checkpoints left half-written", "d"),
        ("steps", "steps", "d"),
        ("steps_lost", "steps made again", "d"),
        ("identical_weights", "weights bit-identical", ""),
        ("each_sample_once", "each sample once per epoch", ""),
        ("seconds", "seconds", ",d"),
    ],
}
FOLDED = 30
"""Rows from which the table of all rows is folded away where others sum it up."""


@dataclass(frozen=True)
class Table:
    """A table of text. numeric: of each column; marked: rows to stand out; folded: shown on demand; stacked: its rows
    are read one below the other where there is little room, because they hold sentences."""

    title: str
    headings: list[str]
    numeric: list[bool]
    cells: list[list[str]]
    marked: frozenset[int] = frozenset()
    folded: bool = False
    stacked: bool = False


def tables_of(bench: str, document: Document) -> list[Table]:
    """The tables of a result, in reading order."""
    rows = document.get("rows") or []
    tables = []
    if answers := document.get("answers"):
        columns = [("question", "question", ""), ("verdict", "verdict", ""), ("evidence", "evidence", "")]
        tables.append(table_of("Questions and answers", columns, answers, stacked=True))
    for key, more in document.items():
        if (
            key not in ("rows", "answers")
            and isinstance(more, list)
            and more
            and all(isinstance(r, dict) for r in more)
        ):
            tables.append(table_of(key.replace("_", " ").capitalize(), generic_columns(more), more))
    if bench == "study" and rows:
        tables.append(summary_table(rows))
    if bench == "gpu":
        return tables + gpu_tables(rows)
    columns = COLUMNS.get(bench) or generic_columns(rows)
    all_rows = table_of(f"All {len(rows)} rows" if tables else "", columns, rows)
    tables.append(replace(all_rows, folded=bool(tables) and len(rows) >= FOLDED))
    paper = (document.get("parameters") or {}).get("paper")
    if isinstance(paper, dict) and paper:
        said = [{"what": name.replace("_", " "), "figure": figure} for name, figure in paper.items()]
        tables.append(table_of("What the paper prints", [("what", "what", ""), ("figure", "figure", "")], said))
    return tables


def gpu_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each kind of point, and one for rows of no kind that is known."""
    kinds = {title: [row for row in rows if _what(row).startswith(of)] for title, (of, _) in GPU_TABLES.items()}
    tables = [table_of(title, GPU_TABLES[title][1], mine) for title, mine in kinds.items() if mine]
    others = [row for row in rows if not any(row in mine for mine in kinds.values())]
    return tables + ([table_of("", generic_columns(others), others)] if others or not rows else [])


def note_of(document: Document) -> str:
    """What is to be known of a result before its figures are read; "" if nothing."""
    return text_of((document.get("parameters") or {}).get("note"))


def table_of(title: str, columns: Sequence[tuple[str, str, str]], rows: Sequence[Row], stacked: bool = False) -> Table:
    """Those of the columns that any row has; what a row lacks, or holds as null, is left blank."""
    present = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[_cell(row, key, form) for key, _, form in present] for row in rows]
    for row, texts in zip(rows, cells, strict=True):
        if "absent" in row:
            texts[-1] = f"not measured: {row['absent']}"
    return Table(
        title,
        [heading for _, heading, _ in present],
        [bool(form) or _all_numbers(rows, key) for key, _, form in present],
        cells,
        frozenset(i for i, row in enumerate(rows) if row.get("recommended") or row.get("loader") == "this project"),
        stacked=stacked,
    )


def summary_table(rows: Sequence[Row]) -> Table:
    """A row for each configuration of the study: mean ± standard deviation of each head's top-1 in percent, and IFA
    minus CLS in points with its standard error over the seeds that both have."""
    rows = finished(rows)
    heads = heads_of(rows)
    shown = [(key, heading) for key, heading in FIELDS if key == "data" or len({row.get(key) for row in rows}) > 1]
    headings = ["experiment", *(heading for _, heading in shown)]
    texts = len(headings)
    headings += [f"{head.upper()} (seeds)" for head in heads]
    both = {"cls", "ifa"} <= set(heads)
    headings += ["IFA - CLS, points (pairs)"] if both else []
    experiments: dict[tuple[Any, ...], dict[str, None]] = {}
    for row in rows:
        experiments.setdefault(configuration_of(row), {})[text_of(row.get("experiment"))] = None
    cells = []
    for configuration, by_head in configurations(rows).items():
        values = dict(zip((key for key, _ in FIELDS), configuration, strict=True))
        line = [", ".join(experiments[configuration]), *(text_of(values[key]) for key, _ in shown)]
        for head in heads:
            accuracies = list(by_head.get(head, {}).values())
            line.append(f"{plus_minus(*mean_and_sd(accuracies))} ({len(accuracies)})" if accuracies else "")
        if both:
            difference = paired_difference(by_head.get("ifa", {}), by_head.get("cls", {}))
            line.append("" if difference is None else f"{plus_minus(*difference[:2], '+.2f')} ({difference[2]})")
        cells.append(line)
    title = "Test top-1 in %, mean ± standard deviation over the seeds; IFA - CLS with its standard error"
    return Table(title, headings, [i >= texts for i in range(len(headings))], cells)


def generic_columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Every key of the rows, in order of appearance, as a column."""
    return [(key, key.replace("_", " "), "") for key in dict.fromkeys(key for row in rows for key in row)]


def unlisted(bench: str, rows: Sequence[Row]) -> bool:
    """Whether the rows hold more than the bench's columns show."""
    listed = {key for key, _, _ in COLUMNS.get(bench, generic_columns(rows))}
    if bench == "gpu":
        kinds = [columns for of, columns in GPU_TABLES.values() if any(_what(row).startswith(of) for row in rows)]
        listed = {key for columns in kinds for key, _, _ in columns} or listed
    return any(key not in listed for row in rows for key in row)


def text_of(value: Any, form: str = "") -> str:
    """A value as text; a number without a format, or with one that does not fit, in four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if not form or (form.endswith("d") and isinstance(value, float)):
            form = ",d" if isinstance(value, int) else ",.0f" if abs(value) >= 1000 else ".4g"
        return format(value, form)
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def machine_of(document: Document) -> str:
    """The hardware in one line."""
    hardware = document.get("hardware") or {}
    cores, memory = text_of(hardware.get("cores")), text_of(hardware.get("memory_gb"))
    parts = [f"{cores} cores of {hardware.get('cpu', '')}" if cores else hardware.get("cpu", "")]
    parts += [f"{memory} GB"] if memory else []
    return ", ".join(str(part) for part in [*parts, *(hardware.get("gpus") or [])] if part)


def _what(row: Row) -> str:
    return str(row.get("what", ""))


def _cell(row: Row, key: str, form: str) -> str:
    if key == "step_ms" and row.get("out_of_memory"):
        return "out of memory"
    return text_of(row.get(key), form)


def _all_numbers(rows: Sequence[Row], key: str) -> bool:
    return all(
        isinstance(row[key], int | float) and not isinstance(row[key], bool) for row in rows if row.get(key) is not None
    )
