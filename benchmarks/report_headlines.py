"""What each result says in one sentence, made from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.tables import Document, Row, figures, having, rate, short_backbone, span, text_of

# In the order of the report; a bench that is not here comes after these.
BENCHES = {
    "study": "The paper's claims as questions, with seeds and controls",
    "paper": "The paper's tables, its numbers beside ours",
    "landscape": "Loss surfaces around trained weights",
    "batch_size": "What a batch size costs and gains",
    "ifa": "What the IFA head costs over the CLS head",
    "precision": "What a precision costs in accuracy",
    "gpu": "Correctness and speed on a GPU",
    "step": "What a training step costs",
    "engine": "DeepSpeed's engine beside a bare PyTorch loop",
    "exchange": "The gradients' exchange beside torch's DDP, over a slow cable",
    "loader": "Data loaders side by side",
    "kill": "A run killed again and again beside an undisturbed one",
}


def _study(document: Document, rows: Sequence[Row]) -> str:
    verdicts = Counter(text_of(answer.get("verdict")) for answer in document.get("answers") or [])
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items() if verdict)
    return f"Of {verdicts.total()} questions {said}; {len(rows)} training runs" if said else ""


def _paper(_: Document, rows: Sequence[Row]) -> str:
    parts = []
    for scale in dict.fromkeys(text_of(row.get("scale")) for row in rows):
        run = having([row for row in rows if text_of(row.get("scale")) == scale], "top1")
        if run:
            # Only runs at full scale can be compared with the paper's.
            distances = [abs(distance) for distance in figures(run, "difference_points")]
            mean = sum(distances) / max(1, len(distances))
            distance = f", on average {mean:.1f} points from the paper's" if distances else ""
            parts.append(f"{len(run)} of {len(rows)} cells run at {scale} scale{distance}")
    return "; ".join(parts) or (f"{len(rows)} cells of the paper, none run" if rows else "")


def _landscape(_: Document, rows: Sequence[Row]) -> str:
    by_head = {
        head: figures([row for row in rows if row.get("head") == head], "mean_excess_loss")
        for head in dict.fromkeys(row.get("head") for row in rows)
    }
    parts = [f"{text_of(head).upper()} {span(values, '.3f')}" for head, values in by_head.items() if values]
    return f"Mean excess loss around the weights: {', '.join(parts)}" if parts else ""


def _batch_size(_: Document, rows: Sequence[Row]) -> str:
    for row in having([row for row in rows if row.get("recommended")], "batch_size", "images_per_s"):
        top1 = f", top-1 {row['top1']:.2%}" if having([row], "top1") else ""
        model = f"{short_backbone(row.get('backbone', ''))} {text_of(row.get('head')).upper()}"
        return f"Recommended: {model}, batch {row['batch_size']:,}, {rate([row['images_per_s']])} images/s{top1}"
    rates = figures(rows, "images_per_s")
    return f"{rate(rates)} images/s at batches of {span(figures(rows, 'batch_size'), ',')}" if rates else ""


def _ifa(_: Document, rows: Sequence[Row]) -> str:
    parts = []
    for head, words in (("ifa", "IFA as here"), ("stacked", "stacked as in the reference")):
        its = having([row for row in rows if row.get("head") == head], "time_over_cls", "peak_over_cls_in_bdl")
        if its:
            times, floats = (figures(its, key) for key in ("time_over_cls", "peak_over_cls_in_bdl"))
            parts.append(
                f"{words} {span(times, '.3f')} times CLS's time and {span(floats, ',.1f')} (B, D, L) floats more"
            )
    return "; ".join(parts)


def _step(_: Document, rows: Sequence[Row]) -> str:
    parts = []
    for arm in dict.fromkeys(text_of(row.get("arm")) for row in rows):
        if rates := figures([row for row in rows if text_of(row.get("arm")) == arm], "images_per_s"):
            parts.append(f"{arm.replace('_', ' ')} {rate(rates)} images/s")
    return ", ".join(parts)


def _engine(_: Document, rows: Sequence[Row]) -> str:
    if turned_back := having(rows, "it_excess_ms_per_million", "ours_excess_ms_per_million"):
        saves = {id(row): row["it_excess_ms_per_million"] - row["ours_excess_ms_per_million"] for row in turned_back}
        most = max(turned_back, key=lambda row: saves[id(row)])
        return (
            f"Of our settings {text_of(most.get('turned_back'))} save the most: {saves[id(most)]:.1f} ms a step and "
            f"million parameters under ZeRO {text_of(most.get('zero_stage'))}"
        )
    ours, default = figures(rows, "ours_ratio"), figures(rows, "default_ratio")
    if not ours or not default:
        return ""
    if not having(rows, "ours_excess_ms_per_million"):
        stages = ", ".join(f"{row['ours_ratio']:.2f} (ZeRO {row['zero_stage']})" for row in rows if "ours_ratio" in row)
        return f"The host's time for a step over a bare loop's: {stages}; DeepSpeed's defaults {span(default, '.2f')}"
    return f"Ours takes {span(ours, '.3f')} of a bare loop's step, DeepSpeed's defaults {span(default, '.3f')}"


def _precision(document: Document, _: Sequence[Row]) -> str:
    parts = []
    for row in having(document.get("differences") or [], "points", "standard_error"):
        points = f"{row['points']:+.2f} +- {row['standard_error']:.2f} points"
        parts.append(f"{row['precision']} is {points} from {row['compared_with']}")
    return ", ".join(parts)


def _exchange(_: Document, rows: Sequence[Row]) -> str:
    parts = []
    for row in having(rows, "step_over_ddp", "exposed_share"):
        if (who := text_of(row.get("contestant"))) not in ("alone", "ddp"):
            parts.append(f"{who} {row['step_over_ddp']:.3f} ({row['exposed_share']:.2f})")
    return f"Step over DDP's (share of the exchange that is exposed): {', '.join(parts)}" if parts else ""


def _loader(_: Document, rows: Sequence[Row]) -> str:
    ours = figures([row for row in rows if row.get("loader") == "this project"], "images_per_s")
    others = [
        row for row in rows if row.get("loader") != "this project" and "ceiling" not in text_of(row.get("loader"))
    ]
    times = figures(others, "ours_is_times")
    if not ours or not times:
        return ""
    return f"{ours[0]:,.0f} images/s, {span(times, '.2f')} times the {len(times)} others"


def _kill(_: Document, rows: Sequence[Row]) -> str:
    kills = figures(rows, "kills")
    if not kills:
        return ""
    same = all(row.get("identical_weights") is True and row.get("each_sample_once") is True for row in rows)
    end = "weights bit-identical, each sample once per epoch" if same else "not all ended as the undisturbed run"
    ranks = ", ".join(f"{rank:g} rank{'s' * (rank != 1)}" for rank in figures(rows, "ranks"))
    return f"{sum(kills):,} kills{f' on {ranks}' if ranks else ''}: {end}"


def _gpu(document: Document, rows: Sequence[Row]) -> str:
    known = [target for target in document.get("targets") or [] if target.get("met") is not None]
    met = sum(target["met"] is True for target in known)
    return f"{met} of {len(known)} targets met; {len(rows)} rows" if known else ""


_HEADLINES: dict[str, Callable[[Document, Sequence[Row]], Any]] = {
    "study": _study,
    "paper": _paper,
    "landscape": _landscape,
    "batch_size": _batch_size,
    "ifa": _ifa,
    "gpu": _gpu,
    "step": _step,
    "engine": _engine,
    "precision": _precision,
    "exchange": _exchange,
    "loader": _loader,
    "kill": _kill,
}
