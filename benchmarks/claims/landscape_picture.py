"""The picture of a landscape result: contours of every run's loss surface, and below them the surfaces themselves.

`python -m benchmarks.claims.landscape_picture RESULT.json` draws it again from the arrays beside the result.
"""

from __future__ import annotations

import io
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import UseError, WorkError, run_command
from dist_train.files import write_atomically

_LEVELS = 16
_CLIP_QUANTILE = 0.9  # the surfaces' corners would leave nothing to see of their middle
_COLOURS = "viridis"


def draw_landscape(result: Path) -> Path:
    """Draw `NAME.png` beside `NAME.json`; returns its path.

    Contours (log-spaced levels) and colours are shared by all runs, so that the same colour is the same loss; the
    surfaces end at a shared height, the 0.9 quantile of all losses. A loss that is no finite number is left blank.
    Raises UseError where matplotlib is not installed, WorkError where the arrays cannot be read.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UseError(
            f"no picture, as matplotlib is not installed: pip install -e '.[benchmarks]', then "
            f"python -m benchmarks.claims.landscape_picture {result}"
        ) from None

    rows = json.loads(result.read_bytes())["rows"]
    surfaces = [_read_arrays(result.parent / row["arrays"]) for row in rows]
    levels = shared_levels([surface["loss"] for surface in surfaces])
    norm = LogNorm(levels[0], levels[-1])
    every = np.concatenate([surface["loss"].ravel() for surface in surfaces])
    top = float(np.quantile(every[np.isfinite(every)], _CLIP_QUANTILE))

    figure = Figure(figsize=(1.2 + 3.6 * len(rows), 7.6), layout="constrained")
    flat = []
    for i, (row, surface) in enumerate(zip(rows, surfaces, strict=True)):
        loss = np.where(np.isfinite(surface["loss"]), surface["loss"], np.nan).T  # contours have x along the columns
        axes = figure.add_subplot(2, len(rows), 1 + i)
        flat.append(axes)
        filled = axes.contourf(
            surface["a"], surface["b"], np.maximum(loss, levels[0]), levels, norm=norm, cmap=_COLOURS
        )
        lines = axes.contour(surface["a"], surface["b"], loss, levels[1:-1:2], colors="white", linewidths=0.6)
        axes.clabel(lines, fmt="%.3g", fontsize=7)
        axes.plot(0, 0, "+", color="red", markersize=8)
        axes.set_title(_title(row), fontsize=9)
        axes.set_xlabel("a", fontsize=8)
        axes.set_ylabel("b", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_aspect("equal")
        ticks = np.linspace(surface["a"][0], surface["a"][-1], 5)
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)

        deep = figure.add_subplot(2, len(rows), 1 + len(rows) + i, projection="3d")
        a, b = np.meshgrid(surface["a"], surface["b"])
        deep.plot_surface(a, b, np.minimum(loss, top), cmap=_COLOURS, norm=norm, rstride=1, cstride=1, linewidth=0)
        deep.set_xticks(ticks[::2])
        deep.set_yticks(ticks[::2])
        deep.set_zlim(float(levels[0]), top)
        deep.set_xlabel("a", fontsize=8)
        deep.set_ylabel("b", fontsize=8)
        deep.set_zlabel("loss", fontsize=8)
        deep.tick_params(labelsize=7)
    bar = figure.colorbar(filled, ax=flat, ticks=levels[::3], format="%.3g", shrink=0.9)
    bar.set_label("cross-entropy", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.minorticks_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    path = result.with_suffix(".png")
    write_atomically(path, content.getvalue())
    return path


def shared_levels(losses: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Log-spaced contour levels from the lowest to the highest finite loss of all surfaces, ascending."""
    every = np.concatenate([loss.ravel() for loss in losses])
    every = every[np.isfinite(every)]
    if not len(every):
        raise WorkError("no picture: none of the losses is a finite number; measure with a smaller radius")
    lowest = max(float(every.min()), 1e-6)  # a logarithm ends above 0
    return np.geomspace(lowest, max(float(every.max()), 1.001 * lowest), _LEVELS)


def _title(row: dict[str, Any]) -> str:
    loss, top1 = ("-" if row[key] is None else f"{row[key]:.3g}" for key in ("loss", "top1"))
    lines = [
        textwrap.fill(row["run"], 36),
        f"{row['head']} head, batch {row['batch_size']}, {row['image_size']} px",
        f"loss {loss}, top-1 {top1}",
    ]
    return "\n".join(lines)


def _read_arrays(path: Path) -> dict[str, NDArray[np.float64]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("a", "b", "loss")}
    except Exception as error:  # zip, zlib and numpy each have errors of their own
        raise WorkError(f"{path}: cannot be read ({' '.join(str(error).split())}); measure again") from None


if __name__ == "__main__":
    sys.exit(run_command(lambda: print(draw_landscape(Path(sys.argv[1])))))
