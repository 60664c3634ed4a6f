"""Tables of the report: what the rows of a result become, as plain text cells for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from benchmarks.tables import FOLDED, Document, Row, Table, table_of, text_of

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


def rows_tables(bench: str, document: Document) -> list[Table]:
    """The tables of the rows of the study."""
    rows = document.get("rows") or []
    every = table_of(f"All {len(rows)} rows", COLUMNS["study"], rows, folded=len(rows) >= FOLDED)
    return [summary_table(rows), every] if rows else [every]


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
    return Table(title, [], headings, [i >= texts for i in range(len(headings))], cells)
