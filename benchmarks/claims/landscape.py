"""Loss surfaces around trained weights, as in Figure 3 of the paper, with the numbers that the picture suggests.

Every run is looked at on the same samples: the first of a split, without augmentation, held in memory, each at the
run's own image size and with as many tags as it reads.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import result
from benchmarks.benchmark import Benchmark
from benchmarks.charts import COLOURS, Chart, legend, new_axes, plain, png
from benchmarks.claims.landscape_arguments import Arguments
from benchmarks.tables import Document, Row, by, figures, short_backbone, span, text_of
from dist_train.errors import WorkError
from dist_train.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float64]]

LEVELS = 16
CLIP_QUANTILE = 0.9  # the surfaces' corners would leave nothing to see of their middle
COLUMNS_OF_RUNS = 4
log = logging.getLogger(__name__)


def run(arguments: Arguments) -> Path:
    """Measure the surfaces of the runs' newest checkpoints and write the result.

    Beside `NAME.json` stay the arrays of run i, `NAME-<i>-<run>.npz` (see `surface_arrays`), and the picture `NAME.png`
    if matplotlib is installed. Until then a work file for each run holds what is finished.

    Raises UseError where there is no trained run, and for runs of different shard sets; WorkError for damaged files.
    """
    from benchmarks.claims.landscape_run import measure_run, read_runs, save_arrays

    recipes, manifest = read_runs(arguments.runs)
    manifest.split(arguments.split)
    folder = result.RESULTS / "landscape"
    folder.mkdir(parents=True, exist_ok=True)
    stems = [f"{arguments.name}-{i}-{run.resolve().name}" for i, run in enumerate(arguments.runs)]
    works = [folder / f"{stem}.work.npz" for stem in stems]
    rows, surfaces = [], []
    for run, recipe, stem, work in zip(arguments.runs, recipes, stems, works, strict=True):
        row, arrays = measure_run(run, recipe, manifest, arguments, work)
        rows.append(row | {"arrays": f"{stem}.npz"})
        surfaces.append(arrays)
    for row, arrays in zip(rows, surfaces, strict=True):
        save_arrays(folder / row["arrays"], arrays)
    parameters = arguments.settings | {"precision": "float32", "manifest_digest": manifest.digest}
    path = result.write_result("landscape", arguments.name, parameters, rows)
    for work in works:
        work.unlink()
    try:
        for chart in charts({"rows": rows}):
            write_atomically(path.with_name(f"{path.stem}{'-' * bool(chart.name)}{chart.name}.png"), png(chart))
    except ModuleNotFoundError:  # there are results without a picture
        log.warning(
            "%s: no picture, as matplotlib is not installed: pip install -e '.[benchmarks]', then "
            "python -m benchmarks report",
            path,
        )
    return path


# ---------------------------------------------------------------------- what the report shows
def headline(document: Document) -> str:
    """The range of the sharpness, for each head."""
    sharp = {head: figures(rows, "mean_excess_loss") for head, rows in by(document["rows"], "head").items()}
    parts = [f"{head.upper()} {span(values, '.3f')}" for head, values in sharp.items() if values]
    return f"Mean excess loss around the weights: {', '.join(parts)}" if parts else ""


def charts(document: Document) -> list[Chart]:
    """The surfaces of the runs whose arrays are there, with the same levels, and their losses on the line."""
    # The name alone: a result does not say where else to read.
    files = [(row, result.RESULTS / "landscape" / Path(str(row.get("arrays"))).name) for row in document["rows"]]
    runs = [(row, read_arrays(path)) for row, path in files if path.is_file()]
    drawn = []
    if any(np.isfinite(arrays["loss"]).any() for _, arrays in runs):
        caption = "Loss over two filter-normalised directions, the same levels for all runs."
        drawn.append(Chart("", caption, partial(draw_surfaces, runs)))
    if lines := [(row, arrays) for row, arrays in runs if len(arrays.get("line_loss", ()))]:
        caption = "Loss on the line through the starting weights (0) and the trained ones (1)."
        drawn.append(Chart("line", caption, partial(draw_lines, lines)))
    return drawn


def read_arrays(path: Path) -> Arrays:
    """The arrays of a run. Raises WorkError where they cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name], np.float64) for name in arrays.files}
    except Exception as error:  # zip, zlib and numpy each have errors of their own
        raise WorkError(f"{path}: cannot be read ({' '.join(str(error).split())}); measure again") from None


def draw_surfaces(runs: Sequence[tuple[Row, Arrays]]) -> Figure:
    """Contours of every run's surface, and below them the surface itself.

    Log-spaced levels and colours are shared by all runs, so that the same colour is the same loss; the surfaces end at
    a shared height, the 0.9 quantile of all losses. A loss that is no finite number is left blank.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    every = np.concatenate([arrays["loss"].ravel() for _, arrays in runs])
    every = every[np.isfinite(every)]
    levels, top = shared_levels(every), float(np.quantile(every, CLIP_QUANTILE))
    colours: dict[str, Any] = {"norm": LogNorm(levels[0], levels[-1]), "cmap": "viridis"}
    columns = min(COLUMNS_OF_RUNS, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 7.6 * lines), layout="constrained")
    flat = []
    for i, (row, arrays) in enumerate(runs):
        a, b = arrays["a"], arrays["b"]
        loss = np.where(np.isfinite(arrays["loss"]), arrays["loss"], np.nan).T  # contours have x along the columns
        place = 1 + 2 * columns * (i // columns) + i % columns
        axes = figure.add_subplot(2 * lines, columns, place)
        filled = axes.contourf(a, b, np.maximum(loss, levels[0]), levels, **colours)
        axes.clabel(axes.contour(a, b, loss, levels[1:-1:2], colors="white", linewidths=0.6), fmt="%.3g", fontsize=7)
        axes.plot(0, 0, "+", color="red", markersize=8)
        axes.set_aspect("equal")
        axes.set_title(_title(row), fontsize=9)
        flat.append(axes)
        deep = figure.add_subplot(2 * lines, columns, place + columns, projection="3d")
        deep.plot_surface(*np.meshgrid(a, b), np.minimum(loss, top), rstride=1, cstride=1, linewidth=0, **colours)
        deep.set_zlim(float(levels[0]), top)
        deep.set_zlabel("loss", fontsize=8)
        for each in (axes, deep):
            each.set_xlabel("a", fontsize=8)
            each.set_ylabel("b", fontsize=8)
            each.set_xticks(np.linspace(a[0], a[-1], 3))
            each.set_yticks(np.linspace(b[0], b[-1], 3))
            each.tick_params(labelsize=7)
    bar = figure.colorbar(filled, ax=flat, ticks=levels[::3], format="%.3g", shrink=0.9 / lines)
    bar.set_label("cross-entropy", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.minorticks_off()
    return figure


def shared_levels(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-spaced contour levels from the lowest to the highest of the finite losses, ascending."""
    lowest = max(float(losses.min()), 1e-6)  # a logarithm ends above 0
    return np.geomspace(lowest, max(float(losses.max()), 1.001 * lowest), LEVELS)


def draw_lines(runs: Sequence[tuple[Row, Arrays]]) -> Figure:
    """Loss of every run over the position on the line."""
    figure, axes = new_axes(3.3 + 0.2 * len(runs))
    for i, (row, arrays) in enumerate(runs):
        name = [short_backbone(row.get("backbone") or ""), text_of(row.get("head")).upper()]
        name += [f"{key} {row[of]}" for of, key in (("batch_size", "batch"), ("seed", "seed")) if of in row]
        label = plain(", ".join(filter(None, name)))
        axes.plot(arrays["t"], arrays["line_loss"], color=COLOURS[i % len(COLOURS)], label=label)
    axes.set_xlabel("t: 0 starting weights, 1 trained weights")
    axes.set_ylabel("cross-entropy")
    legend(figure, len(runs))
    return figure


def _title(row: Row) -> str:
    loss, top1 = (text_of(row.get(key), ".3g") or "-" for key in ("loss", "top1"))
    head, batch, side = (text_of(row.get(key)) for key in ("head", "batch_size", "image_size"))
    model = f"{head} head, batch {batch}, {side} px"
    return plain("\n".join([textwrap.fill(text_of(row.get("run")), 36), model, f"loss {loss}, top-1 {top1}"]))


COLUMNS = [
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
    ("expected_excess_loss", "over more directions", ".4f"),
    ("expected_excess_loss_error_directions", "± over directions (95 %)", ".4f"),
    ("expected_excess_loss_error_samples", "± over samples (95 %)", ".4f"),
    ("curvature", "curvature", ",.4g"),
    ("largest_eigenvalue", "largest eigenvalue of the Hessian", ",.4g"),
    ("eigenvalue_residual", "its residual", ".1%"),
    ("line_barrier", "barrier on the line", ".4f"),
]
BENCHMARK = Benchmark(
    "landscape", "Loss surfaces around trained weights", Arguments, run, COLUMNS, headline, charts, pictured=True
)
