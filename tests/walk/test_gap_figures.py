"""What the documents say of batch sizes and heads is what the committed runs say."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.claims.gap_answers import closed, closers
from benchmarks.claims.gap_runs import accuracies
from benchmarks.claims.study_runs import Seeds
from dist_train.train.schedule import count_steps
from tests.walk.documents import result, text_in_one_line, text_of

GAPS = {"photos, 43 classes": "grocery-frozen", "photos, 81 classes": "grocery-fine-frozen"}
GAPS |= {"drawn characters": "drawn-frozen"}


def test_what_a_large_batch_costs_a_head_is_what_was_measured() -> None:
    named = {"cls": "cls", "ifa": "ifa", "ifa mean": "ifa from the mean", "ifa last": "ifa from the last block"}
    named |= {"last_n": "last four", "all_layers": "all layers", "attentive mean": "attentive"}
    table = [line for line in text_of("docs/training.md").splitlines() if line.startswith("| `model.head: ")]
    rows = {
        (place, row["head"]): row
        for place, name in GAPS.items()
        for row in result(f"gap/{name}")["test_top1_in_percent"]
    }
    assert len(table) == len(rows)
    for line in table:
        head, place, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        words = " ".join(part.split(": ")[1].rstrip("`") for part in head.split(", "))
        row = rows.pop((place, named[words]))
        assert cells == [row[key] for key in ("batch 16", "batch 256", "equal steps", "adamw + own rate")]
    assert not rows


def test_what_is_said_of_large_batches_and_heads_is_what_the_runs_say() -> None:
    documents = {place: result(f"gap/{name}") for place, name in GAPS.items()}
    compared = {
        place: [row for row in document["rows"] if not row["searched_rate"]] for place, document in documents.items()
    }

    def mean(place: str, head: str, remedy: str, batch: int) -> float:
        return accuracies(compared[place], head, remedy, batch).mean

    verdicts = [
        {answer["question"]: answer["verdict"] for answer in document["answers"]} for document in documents.values()
    ]
    for verdict in verdicts:
        assert verdict["Does `equal steps` win back what batch 256 loses?"] == "yes"
        condition = "when the gap is closed by `equal steps`?"
        assert verdict[f"Is `attentive` better than CLS at batch 256 {condition}"] == "yes"
        # Of IFA and its other starts none is better; on drawn characters the paper's cannot be told from CLS.
        ifa = [its for asked, its in verdict.items() if asked.startswith("Is `ifa") and asked.endswith(condition)]
        assert ifa and "yes" not in ifa
    for document in documents.values():  # "four of the six heads"
        found = [row["rate"] for row in document["rates"] if row["remedy"] == "adamw + own rate"]
        highest = max(map(float, document["parameters"]["adamw_rates"].split(",")))
        assert (len(found), found.count(highest), highest) == (6, 4, 0.01)
    text, batches = text_in_one_line("docs/training.md"), (16, 256)

    def list_of(numbers: Iterable[float], form: str = ".0f") -> str:
        first, second, third = (f"{number:{form}}" for number in numbers)
        return f"{first}, {second} and {third}"

    won = {place: dict(closers(rows, batches)) for place, rows in compared.items()}
    assert f"As many steps win back {list_of(its['equal steps'] for its in won.values())} % of the loss" in text
    assert f"rate of its own wins back {list_of(its['adamw + own rate'] for its in won.values())} %" in text
    assert f"searched at batch 256 wins back {list_of(its['own rate'] for its in won.values())} %" in text
    assert all(its["momentum by samples"] < 0 for its in won.values())
    of_cls = [
        list_of(closed(rows, "cls", remedy, batches).mean for rows in compared.values())
        for remedy in ("square root", "linear")
    ]
    assert f"Of `cls` the square root rule wins back {of_cls[0]} %, the linear one {of_cls[1]} %" in text
    readme = text_in_one_line("README.md")
    lost = [mean(place, "cls", "fixed", 16) - mean(place, "cls", "fixed", 256) for place in GAPS]
    photos, fine, drawn = (f"{points:.1f}" for points in lost)
    assert f"{photos} points on photos of 43 classes, {fine} on 81, {drawn} on drawn characters" in readme
    gains = {
        head: sorted(mean(place, head, "equal steps", 256) - mean(place, "cls", "equal steps", 256) for place in GAPS)
        for head in ("ifa", "attentive")
    }
    query = (mean(place, "attentive", "equal steps", 256) - mean(place, "cls", "equal steps", 256) for place in GAPS)
    assert f"With as many steps `attentive` is above `cls` by {list_of(query, '.1f')} points" in text
    low, high = gains["attentive"][0], gains["attentive"][-1]
    assert f"a learned query over all layers {low:.1f} to {high:.1f} above" in readme
    low, high = -gains["ifa"][-1], -gains["ifa"][0]
    assert f"IFA, the paper's remedy, is {low:.1f} to {high:.1f} points below CLS" in readme


def test_what_is_said_of_trained_backbones_is_what_their_runs_say() -> None:
    text, document = text_in_one_line("docs/training.md"), result("gap/grocery-upper")
    named = {"`cls`": "cls", "`ifa`": "ifa", "`attentive`, `head_init: mean`": "attentive"}
    named |= {"`all_layers`": "all layers", "`last_n`": "last four"}
    lines = text_of("docs/training.md").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| Head, upper two blocks trained"))
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : first + 2 + len(named)]
    ]
    slow = "adamw + own rate + layer decay"
    keys = ("batch 16", "batch 256", "equal steps", "own rate", "adamw + own rate", slow)
    expected = {row["head"]: [row[key] for key in keys] for row in document["test_top1_in_percent"]}
    assert {named[head.removeprefix("with ")]: cells for head, *cells in table} == expected
    heads = [named[head.removeprefix("with ")] for head, *_ in table]
    rows = [row for row in document["rows"] if not row["searched_rate"]]

    def won_back(remedy: str) -> str:
        *some, last = (f"{closed(rows, head, remedy, (16, 256)).mean:.0f}" for head in heads)
        return f"{', '.join(some)} and {last} %"

    assert f"win back {won_back('equal steps')} of the loss, in the order of the table" in text
    assert (
        f"batch 256 wins back {won_back('own rate')}, AdamW at a rate of its own {won_back('adamw + own rate')}" in text
    )
    worse = [head for head in heads if closed(rows, head, "linear", (16, 256)).mean < 0]
    assert worse == [head for head in heads if head != "ifa"]  # "all but `ifa` worse"
    assert all(closed(rows, head, "equal steps", (16, 256)).mean >= 95 for head in heads)  # README: "as they do"

    def above_cls(remedy: str, batch: int) -> dict[str, Seeds]:
        cls = accuracies(rows, "cls", remedy, batch)
        return {head: accuracies(rows, head, remedy, batch) - cls for head in heads[1:]}

    assert max(gain.sign for gain in above_cls("fixed", 16).values()) <= 0  # "no head is above `cls`"
    equal = above_cls("equal steps", 256)
    query, every, four = (equal[head] for head in ("attentive", "all layers", "last four"))
    assert (query.sign, every.sign, four.sign, equal["ifa"].sign) == (1, 1, 0, -1)
    said = [f"{gain.mean:+.1f} ± {gain.error:.1f}" for gain in (query, every, four)]
    assert f"`attentive` is ({said[0]} points) and `all_layers` ({said[1]}); `last_n` cannot be told from it" in text
    assert f"({said[2]}), and `ifa` is {-equal['ifa'].mean:.1f} ± {equal['ifa'].error:.1f} points below." in text
    assert {len(gain) for gain in equal.values()} == {4}
    adamw = {head: gain.mean for head, gain in above_cls("adamw + own rate", 256).items()}
    assert (min(adamw, key=adamw.__getitem__), max(adamw, key=adamw.__getitem__)) == ("ifa", "all layers")
    assert f"by {adamw['ifa']:.1f} points (`ifa`) to {adamw['all layers']:.1f} (`all_layers`)" in text
    decayed = {head: accuracies(rows, head, slow, 256) for head in heads}
    assert {len(seeds) for seeds in decayed.values()} == {4}
    gained = {head: its - accuracies(rows, head, "adamw + own rate", 256) for head, its in decayed.items()}
    above, every = decayed["cls"] - decayed["ifa"], decayed["all layers"] - decayed["cls"]
    assert (gained["cls"].sign, gained["ifa"].sign, above.sign, every.sign) == (1, -1, 1, 0)
    said = [f"{seeds.mean:.1f} ± {seeds.error:.1f}" for seeds in (gained["cls"], above, every)]
    assert f"`cls` gains {said[0]} points and is {said[1]} above `ifa`, which loses {-gained['ifa'].mean:.1f}" in text
    assert f"cannot be told from `cls` then (+{said[2]})" in text
    below = [decayed["cls"] - decayed[head] for head in ("attentive", "last four")]
    assert [seeds.sign for seeds in below] == [1, 1]
    said = [f"{seeds.mean:.1f} ± {seeds.error:.1f}" for seeds in below]
    assert f"and {said[0]} and {said[1]} above `attentive` and `last_n`;" in text
    chosen = {row["head"]: row["rate"] for row in document["rates"] if row["remedy"] == slow}
    highest = max(map(float, document["parameters"]["adamw_rates"].split(",")))
    assert {head for head, rate in chosen.items() if rate < highest} == {"all layers"} and len(chosen) == len(heads)
    embedding = result("gap/grocery-all")
    (row,) = embedding["test_top1_in_percent"]
    assert f"falls from {row['batch 16']} to {row['batch 256']} %, and to {row['frozen embedding']} % with" in text
    assert embedding["rates"][0]["rate"] == min(map(float, embedding["parameters"]["rates"].split(",")))


def test_what_is_said_of_the_start_of_ifa_is_what_its_runs_say() -> None:
    text, document = text_in_one_line("docs/training.md"), result("gap/grocery-upper-starts")
    rows = [row for row in document["rows"] if not row["searched_rate"]]
    places = [("fixed", 16), ("fixed", 256), ("equal steps", 256)]

    def levels(head: str) -> list[str]:
        return [f"{accuracies(rows, head, *place).mean:.1f}" for place in places]

    mean, last, paper = levels("ifa from the mean"), levels("ifa from the last block"), levels("ifa")
    pairs = [f"{a} and {b} %" for a, b in zip(mean, last, strict=True)]
    assert f"{pairs[0]} at batch 16, {pairs[1]} at batch 256 and {pairs[2]} there with as many steps" in text
    assert f"where the paper's start has {paper[0]}, {paper[1]} and {paper[2]} %." in text
    assert f"`cls` has {levels('cls')[2]} % with as many steps." in text

    def beside(other: str, place: tuple[str, int]) -> list[Seeds]:
        starts = (accuracies(rows, f"ifa from the {start}", *place) for start in ("mean", "last block"))
        return [seeds - accuracies(rows, other, *place) for seeds in starts]

    def said(seeds: Seeds) -> str:
        return f"{abs(seeds.mean):.1f} ± {seeds.error:.1f}"

    assert {len(seeds) for place in places for seeds in beside("ifa", place)} == {4}
    mean, last = beside("ifa", places[2])
    assert (mean.sign, last.sign) == (1, 1)
    assert f"the start's, {said(mean)} points by the mean and {said(last)} by the last block" in text
    mean, last = beside("cls", places[2])
    assert (mean.sign, last.sign) == (0, -1) and mean.mean < 0
    assert f"cannot be told from `cls` then (-{said(mean)}), from the last block it is {said(last)} below." in text
    assert [seeds.sign for seeds in beside("ifa", places[0])] == [0, 0]  # "do not tell the starts apart"


def test_the_profile_of_photos_is_what_was_measured() -> None:
    document = result("batch_size/photos")
    assert {len(row["top1_by_seed"]) for row in document["rows"]} == {4}

    def levels(head: str) -> str:
        rows = {row["batch_size"]: row for row in document["rows"] if row["head"] == head}
        first, second, third = (
            f"{100 * rows[b]['top1']:.1f} ± {100 * rows[b]['top1_error']:.1f}" for b in (16, 64, 256)
        )
        return f"{first}, {second} and {third} %"

    steps = count_steps(3, document["parameters"]["samples_per_epoch"], 256)
    text = text_in_one_line("docs/training.md")
    assert f"is ahead: {levels('ifa')} at batches 16, 64 and 256, where `cls` has {levels('cls')}" in text
    assert f"Batch 256 makes {steps} steps of that." in text
