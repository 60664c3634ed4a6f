"""Promises of shards.splits and shards.plan: how classes are numbered, splits drawn and shards cut."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.errors import UseError
from shards.plan import BuildOptions, Plan, make_plan
from shards.records import Record
from shards.splits import SPLITS, draw_splits, split_counts

RATIOS = st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100)).filter(any)


def records(sizes: dict[str, int], **fields: object) -> list[Record]:
    return [Record(f"{name}/{i:05d}.jpg", bytes, name, **fields) for name, n in sizes.items() for i in range(n)]


def splits_of(plan: Plan) -> dict[str, str]:
    return {record.name: shard.split for shard in plan.shards for record, _ in shard.samples}


@given(st.integers(0, 3000), RATIOS)
def test_every_class_keeps_the_ratios_within_one_sample(samples: int, weights: tuple[int, int, int]) -> None:
    ratios = tuple(weight / sum(weights) for weight in weights)
    counts = split_counts(samples, ratios)
    assert sum(counts) == samples
    for count, ratio in zip(counts, ratios, strict=True):
        assert abs(count - samples * ratio) < 1 + 1e-9
        assert count >= 0 and not (ratio == 0 and count)


@given(st.integers(1, 50), RATIOS.filter(lambda weights: weights[0] > 0))
def test_every_class_has_a_training_sample(samples: int, weights: tuple[int, int, int]) -> None:
    assert split_counts(samples, tuple(weight / sum(weights) for weight in weights))[0] >= 1


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers(0, 2**40), st.integers(0, 2**63 - 1))
def test_a_draw_has_the_counts_and_repeats(samples: int, seed: int, class_key: int) -> None:
    drawn = draw_splits(samples, (0.7, 0.1, 0.2), seed, class_key)
    assert drawn == draw_splits(samples, (0.7, 0.1, 0.2), seed, class_key)
    assert tuple(drawn.count(split) for split in SPLITS) == split_counts(samples, (0.7, 0.1, 0.2))


def test_a_long_tailed_set_is_split_70_10_20_overall_and_in_every_class() -> None:
    sizes = {f"character {i}": round(20 * 1.03**i) for i in range(150)}
    plan = make_plan(records(sizes), BuildOptions())
    total, by_class = Counter(), Counter()
    for name, split in splits_of(plan).items():
        total[split] += 1
        by_class[name.split("/")[0], split] += 1
    images = sum(sizes.values())
    for split, ratio in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert abs(total[split] / images - ratio) < 0.002
        for name, size in sizes.items():
            assert abs(by_class[name, split] - ratio * size) < 1


def test_the_plan_does_not_depend_on_the_order_of_the_records() -> None:
    ordered = records({"a": 40, "b": 25, "c": 3})
    shuffled = random.Random(1).sample(ordered, len(ordered))
    assert make_plan(ordered, BuildOptions()) == make_plan(shuffled, BuildOptions())
    assert make_plan(ordered, BuildOptions()).fingerprint() == make_plan(shuffled, BuildOptions()).fingerprint()


def test_another_seed_draws_other_splits_and_another_order() -> None:
    first, second = (make_plan(records({"a": 200}), BuildOptions(seed=seed)) for seed in (0, 1))
    assert splits_of(first) != splits_of(second)
    assert first.fingerprint() != second.fingerprint()


def test_a_class_more_does_not_change_how_the_others_are_split() -> None:
    few = splits_of(make_plan(records({"b": 50, "c": 50}), BuildOptions()))
    more = splits_of(make_plan(records({"a": 50, "b": 50, "c": 50}), BuildOptions()))
    assert few.items() <= more.items()


def test_splits_that_the_source_gives_are_kept() -> None:
    plan = make_plan(records({"a": 7}, split="test") + records({"b": 10}), BuildOptions())
    splits = splits_of(plan)
    assert all(split == "test" for name, split in splits.items() if name.startswith("a/"))
    assert {split for name, split in splits.items() if name.startswith("b/")} == {"train", "val", "test"}


def test_every_record_is_in_exactly_one_place_and_classes_are_mixed() -> None:
    plan = make_plan(records({"a": 300, "b": 300}), BuildOptions(shard_mb=2))
    names = [record.name for shard in plan.shards for record, _ in shard.samples]
    assert len(names) == len(set(names)) == 600
    train = [class_id for shard in plan.shards if shard.split == "train" for _, class_id in shard.samples]
    changes = sum(left != right for left, right in pairwise(train))
    assert changes > len(train) / 3  # half of them in a fair shuffle, one if sorted
    assert [shard.name for shard in plan.shards][:2] == ["train-000000", "train-000001"]


def test_class_ids_follow_whole_numbers_numerically_and_other_names_by_code_point() -> None:
    assert make_plan(records({"10": 1, "9": 1, "100": 1}), BuildOptions()).class_names == ("9", "10", "100")
    assert make_plan(records({"b10": 1, "b9": 1, "Ä": 1}), BuildOptions()).class_names == ("b10", "b9", "Ä")


def test_rare_classes_are_left_out_and_counted() -> None:
    plan = make_plan(records({"many": 20, "few": 19}), BuildOptions(min_per_class=20))
    assert plan.class_names == ("many",)
    assert len(plan.left_out) == 19
    assert {entry.reason for entry in plan.left_out} == {"class has fewer than 20 images"}
    with pytest.raises(UseError, match="no class has 21 images"):
        make_plan(records({"many": 20, "few": 19}), BuildOptions(min_per_class=21))


@pytest.mark.parametrize(
    "values",
    [
        {"size": 0},
        {"size": 64, "max_side": 64},
        {"min_per_class": 0},
        {"shard_mb": 0.0},
        {"shard_mb": float("nan")},
        {"ratios": (0.7, 0.1, 0.1)},
        {"ratios": (1.2, -0.1, -0.1)},
        {"seed": -1},
        {"quality": 101},
        {"workers": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UseError, match="--"):
        BuildOptions(**values)


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "latin-1 \udce9"])
def test_class_names_that_no_manifest_can_hold_are_refused(name: str) -> None:
    with pytest.raises(UseError, match="class name"):
        make_plan([Record("x.jpg", bytes, name)], BuildOptions())
