"""What the branches of `benchmarks/claims/knee.py` say: the knee of each setting and stage, in numbers and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.charts import COLOURS, GREY, MARKERS, Chart, batch_axis, legend, new_axes, plain
from benchmarks.claims.knee_fit import Floats, Found, better_than_smallest, excess, find_knee, fit_critical
from benchmarks.tables import Document, Row, having, span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "val_loss"
"""Of the two losses of a row, the one that branches are compared by: it is of the last weights, where a training loss
is of some up to a batch older, which counts against large batches. Which of the two is less noisy is open: three seeds
in results/knee/demo.json do not tell them apart."""

SAID_ONE_BY_ONE = 3
"""Knees that a headline has room for."""
NEAR = 2
"""Factor within which a prediction counts as right."""


@dataclass(frozen=True)
class Losses:
    """Of one stage, in the seeds that have all branches: values (seeds, batches), batches ascending; factors: of each
    batch's rate, the one with the lowest mean loss; tried: all of them, ascending."""

    batches: list[int]
    seeds: list[int]
    values: Floats
    factors: list[float]
    tried: list[float]


def factor_of(row: Row) -> float:
    """Of a branch's rate; results from before there were several have one."""
    return row.get("factor", 1.0)


def losses_of(rows: Sequence[Row], setting: str, stage: float, key: str = LOSS) -> Losses | None:
    """The losses of a stage; one that was not finite is infinite. None before a first seed is complete."""
    of_stage = [row for row in rows if (row["setting"], row["stage"]) == (setting, stage)]
    by_run = {(row["seed"], row["batch"], factor_of(row)): row[key] for row in of_stage}
    batches = sorted({batch for _, batch, _ in by_run})
    factors = sorted({factor for _, _, factor in by_run})
    every = list(product(batches, factors))
    whole = [seed for seed in sorted({run[0] for run in by_run}) if all((seed, *one) in by_run for one in every)]
    if not whole or len(batches) < 2:
        return None
    found = [[by_run[seed, *one] for one in every] for seed in whole]
    values = np.array([[math.inf if value is None else value for value in line] for line in found], np.float64)
    values = values.reshape(len(whole), len(batches), len(factors))
    best = values.mean(axis=0).argmin(axis=1)
    values = values[:, np.arange(len(batches)), best]
    if not np.isfinite(values[:, 0]).all():
        return None
    return Losses(batches, whole, values, [factors[i] for i in best], factors)


def knee_of(rows: Sequence[Row], stage: Row, tolerance: float) -> Row:
    """The stage {setting, stage, start_loss, ...} with what its rows say: see `knee_fit`. Numbers are None where they
    lie beyond what was measured; `says` has the knee in words, `doubt` why neither number is to be trusted."""
    losses = losses_of(rows, stage["setting"], stage["stage"])
    if losses is None:
        return stage
    allowed = tolerance * float(losses.values[:, 0].mean())
    knee = find_knee(losses.values, losses.batches, allowed)
    fitted = fit_critical(losses.values, losses.batches, stage["start_loss"])
    smallest = losses.batches[0]
    doubt = None
    if best := better_than_smallest(losses.values, losses.batches):
        doubt = f"{best} is better than {smallest}: the rate does not suit the smallest batch"
    elif len(losses.tried) > 1 and losses.factors[0] in (losses.tried[0], losses.tried[-1]):
        end = "lowest" if losses.factors[0] == losses.tried[0] else "highest"
        doubt = f"of the rates that {smallest} tried the {end} is the best: its loss may be lower at others"
    return stage | {
        "seeds": len(losses.seeds),
        "allowed_loss": round(allowed, 5),
        **_numbers("knee", knee),
        "says": in_words(knee, losses.batches),
        **_numbers("fitted", fitted),
        "doubt": doubt,
        "factors": dict(zip(map(str, losses.batches), losses.factors, strict=True)),
    }


def _numbers(name: str, found: Found) -> Row:
    ends = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: round(value, 1) if math.isfinite(value) else None for key, value in ends.items()}


def in_words(knee: Found, batches: Sequence[int]) -> str:
    """`37 (22 to 61)`; what lies outside of the batches, or below the second, is said to."""

    def one(value: float) -> str:
        if math.isinf(value):
            return f"beyond {batches[-1]}"
        return f"below {batches[1]}" if value < batches[1] else f"{value:.0f}"

    if math.isnan(knee.low):
        return f"{one(knee.value)} (one seed)"
    low, high = one(knee.low), one(knee.high)
    return f"{one(knee.value)} ({low} to {high})" if low != high else one(knee.value)


def headline(document: Document) -> str:
    """The knees, and beside them what the noise scale predicted; of more than a few, how often that came near."""
    knees = [knee for knee in document.get("knees") or [] if "says" in knee]
    if len(knees) > SAID_ONE_BY_ONE:
        return _summary(knees)
    parts = []
    for knee in knees:
        predicted = knee.get("predicted")
        beside = f", predicted {predicted:.0f}" if predicted is not None else ""
        doubtful = ", doubtful" if knee.get("doubt") else ""
        parts.append(f"{knee['setting']} at {knee['stage']:.0%}: {knee['says']}{beside}{doubtful}")
    return "; ".join(parts)


def _summary(knees: Sequence[Row]) -> str:
    parts = [f"{len({knee['setting'] for knee in knees})} settings, {len(knees)} stages"]
    for name, what in (("knee", "the knee"), ("fitted", "the fitted batch")):
        known = [knee for knee in having(knees, "predicted", name) if not knee.get("doubt")]
        if known:
            ratios = [knee[name] / knee["predicted"] for knee in known]
            near = sum(1 / NEAR <= ratio <= NEAR for ratio in ratios)
            parts.append(
                f"{what} is {span(ratios, '.1f')} times the gradient noise scale, {statistics.median(ratios):.1f} in "
                f"the middle, and within a factor of {NEAR} of it in {near} of the {len(known)} that have both"
            )
    return "; ".join(parts)


def charts(document: Document) -> list[Chart]:
    """The excess loss over the batch size, and prediction beside measurement."""
    found = []
    knees = [knee for knee in document.get("knees") or [] if "says" in knee]
    if knees:
        caption = (
            "Loss on val after the same samples, less that of the smallest batch of the same seed: mean and standard "
            "error over the seeds. The dotted lines are what counts as not worse."
        )
        found.append(Chart("", caption, partial(_draw_excess, knees, document["rows"])))
    if compared := [knee for knee in having(knees, "predicted", "knee") if not knee.get("doubt")]:
        caption = (
            "The knee over the gradient noise scale where the branches begin, which predicts it, of the stages without "
            "a doubt. Between the grey lines they are within a factor of two."
        )
        found.append(Chart("predicted", caption, partial(_draw_predicted, compared)))
    return found


def name_of(knee: Row) -> str:
    """Of a stage, in a legend."""
    return f"{knee['setting']}, at {knee['stage']:.0%}"


def _draw_excess(knees: Sequence[Row], rows: Sequence[Row]) -> Figure:
    figure, axes = new_axes(3.5 + 0.2 * len(knees))
    batches: set[float] = set()
    for i, knee in enumerate(knees):
        losses = losses_of(rows, knee["setting"], knee["stage"])
        assert losses is not None  # it has a knee
        values = excess(losses.values)
        shown = np.isfinite(values).all(axis=0)
        sizes, values = np.array(losses.batches)[shown], values[:, shown]
        error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
        colour = COLOURS[i % len(COLOURS)]
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        axes.errorbar(sizes, values.mean(axis=0), error, label=plain(name_of(knee)), **style)
        axes.axhline(knee["allowed_loss"], color=colour, linestyle=":", linewidth=0.9)
        batches |= set(losses.batches)
    batch_axis(axes, sorted(batches))
    axes.set_ylabel("loss above that of the smallest batch")
    legend(figure, len(knees))
    return figure


def _draw_predicted(knees: Sequence[Row]) -> Figure:
    figure, axes = new_axes(3.5 + 0.2 * len(knees))
    for i, knee in enumerate(knees):
        spans: list[list[list[float]] | None] = []
        for name in ("predicted", "knee"):
            low, high = knee.get(f"{name}_low"), knee.get(f"{name}_high")
            value = knee[name]
            ends = [value - low if low is not None else 0.0, high - value if high is not None else 0.0]
            spans.append([[max(0.0, end)] for end in ends])
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.errorbar([knee["predicted"]], [knee["knee"]], spans[1], spans[0], label=plain(name_of(knee)), **style)
    values = [knee[name] for knee in knees for name in ("predicted", "knee")]
    reach = np.array([max(1e-3, min(values)) / 2, 2 * max(values)])
    for factor in (0.5, 1, 2):
        axes.plot(reach, factor * reach, color=GREY, linewidth=0.8, linestyle="-" if factor == 1 else "--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("gradient noise scale")
    axes.set_ylabel("knee")
    legend(figure, 2)  # one point needs its name too
    return figure


COLUMNS = [
    ("setting", "setting", ""),
    ("stage", "stage", ".0%"),
    ("batch", "batch", ",d"),
    ("seed", "seed", "d"),
    ("rate", "rate", ".3g"),
    ("steps", "steps", ",d"),
    ("samples", "samples", ",d"),
    ("val_loss", "loss on val", ".4f"),
    ("train_loss", "training loss", ".4f"),
    ("seconds", "s", ",.0f"),
]
