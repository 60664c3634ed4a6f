"""Tables of the report: what the rows of a result become, as plain text cells for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The tables of the rows of the study and of the GPU suite."""
    rows = document.get("rows") or []
    if bench == "gpu":
        return gpu_tables(rows)
    every = table_of(f"All {len(rows)} rows", COLUMNS["study"], rows, folded=len(rows) >= FOLDED)
    return [summary_table(rows), every] if rows else [every]


def gpu_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each kind of point, and one for rows of no kind that is known."""
    kinds = {title: [row for row in rows if _what(row).startswith(of)] for title, (of, _) in GPU_TABLES.items()}
    tables = [table_of(title, GPU_TABLES[title][1], mine) for title, mine in kinds.items() if mine]
    others = [row for row in rows if not any(row in mine for mine in kinds.values())]
    return tables + ([table_of("", None, others)] if others or not rows else [])


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


def _what(row: Row) -> str:
    return str(row.get("what", ""))
