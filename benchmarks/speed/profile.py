"""The profile of a recipe on one page: which batch and head to take, how sure that is, and what each costs and gains.

Everything on it comes from the rows of a result of `batch_size` with accuracies. What was not measured is said, with
what would measure it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.benchmark import Result
from benchmarks.load import BUSY
from benchmarks.pages import render
from benchmarks.speed.knee import measured_knee
from benchmarks.speed.recommend import COSTS, cheapest_ways, seeds_of
from benchmarks.tables import (
    FOLDED,
    Document,
    Row,
    Table,
    figures,
    having,
    is_number,
    short_backbone,
    table_of,
    text_of,
)
from dist_train.files import write_atomically

FEW_SEEDS = 4  # below it, draws of what there is understate the doubt too much to call anything settled
ROUGH = 1.5  # 95th percentile of the step times over their median, from which costs are said to be rough
TEXT_SIZE = 12.5  # of figures, points: a telephone shows them at four fifths
COST_NAMES = {"train_minutes": "time", "train_price": "money", "train_wh": "energy"}


def write_page(one: Result) -> Path | None:
    """Write the page beside the result, NAME.html, and return its path; None where no batch has been trained."""
    if not trained(one.document):
        return None
    path = one.path.with_suffix(".html")
    write_atomically(path, render_profile(one).encode())
    return path


def render_profile(one: Result) -> str:
    """The page, which needs nothing from outside."""
    return render(
        "profile.html.jinja",
        one=one,
        subject=subject(one),
        advice=advice(one.document),
        choices=list(choices(one.document)),
        tables=list(tables(one)),
        everything=table_of("Everything measured", None, one.document["rows"], folded=True),
        missing=list(missing(one)),
        text_size=TEXT_SIZE,
    )


def trained(document: Document) -> list[Row]:
    """One row of each batch that was trained, the quickest way to it."""
    return cheapest_ways(having(document["rows"], "batch_size", "top1", "train_minutes"), "train_minutes")


# ---------------------------------------------------------------- in three sentences
def advice(document: Document) -> list[str]:
    """What a practitioner should do, how sure that is, and what it costs: three sentences; none without accuracies."""
    rows = trained(document)
    chosen = next((row for row in rows if row.get("recommended")), None)
    if chosen is None:
        return []
    name = namer(rows)
    return [
        _what_to_do(document, rows, chosen, name),
        how_sure(document, rows, chosen, name),
        _what_it_costs(document, chosen),
    ]


def _what_to_do(document: Document, rows: Sequence[Row], chosen: Row, name: Callable[[Row], str]) -> str:
    best = max(rows, key=lambda row: (row["top1"], row is chosen))
    points = f"{tolerance_of(document):g} point{'s' * (tolerance_of(document) != 1)}"
    if len(rows) == 1:
        return f"Only {name(chosen)} was trained (top-1 {accuracy(chosen)}): nothing is recommended over anything else."
    if best is chosen:
        return (
            f"Train at {name(chosen)}: of the {len(rows)} that were trained it has the best top-1, {accuracy(chosen)}, "
            f"and none that is quicker comes within {points} of it."
        )
    return (
        f"Train at {name(chosen)}: of the {len(rows)} that were trained it is the quickest whose top-1, "
        f"{accuracy(chosen)}, is within {points} of the best, {accuracy(best)} at {name(best)}."
    )


def how_sure(document: Document, rows: Sequence[Row], chosen: Row, name: Callable[[Row], str]) -> str:
    """How sure the recommendation by time is, by the seeds that there are."""
    seeds = min(len(seeds_of(row)) for row in rows)
    if seeds < 2:
        return "How sure that is: not at all, as one seed decides nothing; give --seeds 4 before you rely on it."
    if len(rows) == 1:
        return f"It was trained with {seeds} seeds."
    ordered = sorted(having(rows, "recommended_share"), key=lambda row: -row["recommended_share"])
    others = [row for row in ordered if row is not chosen and row["recommended_share"] >= 0.01][:2]
    share = chosen.get("recommended_share", 0.0)
    verdict = "settled" if share >= 0.95 else "likely" if share >= 0.75 else "open"
    said = f"{name(chosen)} is recommended in {percent(share)} of resamples of the {seeds} seeds and step times"
    said += "".join(f", {name(row)} in {percent(row['recommended_share'])}" for row in others)
    if seeds < FEW_SEEDS:
        return f"How sure that is: a hint, as {seeds} seeds are few and understate the doubt; {said}."
    if (taken := document.get("busy_elsewhere") or 0.0) >= BUSY:
        return (
            f"How sure that is: open, as other processes took {percent(taken)} of the processor, so that the step "
            f"times, which decide with the seeds, are not to be relied on; {said}."
        )
    return f"How sure that is: {verdict}; {said}."


def _what_it_costs(document: Document, chosen: Row) -> str:
    costs = [f"take {duration(chosen['train_minutes'])}"]
    if having([chosen], "train_wh"):
        costs.append(f"use {chosen['train_wh']:,.3g} Wh")
    if having([chosen], "train_price"):
        hourly = asked(document).get("price_per_hour")
        costs.append(f"cost {chosen['train_price']:,.3g}" + (f" at {hourly:g} an hour" if is_number(hourly) else ""))
    if having([chosen], "step_ms", "step_ms_p95") and chosen["step_ms_p95"] > ROUGH * chosen["step_ms"]:
        costs[0] += f" (roughly: a slow step took {chosen['step_ms_p95'] / chosen['step_ms']:.1f} times the usual)"
    *others, last = costs
    said = f"The steps of such a training {' and '.join([', '.join(others), last] if others else [last])}"
    if not having([chosen], "train_wh"):
        return f"{said}; energy was not measured."
    rows = having(document["rows"], "batch_size", "top1", "train_wh")
    frugal = next((row for row in rows if row.get("recommended_wh")), chosen)
    same = all(frugal.get(key) == chosen.get(key) for key in ("backbone", "head", "image_size", "batch_size"))
    return f"{said}; by energy {'the choice is the same' if same else f'it would be {namer(rows)(frugal)}'}."


def choices(document: Document) -> Iterator[tuple[str, str]]:
    """What is recommended by each cost that the rows have: the cost, and what to take with what it comes to."""
    units = {"train_price": "", "train_wh": " Wh"}
    for cost, suffix in COSTS.items():
        rows = cheapest_ways(having(document["rows"], "batch_size", "top1", cost), cost)
        for row in rows:
            if not row.get(f"recommended{suffix}"):
                continue
            shares = figures([row], f"recommended_share{suffix}")
            comes_to = duration(row[cost]) if cost == "train_minutes" else f"{row[cost]:,.3g}{units[cost]}"
            sure = f"in {percent(shares[0])} of resamples" if shares else "by one seed"
            yield COST_NAMES[cost], f"{namer(rows)(row)}, top-1 {accuracy(row)}, {comes_to} a training, {sure}"


def tolerance_of(document: Document) -> float:
    """Points of top-1 that what is recommended may be below the best."""
    return next(iter(figures([document, asked(document)], "tolerance")), 1.0)


def asked(document: Document) -> dict[str, Any]:
    """What was asked of the sweep."""
    sweep = (document.get("parameters") or {}).get("sweep")
    return sweep if isinstance(sweep, dict) else {}


def subject(one: Result) -> str:
    """What was trained on what, in a line."""
    recipe = (one.document.get("parameters") or {}).get("recipe")
    sections = [recipe.get(name) if isinstance(recipe, dict) else None for name in ("model", "data", "train")]
    model, data, train = (section if isinstance(section, dict) else {} for section in sections)
    backbones = dict.fromkeys(short_backbone(row["backbone"]) for row in trained(one.document) if row.get("backbone"))
    parts = [", ".join(backbones), str(data.get("shards") or ""), str(model.get("weights") or "")]
    parts[2] = f"starting from {parts[2]}" if parts[2] and parts[2] != "none" else "from scratch" if parts[2] else ""
    parts += [f"{train['epochs']} epoch{'s' * (train['epochs'] != 1)}"] if "epochs" in train else []
    return ", ".join(part for part in [*parts, one.machine] if part)


def accuracy(row: Row) -> str:
    """`81.2 ± 0.4 %`: top-1 and its standard error, alone where there is one seed."""
    error = f" ± {100 * row['top1_error']:.1f}" if having([row], "top1_error") else ""
    return f"{100 * row['top1']:.1f}{error} %"


def duration(minutes: float) -> str:
    """`45 seconds`, `3.2 minutes` or `5.1 hours`."""
    for unit, of_minutes in (("hours", 60), ("minutes", 1)):
        if minutes >= 2 * of_minutes:
            return f"{minutes / of_minutes:,.3g} {unit}"
    return f"{60 * minutes:,.3g} seconds"


def percent(share: float) -> str:
    """A share in whole percent, none and all only where it is exactly that."""
    return "under 1 %" if 0 < share < 0.01 else "over 99 %" if 0.99 < share < 1 else f"{share:.0%}".replace("%", " %")


def namer(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What names a row among these: its batch, and of the rest what differs between them."""
    words: dict[str, Callable[[Row], str]] = {
        "backbone": lambda row: short_backbone(row.get("backbone", "")),
        "head": lambda row: f"the {str(row.get('head', '')).upper()} head",
        "image_size": lambda row: f"{row.get('image_size')} px",
    }
    differ = [key for key in words if len({row.get(key) for row in rows}) > 1]

    def name(row: Row) -> str:
        others = [words[key](row) for key in differ]
        return f"batch {row['batch_size']:,}" + (f" with {', '.join(others)}" if others else "")

    return name


# ---------------------------------------------------------------- the tables
def tables(one: Result) -> Iterator[Table]:
    """What each batch learns and costs, what its steps take, eager beside compiled, and the knees."""
    rows = one.document["rows"]
    yield table_of("What each batch learns and costs", _named(rows, LEARNS), _with_ranges(trained(one.document)))
    steps = [_with_way(row) for row in rows]
    yield table_of("What a step takes", _named(rows, TAKES), steps, folded=len(rows) >= FOLDED)
    yield _eager_and_compiled(rows)
    predicted = [row for row in trained(one.document) if row.get("noise_scale") or row.get("noise_scale_norms")]
    yield table_of("The batch beyond which more gains little, as predicted", _named(rows, PREDICTS), predicted)
    yield table_of("The same, as measured", MEASURED, measured_knee(one.path.stem))


def _named(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The columns behind those that tell the rows apart."""
    named = [("backbone", "backbone", ""), ("head", "head", ""), ("image_size", "px", "d")]
    differ = [column for column in named if len({text_of(row.get(column[0])) for row in rows}) > 1]
    return [*differ, ("batch_size", "batch", ",d"), *columns]


LEARNS = [
    ("accuracy", "top-1", ".1f"),
    ("seeds", "seeds", "d"),
    ("train_minutes", "minutes", ",.3g"),
    ("train_price", "price", ",.3g"),
    ("train_wh", "Wh", ",.3g"),
    ("fronts", "on the front of", ""),
    ("recommended_share", "in resamples", ".0%"),
]
TAKES = [
    ("way", "made", ""),
    ("step_ms", "step ms", ",.1f"),
    ("images_per_s", "images/s", ",.1f"),
    ("data_wait_share", "data wait", ".1%"),
    ("peak_mb", "peak MB", ",.0f"),
    ("device_mb", "whole GPU MB", ",.0f"),
    ("joules_per_image", "J/image", ",.3g"),
    ("largest_micro_batch", "largest micro-batch", ",d"),
]
PREDICTS = [
    ("noise_scale", "noise scale", ",.0f"),
    ("noise_scale_low", "low", ",.0f"),
    ("noise_scale_high", "high", ",.0f"),
    ("noise_scale_norms", "by the layer norms", ",.0f"),
    ("noise_scale_norms_low", "low", ",.0f"),
    ("noise_scale_norms_high", "high", ",.0f"),
]
MEASURED = [
    ("setting", "setting", ""),
    ("stage", "stage", ".0%"),
    ("seeds", "seeds", "d"),
    ("says", "knee", ""),
    ("fitted", "fitted", ",.0f"),
    ("predicted", "predicted", ",.0f"),
]


def _with_ranges(rows: Sequence[Row]) -> list[Row]:
    """The rows with their accuracy and the fronts that they are on, in words."""
    return [
        row
        | {
            "accuracy": accuracy(row),
            "seeds": len(seeds_of(row)),
            "fronts": ", ".join(COST_NAMES[cost] for cost, suffix in COSTS.items() if row.get(f"pareto{suffix}")),
        }
        for row in rows
    ]


def _with_way(row: Row) -> Row:
    """The row with how its batch was made, in words."""
    compiled = {None: "", "none": "eager"}.get(row.get("compile"), str(row.get("compile")))
    micro = row.get("micro_batch")
    parts = [compiled, f"{micro:,} at a time" if is_number(micro) and micro != row.get("batch_size") else ""]
    return row | {"way": ", ".join(part for part in parts if part) or None}


def _eager_and_compiled(rows: Sequence[Row]) -> Table:
    """Images a second of each batch by model.compile, side by side; an empty table where there is one value."""
    by_point: dict[tuple[Any, ...], Row] = {}
    ways = list(dict.fromkeys(str(row["compile"]) for row in rows if row.get("compile") is not None))
    for row in having(rows, "batch_size", "images_per_s"):
        key = tuple(row.get(key) for key in ("backbone", "head", "image_size", "batch_size", "micro_batch"))
        by_point.setdefault(key, _with_way(row | {"compile": None}))[str(row.get("compile"))] = row["images_per_s"]
    for row in by_point.values():
        for way in ways:
            if way != "none" and way in row and "none" in row:
                row[f"{way} over eager"] = row[way] / row["none"]
    columns = [
        ("way", "made", ""),
        *((way, f"{'eager' if way == 'none' else way}, images/s", ",.1f") for way in ways),
        *((f"{way} over eager", f"{way} over eager", ".2f") for way in ways if way != "none"),
    ]
    return table_of("Eager and compiled", _named(rows, columns), list(by_point.values()) if len(ways) > 1 else [])


# ---------------------------------------------------------------- what is not there
def missing(one: Result) -> Iterator[str]:
    """What the page does not show as it was not measured, and what would."""
    rows = one.document["rows"]
    seeds = min((len(seeds_of(row)) for row in trained(one.document)), default=1)
    if seeds < 2:
        yield "Error bars: one seed; --seeds 4 trains each batch with four."
    if not having(rows, "train_wh"):
        reason = next((row["no_energy"] for row in rows if row.get("no_energy")), "measured before there was a counter")
        yield f"Energy: {reason}."
    if not having(rows, "train_price"):
        yield "Money: --price-per-hour says what the device costs."
    if not having(rows, "data_wait_share"):
        yield "Data wait: --arm end_to_end measures steps that load what they train on."
    if len({row.get("compile") for row in rows}) < 2:
        yield "Eager beside compiled: --compile none,kernels measures both, on a GPU none,graphs."
    if not having(rows, "largest_micro_batch"):
        yield "The largest micro-batch that fits: --search 1024 finds it."
    if not any(row.get("noise_scale") or row.get("noise_scale_norms") for row in rows):
        yield "The predicted knee: --train.noise_every 10 has the trainings estimate the noise scale."
    if not measured_knee(one.path.stem):
        yield f"The measured knee: python -m benchmarks knee --name {one.path.stem}."
