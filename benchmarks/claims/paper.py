"""The paper's tables, its numbers beside ours.

The cells, their recipes and the paper's numbers are in `launch/recipes/paper`. What the paper calls "Difference" is
relative and its baselines are mixed; here differences are in points and each names its baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import yaml

from benchmarks.arguments import words
from benchmarks.benchmark import Benchmark
from benchmarks.charts import COLOURS, GREY, HEIGHT, MARKERS, Chart, legend, new_axes, plain
from benchmarks.claims import landscape
from benchmarks.claims.runs import finish_runs, is_finished, test_evaluation, trained_at
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, by, figures, having, table_of
from dist_train.config import Recipe
from dist_train.data.manifest import MANIFEST_NAME
from dist_train.data.vocabulary import WHOLE_TAGS
from dist_train.errors import UseError
from dist_train.output import say
from dist_train.parse import parse_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPES = Path(__file__).parents[2] / "launch" / "recipes" / "paper"
SMALL_SHARDS = Path("data/paper-small")
SMALL_RUNS = Path("runs/paper-small")
SMALL_PICTURES, SMALL_EPOCHS = 800, 2
# Table 6 compares with CLS runs that are not printed; these follow from its accuracies and differences.
IMPLIED = {
    "b16": {16: 87.57, 32: 85.90, 64: 82.97, 128: 76.63, 256: 62.13},
    "b32": {16: 80.65, 32: 79.15, 64: 74.99, 128: 66.23, 256: 49.14},
}
# Figure 3 shows ViT-B/32 with a small and a large batch and both heads.
FIGURE_3 = (
    ("table2", "b32-batch16-128px"),
    ("table2", "b32-batch256-128px"),
    ("table6", "b32-batch16"),
    ("table6", "b32-batch256"),
)


@dataclass(frozen=True)
class Arguments:
    """Train the cells of a table by their recipes, or continue them, and print the paper's number beside ours in each;
    blank where a cell was not run."""

    table: Literal["1", "2", "3", "4", "5", "6", "fig3"]
    """of the paper"""
    name: str | None = None
    """of the result: benchmarks/results/paper/NAME.json (default: the table and scale)"""
    scale: Literal["full", "small"] = "full"
    """small: tiny ViTs on drawn characters, to see that every recipe runs"""
    cells: str | None = None
    """run these cells only, separated by commas (default: all)"""
    render: bool = False
    """run nothing, only print what is finished"""
    vocabulary: Path | None = None
    """WordPiece vocab.txt instead of the hub's"""
    jobs: int = 1
    """runs at a time, a GPU each if there are any"""

    @property
    def result_name(self) -> str:
        """The name given, or `table5-small`, `fig3-full`."""
        return self.name or f"{'' if self.table == 'fig3' else 'table'}{self.table}-{self.scale}"


@dataclass(frozen=True)
class Cell:
    """One cell of a table. baseline: the cell (or words) that the paper's difference is to, with its accuracy."""

    table: str
    name: str
    recipe: Recipe
    paper_top1: float
    baseline: str | None = None
    paper_baseline_top1: float | None = None
    own_baseline: Recipe | None = None


def run(arguments: Arguments) -> Path:
    """Run the cells that are not finished, write the result, and print it. Raises UseError for unknown cells."""
    table, scale = arguments.table, arguments.scale
    cells = table_cells(table, scale, arguments.vocabulary)
    names = words(arguments.cells) if arguments.cells else [cell.name for cell in cells]
    if unknown := set(names) - {cell.name for cell in cells}:
        raise UseError(
            f"--cells: table {table} has no cell '{min(unknown)}'; it has {', '.join(c.name for c in cells)}"
        )
    chosen = [cell for cell in cells if cell.name in names]
    if not arguments.render:
        if scale == "small":
            draw_small_set()
        for _ in finish_runs([cell.recipe for cell in chosen], arguments.jobs, f"table {table}"):
            write_table(table, scale, cells, arguments.result_name)
    path, rows = write_table(table, scale, cells, arguments.result_name)
    if table == "fig3" and not arguments.render:
        runs = [Path(cell.recipe.train.run) for cell in chosen]
        points, samples = (21, 256) if scale == "full" else (5, 32)
        landscape.run(
            landscape.Arguments(runs, arguments.result_name, samples=samples, points=points, line_points=points)
        )
    say(as_text(rows))
    return path


def table_cells(table: str, scale: str, vocabulary: Path | None) -> list[Cell]:
    """The cells of a table with their recipes."""
    listed = yaml.safe_load((RECIPES / "rows.yaml").read_text(encoding="utf-8"))
    by_name = {(name, row["cell"]): row for name, rows in listed.items() for row in rows}
    wanted = FIGURE_3 if table == "fig3" else [key for key in by_name if key[0] == f"table{table}"]

    def recipe(key: tuple[str, str]) -> Recipe:
        return cell_recipe(key[0], by_name[key]["overrides"], scale, vocabulary)

    cells = []
    for key in wanted:
        cell = Cell(table, key[1], recipe(key), by_name[key]["paper_top1"])
        base = baseline_of(*key) if table in ("3", "5", "6") else None
        if base is not None:
            model, _, batch = key[1].partition("-batch")
            implied = IMPLIED[model][int(batch)] if table == "6" else by_name[base]["paper_top1"]
            words = f"{'/'.join(base)} (the paper's own is not printed)" if table == "6" else "/".join(base)
            cell = replace(cell, baseline=words, paper_baseline_top1=implied, own_baseline=recipe(base))
        cells.append(cell)
    return cells


def baseline_of(table: str, cell: str) -> tuple[str, str]:
    """The cell that a cell of Tables 3, 5 and 6 is compared with.

    Table 3 and the ViTs of Table 5: Table 1, pretrained, whose schedule is another. The ViLTs of Table 5: Table 3.
    Table 6: the paper does not say; Table 2 has the same batch sizes with the CLS head, under another schedule.
    """
    if table == "table6":
        return "table2", f"{cell}-128px"
    if table == "table5" and cell.startswith("vilt-"):
        return "table3", cell
    return "table1", f"{cell.partition('-')[2]}-pretrained"


def cell_recipe(table: str, overrides: dict[str, Any], scale: str, vocabulary: Path | None) -> Recipe:
    """A cell's recipe; small: tiny ViTs for base, small for large, half the image, drawn characters, no weights."""
    arguments = ["--config", str(RECIPES / f"{table}.yaml")]
    for key, value in overrides.items():
        arguments += [f"--{key}", str(value)]
    recipe, _ = parse_recipe(arguments)
    if vocabulary is not None:
        recipe = replace(recipe, data=replace(recipe.data, tokenizer=str(vocabulary)))
    if scale == "full":
        return recipe
    backbone = recipe.model.backbone.replace("vit_base", "vit_tiny").replace("vit_large", "vit_small")
    data = replace(recipe.data, shards=str(SMALL_SHARDS), image_size=recipe.data.image_size // 2, crop_margin=8)
    if vocabulary is None:
        data = replace(data, tokenizer=WHOLE_TAGS)
    # Shorter than the paper's warm-up: a tenth of the steps, about.
    steps = SMALL_EPOCHS * round(0.7 * SMALL_PICTURES) // recipe.train.batch_size
    return replace(
        recipe,
        data=data,
        optim=replace(recipe.optim, warmup_steps=min(recipe.optim.warmup_steps, steps // 10)),
        model=replace(recipe.model, backbone=backbone, weights="none"),
        train=replace(
            recipe.train,
            run=str(SMALL_RUNS / Path(recipe.train.run).relative_to("runs")),
            epochs=SMALL_EPOCHS,
            keep_checkpoints=1,
            eval_every=SMALL_EPOCHS,
        ),
    )


def draw_small_set() -> None:
    """The drawn characters of the small scale, unless they are there."""
    if not (SMALL_SHARDS / MANIFEST_NAME).exists():
        from shards.build import build_shard_set
        from shards.demo.records import demo_records
        from shards.plan import BuildOptions

        build_shard_set(demo_records(20, SMALL_PICTURES, 72, 3), SMALL_SHARDS, BuildOptions(size=72))


def write_table(table: str, scale: str, cells: list[Cell], name: str) -> tuple[Path, list[Row]]:
    """Write what is finished; the path of the result, and its rows."""
    rows = [row_of(cell, scale) for cell in cells]
    parameters = {"table": table, "scale": scale}
    if scale == "small":
        parameters["note"] = (
            "ViT-B is a ViT-Ti here and ViT-L a ViT-S, images have half the side, both data sets are drawn characters, "
            f"{SMALL_EPOCHS} epochs from scratch: it shows that every recipe runs, not what the paper found; at the "
            "paper's rates, after so few steps, most of these models still answer the most frequent class"
        )
    return write_result("paper", name, parameters, rows), rows


def row_of(cell: Cell, scale: str) -> Row:
    """A cell: the paper's number, and ours or null. Accuracies in percent.

    At small scale ours is another model's on other data, so nothing is subtracted from it but our own baseline.
    """
    ours = own_top1(cell.recipe)
    base = own_top1(cell.own_baseline) if cell.own_baseline else None
    row = {"table": cell.table, "cell": cell.name, "scale": scale, "paper_top1": cell.paper_top1, "top1": ours}
    row["difference_points"] = minus(ours, cell.paper_top1) if scale == "full" else None
    row["baseline"] = cell.baseline
    before = cell.paper_baseline_top1
    row["paper_difference_percent"] = round(100 * (cell.paper_top1 - before) / before, 2) if before else None
    row["paper_difference_points"] = minus(cell.paper_top1, before)
    row["our_difference_points"] = minus(ours, base)
    row["trained_at"] = trained_at(cell.recipe) if is_finished(cell.recipe) else None
    return row


def own_top1(recipe: Recipe) -> float | None:
    """Test top-1 of a finished run in percent; None where it was not run to its end."""
    if not is_finished(recipe):
        return None
    return round(100 * test_evaluation(recipe)["top1"], 2)


def minus(a: float | None, b: float | None) -> float | None:
    """a - b, to two digits; None without both."""
    return None if a is None or b is None else round(a - b, 2)


def as_text(rows: Sequence[Row]) -> str:
    """A table for the terminal; blank where a cell was not run."""
    columns = [
        ("cell", "cell", ""),
        ("paper_top1", "paper", ".2f"),
        ("top1", "ours", ".2f"),
        ("difference_points", "ours - paper", "+.2f"),
        ("baseline", "baseline", ""),
        ("paper_difference_points", "paper - baseline", "+.2f"),
        ("our_difference_points", "ours - our baseline", "+.2f"),
    ]
    # Ours has its column also where no cell was run.
    table = table_of("", columns, [row | {"top1": "" if row["top1"] is None else row["top1"]} for row in rows])
    lines = [table.headings, *table.cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)) for line in lines)


# ---------------------------------------------------------------------- what the report shows
def headline(document: Document) -> str:
    """How many cells were run at each scale, and how far they are from the paper's."""
    rows = document["rows"]
    parts = []
    for scale, its in by(rows, "scale").items():
        if run := having(its, "top1"):
            # Only runs at full scale can be compared with the paper's.
            distances = [abs(distance) for distance in figures(run, "difference_points")]
            distance = f", on average {fmean(distances):.1f} points from the paper's" if distances else ""
            parts.append(f"{len(run)} of {len(its)} cells run at {scale} scale{distance}")
    return "; ".join(parts) or (f"{len(rows)} cells of the paper, none run" if rows else "")


def charts(document: Document) -> list[Chart]:
    """Of the runs at full scale: another scale's cannot be compared with the paper's."""
    full = [row for row in document["rows"] if row.get("scale") == "full"]
    return [
        Chart(name, caption, partial(_draw_beside_paper, rows, theirs, ours, what))
        for name, theirs, ours, what, caption in (
            ("top1", "paper_top1", "top1", "top-1, %", "Our top-1 over the paper's, a point for each cell."),
            (
                "differences",
                "paper_difference_points",
                "our_difference_points",
                "difference, points",
                "What a cell gains over its baseline: ours over the paper's.",
            ),
        )
        if (rows := having(full, theirs, ours))
    ]


def _draw_beside_paper(rows: Sequence[Row], theirs: str, ours: str, what: str) -> Figure:
    figure, axes = new_axes(HEIGHT + 1)
    for i, (table, its) in enumerate(by(rows, "table").items()):
        label = plain(f"table {table}" if table.isdigit() else table)
        axes.scatter(
            figures(its, theirs),
            figures(its, ours),
            label=label,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
        )
    ends = [row[key] for row in rows for key in (theirs, ours)]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linewidth=1)
    axes.set_xlabel(f"the paper's {what}")
    axes.set_ylabel(f"our {what}")
    legend(figure, len(by(rows, "table")))
    return figure


COLUMNS = [
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
]
BENCHMARK = Benchmark("paper", "The paper's tables, its numbers beside ours", Arguments, run, COLUMNS, headline, charts)
