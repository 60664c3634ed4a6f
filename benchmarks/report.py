"""Tables and charts from the committed results: `benchmarks/RESULTS.md` and a PNG beside each loader result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.result import RESULTS
from dist_train.data.manifest import write_atomically

# Columns of each bench's table: key of a row, heading, format.
COLUMNS = {
    "loader": [
        ("loader", "loader", ""),
        ("images_per_s", "images/s", ",.0f"),
        ("images_per_s_lowest", "lowest", ",.0f"),
        ("images_per_s_highest", "highest", ",.0f"),
        ("ours_is_times", "ours / it", ".2f"),
        ("cpu_s_per_1000", "CPU s per 1,000", ".3f"),
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
    "ifa": [
        ("backbone", "backbone", ""),
        ("text_tokens", "text tokens", "d"),
        ("head", "head", ""),
        ("step_ms", "step ms", ",.0f"),
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
        ("step_ms", "step ms", ",.1f"),
        ("step_ms_p95", "p95", ",.1f"),
        ("images_per_s", "images/s", ",.1f"),
        ("data_wait_share", "data wait", ".2%"),
        ("memory_mb", "peak MB", ",.0f"),
        ("saved_activations_mb", "saved MB", ",.0f"),
        ("mfu_of_matmul", "MFU of matmul", ".2f"),
    ],
    "engine": [
        ("zero_stage", "ZeRO", "d"),
        ("micro_batch", "micro-batch", "d"),
        ("turns", "turns", "d"),
        ("bare_ms", "bare step ms", ",.0f"),
        ("ours_ratio", "ours / bare", ".3f"),
        ("default_ratio", "DeepSpeed's defaults / bare", ".3f"),
        ("ours_excess_ms_per_million", "ours: excess ms per 10^6 parameters", ".2f"),
        ("ours_forward_ms_per_million", "in forward", ".2f"),
        ("ours_backward_ms_per_million", "in backward", ".2f"),
        ("ours_step_ms_per_million", "in step", ".2f"),
        ("default_excess_ms_per_million", "defaults: excess", ".2f"),
        ("default_forward_ms_per_million", "in forward", ".2f"),
        ("default_backward_ms_per_million", "in backward", ".2f"),
        ("default_step_ms_per_million", "in step", ".2f"),
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


def write_report() -> Path:
    """Write RESULTS.md and the charts anew; returns the path of RESULTS.md."""
    path = RESULTS.parent / "RESULTS.md"
    write_atomically(path, render_report().encode())
    for result in sorted((RESULTS / "loader").glob("*.json")):
        _chart(json.loads(result.read_bytes()), result.with_suffix(".png"))
    return path


def render_report() -> str:
    """RESULTS.md: a section for each result, in the order of their names."""
    sections = ["# Results\n\nWritten by `python -m benchmarks report` from the JSON files in `results/`."]
    for bench, columns in COLUMNS.items():
        for result in sorted((RESULTS / bench).glob("*.json")):
            sections.append(_section(bench, result, json.loads(result.read_bytes()), columns))
    return "\n\n".join(sections) + "\n"


def _section(bench: str, path: Path, result: dict[str, Any], columns: list[tuple[str, str, str]]) -> str:
    present = [column for column in columns if any(column[0] in row for row in result["rows"])]
    lines = [
        "| " + " | ".join(heading for _, heading, _ in present) + " |",
        "|" + "|".join("---" if not form else "--:" for _, _, form in present) + "|",
    ]
    for row in result["rows"]:
        cells = [format(row[key], form) if key in row else "" for key, _, form in present]
        if "absent" in row:
            cells[-1] = f"not measured: {row['absent']}"
        lines.append("| " + " | ".join(cells) + " |")
    hardware = result["hardware"]
    devices = [f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_gb']} GB", *hardware["gpus"]]
    lines += [
        "",
        f"`{result['command']}` at commit {result['commit']}, {result['date'][:10]}, on {', '.join(devices)}: "
        f"[{path.name}](results/{bench}/{path.name})",
    ]
    chart = f"\n![{path.stem}](results/loader/{path.stem}.png)" if bench == "loader" else ""
    return f"## {bench}: {path.stem}\n\n" + "\n".join(lines) + chart


def _chart(result: dict[str, Any], path: Path) -> None:
    """Images/s of each loader as bars, the spread of the rounds as whiskers."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "images_per_s" in row and "bytes only" not in row["loader"]][::-1]
    rates = [row["images_per_s"] for row in rows]
    spread = [
        [row["images_per_s"] - row["images_per_s_lowest"] for row in rows],
        [row["images_per_s_highest"] - row["images_per_s"] for row in rows],
    ]
    colours = [
        "tab:blue" if row["loader"] == "this project" else "lightgrey" if "ceiling" in row["loader"] else "tab:grey"
        for row in rows
    ]
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["loader"] for row in rows], rates, xerr=spread, color=colours)
    for i, rate in enumerate(rates):
        axes.annotate(f" {rate:,.0f}", (rate, i), xytext=(2, 6), textcoords="offset points", fontsize=8)
    parameters = result["parameters"]
    axes.set_xlabel(
        f"images/s to {parameters['size']} px, batch {parameters['batch_size']}, {parameters['threads']} cores"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
