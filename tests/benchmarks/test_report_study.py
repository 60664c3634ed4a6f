"""The report's statistics of the study: what they are, and which runs each figure compares."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.benchmark import tables_of
from benchmarks.claims.study_figures import comparison, over_batch_sizes
from benchmarks.report import benchmark_of


def study_rows() -> list[dict[str, Any]]:
    """Runs of every experiment on two data sets, three seeds, the last seed without an IFA run at batch 64."""
    rows = []

    def run(experiment: str, data: str, head: str, batch: int, seed: int, **more: Any) -> None:
        base = {"backbone": "vit_tiny_patch32", "head_init": "reference", "image_size": 64, "text_tokens": 0}
        base |= {"lr_scaling": "none", "budget": "epochs", "experiment": experiment, "data": data, "head": head}
        noise = math.sin(37 * len(rows)) / 50
        top1 = 0.8 - 0.001 * batch + 0.02 * (head == "ifa") + noise
        rows.append(base | {"batch_size": batch, "seed": seed, "top1": round(top1, 4), "test_loss": 1.25} | more)

    for seed in range(3):
        for head in ("cls", "ifa"):
            for data in ("drawn", "grocery"):
                for batch in (16, 64):
                    if not (seed == 2 and head == "ifa" and batch == 64):
                        run("batch", data, head, batch, seed)
            run("scaling", "drawn", head, 64, seed, lr_scaling="linear")
            run("init", "drawn", head, 64, seed, head_init="zero")
            run("steps", "drawn", head, 64, seed, budget="steps")
        run("text", "drawn", "cls", 64, seed, text_tokens=16)
        run("patch", "drawn", "cls", 64, seed, backbone="vit_tiny_patch16")
        run("patch", "drawn", "cls", 64, seed, image_size=32)
    return rows


def test_the_studys_statistics_are_those_of_the_statistics_module() -> None:
    rows = study_rows()
    table = tables_of(benchmark_of("study"), {"rows": rows})[0]
    line = next(
        dict(zip(table.headings, cells, strict=True))
        for cells in table.cells
        if cells[table.headings.index("data")] == "grocery" and cells[table.headings.index("batch")] == "64"
    )

    def of(head: str) -> dict[int, float]:
        its = [row for row in rows if (row["data"], row["head"], row["batch_size"]) == ("grocery", head, 64)]
        return {row["seed"]: 100 * row["top1"] for row in its}

    cls, ifa = of("cls"), of("ifa")
    assert len(cls) == 3 and sorted(ifa) == [0, 1]
    for head, values in (("CLS", list(cls.values())), ("IFA", list(ifa.values()))):
        expected = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"
        assert line[f"{head} (seeds)"] == expected
    pairs = [ifa[seed] - cls[seed] for seed in (0, 1)]
    expected = f"{statistics.mean(pairs):+.2f} ± {statistics.stdev(pairs) / math.sqrt(2):.2f} (2)"
    assert line["IFA - CLS, points (pairs)"] == expected
    one = [row for row in rows if row["seed"] == 0 and row["experiment"] == "batch"]
    table = tables_of(benchmark_of("study"), {"rows": one})[0]
    assert all("±" not in cell for cells in table.cells for cell in cells)


def test_the_studys_figures_compare_what_the_experiments_do() -> None:
    rows = [row for row in study_rows() if row["data"] == "drawn"]
    by_batch = over_batch_sizes(rows)
    assert {batch: {head: len(seeds) for head, seeds in its.items()} for batch, its in by_batch.items()} == {
        16: {"cls": 3, "ifa": 3},
        64: {"cls": 3, "ifa": 2},
    }
    labels = {name: list(comparison(rows, name)) for name in ("scaling", "steps", "text", "patch")}
    assert labels == {
        "scaling": ["batch 16, fixed rate", "batch 64, fixed rate", "batch 64, linear scaling"],
        "steps": ["batch 64, equal epochs", "batch 64, equal steps"],
        "text": ["no text", "16 tokens"],
        "patch": ["ViT tiny/32, 32 px", "ViT tiny/32, 64 px", "ViT tiny/16, 64 px"],
    }
    scaled = comparison(rows, "scaling")["batch 64, linear scaling"]["ifa"]
    expected = {r["seed"]: 100 * r["top1"] for r in rows if r["lr_scaling"] == "linear" and r["head"] == "ifa"}
    assert scaled == expected
    assert comparison([row for row in study_rows() if row["data"] == "grocery"], "scaling") == {}
