"""Damage to shards and indexes, injected byte by byte: what is damaged is left out, the rest comes once per epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.config import DataConfig
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.quarantine import Quarantine
from dist_train.data.tarindex import index_path, index_tar, read_index
from dist_train.errors import WorkError
from dist_train.place import Place
from dist_train.train.evaluate import evaluate
from tests.data.damaged_sets import COUNTS, TOTAL, Epoch, assert_only_bad, run_epoch, write_named_set
from tests.harness import CLASSES, edit, flip, jpeg_bytes, write_shard_set

DAMAGED = "train-000001"  # holds samples 12 to 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shard_set(tmp_path / "set", {"train": COUNTS})


# ---------------------------------------------------------------------- damaged tars


@pytest.mark.parametrize("with_index", [True, False])
def test_a_tar_cut_short_gives_its_samples_up_to_the_cut(root: Path, sound: Epoch, with_index: bool) -> None:
    tar = root / f"{DAMAGED}.tar"
    image = index_tar(tar)[6].members["jpg"]
    edit(tar, lambda content: content[: image.offset + image.size // 2])
    if not with_index:
        index_path(tar).unlink()
    epoch = run_epoch(root)
    assert_only_bad(epoch, {18, 19, 20}, sound)
    assert all(str(record["name"]).startswith(f"{DAMAGED}.tar:") for record in epoch.records)


def test_an_image_cut_short_by_the_end_of_its_tar_is_no_image(tmp_path: Path, sound: Epoch) -> None:
    files = [(f"{n:06d}", {"cls": str(n % CLASSES).encode(), "jpg": jpeg_bytes(n)}) for n in range(TOTAL)]
    root = write_named_set(tmp_path / "set", files)
    tar = root / "train-000000.tar"
    image = index_tar(tar)[-3].members["jpg"]
    edit(tar, lambda content: content[: image.offset + image.size - 2])
    assert_only_bad(run_epoch(root), {TOTAL - 3, TOTAL - 2, TOTAL - 1}, sound)


def test_a_sample_whose_headers_are_all_damaged_leaves_the_others_in_their_places(root: Path, sound: Epoch) -> None:
    tar = root / f"{DAMAGED}.tar"
    for member in index_tar(tar)[3].members.values():
        flip(tar, member.offset - 512 + 130)
    assert_only_bad(run_epoch(root), {15}, sound)


def test_bit_flips_in_image_header_image_and_class_lose_those_samples_alone(root: Path, sound: Epoch) -> None:
    tar = root / f"{DAMAGED}.tar"
    samples = index_tar(tar)
    flip(tar, samples[1].members["jpg"].offset)  # the magic number of a JPEG
    flip(tar, samples[2].members["jpg"].offset - 512 + 130)  # the size in a tar header
    flip(tar, samples[4].members["cls"].offset - 512)  # the name in a tar header
    flip(tar, samples[6].members["cls"].offset, bit=6)  # a digit becomes a letter
    flip(tar, samples[7].members["jpg"].offset + samples[7].members["jpg"].size // 2)  # decodes to other pixels at most
    epoch = run_epoch(root)
    assert {13, 14, 16, 18} <= {record["sample"] for record in epoch.records} <= {13, 14, 16, 18, 19}
    epoch.good.pop(19, None)
    assert_only_bad(epoch, {record["sample"] for record in epoch.records}, sound)  # type: ignore[arg-type]
    reasons = {record["sample"]: record["reason"] for record in epoch.records}
    assert "not an image" in reasons[13] and "its class is" in reasons[18]
    assert "no image" in reasons[14] and "no .cls" in reasons[16]


def test_missing_members_lose_those_samples_alone(tmp_path: Path, sound: Epoch) -> None:
    files = [(f"{n:06d}", {"jpg": jpeg_bytes(n), "cls": str(n % CLASSES).encode()}) for n in range(TOTAL)]
    del files[3][1]["cls"], files[20][1]["jpg"]
    files[30][1]["cls"] = b"4"  # the classes are 0 to 3
    files[31][1]["cls"] = b"9" * 5000
    files[32][1]["cls"] = "²".encode()
    assert_only_bad(run_epoch(write_named_set(tmp_path / "set", files)), {3, 20, 30, 31, 32}, sound)


def test_too_much_damage_ends_the_run_with_one_line_that_names_key_and_sample(root: Path) -> None:
    edit(root / f"{DAMAGED}.tar", lambda content: content[:2048])
    with pytest.raises(WorkError, match=r"more than data\.max_bad_samples \(4\) .*train-000001\.tar:.*verify") as error:
        run_epoch(root, max_bad_samples=4)
    assert "\n" not in str(error.value)


def test_an_index_of_a_damaged_tar_is_not_made_in_silence(root: Path) -> None:
    tar = root / f"{DAMAGED}.tar"
    flip(tar, index_tar(tar)[4].members["cls"].offset - 512)
    with pytest.raises(WorkError, match=r"train-000001\.tar: damaged after 5 samples"):
        index_tar(tar)


# ---------------------------------------------------------------------- wrong indexes


def of_another_tar(index: Path) -> None:
    other = index.with_name("train-000000.idx").read_text().splitlines()
    index.write_text("\n".join(["v1.2 9", *other[1:10]]) + "\n")


def without_names_and_one_off(index: Path) -> None:
    samples = read_index(index.with_suffix(".tar"))
    lines = [" ".join(f"{e} {m.offset + 512} {m.size}" for e, m in s.members.items()) for s in samples]
    index.write_text("\n".join(["v1.1 9", *lines]) + "\n")


def classes_one_sample_late(index: Path) -> None:
    """Every entry points to a real file of that size, but the classes are those of the next sample."""
    lines = index.read_text().splitlines()
    fields = [line.split() for line in lines[1:]]
    classes = [line[5] for line in fields]
    for line, offset in zip(fields, classes[1:] + classes[:1], strict=True):
        line[5] = offset
    index.write_text("\n".join([lines[0], *map(" ".join, fields)]) + "\n")


def without_one_class(index: Path) -> None:
    lines = index.read_text().splitlines()
    lines[3] = " ".join(lines[3].split()[:4])
    index.write_text("\n".join(lines) + "\n")


def beyond_all_numbers(index: Path) -> None:
    lines = index.read_text().splitlines()
    lines[1] = " ".join(["jpg", "9" * 5000, *lines[1].split()[2:]])  # more digits than Python makes a number of
    index.write_text("\n".join(lines) + "\n")


def far_outside(index: Path) -> None:
    lines = index.read_text().splitlines()
    for i, offset in ((1, "-5"), (2, "99999999999999999999"), (3, "0")):
        fields = lines[i].split()
        lines[i] = " ".join([fields[0], offset, *fields[2:]])
    index.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "damage",
    [
        of_another_tar,
        without_names_and_one_off,
        classes_one_sample_late,
        without_one_class,
        far_outside,
        beyond_all_numbers,
        lambda index: index.unlink(),
        lambda index: index.write_bytes(b""),
        lambda index: index.write_bytes(b"\x00\xff garbage\n"),
        lambda index: index.write_text("".join(index.read_text().splitlines(keepends=True)[:4])),
    ],
    ids=[
        "of another tar",
        "no names, one off",
        "other classes",
        "no class",
        "far outside",
        "beyond all numbers",
        "missing",
        "empty",
        "garbage",
        "cut short",
    ],
)
def test_a_useless_index_is_named_once_and_the_tar_itself_used(
    root: Path, sound: Epoch, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    damage(root / f"{DAMAGED}.idx")
    with caplog.at_level(logging.WARNING):
        assert_only_bad(run_epoch(root, epochs=2), set(), sound)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(str(root / f"{DAMAGED}.idx")) and "verify --fix-index" in message


# ---------------------------------------------------------------------- images of another size than the manifest says


def test_an_image_of_another_size_than_the_baked_one_is_left_out(tmp_path: Path) -> None:
    wrong = {4: jpeg_bytes(4, 18, 18), 7: jpeg_bytes(7, 30, 12)}
    root = write_shard_set(tmp_path / "set", {"train": [12], "val": [9]}, baked=20, replace=wrong | {15: jpeg_bytes(1)})
    assert {record["sample"] for record in run_epoch(root).records} == {4, 7}
    config = DataConfig(shards=str(root), image_size=20, crop_margin=0, threads=1)
    batches = list(EvalLoader(config, read_manifest(root), "val", Place(), batch_size=4))
    weights = {int(n): float(w) for batch in batches for n, w in zip(batch.samples, batch.weights, strict=True)}
    assert weights == {n: float(n != 3) for n in range(9)}


# ---------------------------------------------------------------------- the record


def damage_three(root: Path) -> set[int]:
    tar = root / f"{DAMAGED}.tar"
    samples = index_tar(tar)
    for i in (1, 4):
        flip(tar, samples[i].members["cls"].offset, bit=6)
    image = samples[7].members["jpg"]
    edit(
        tar,
        lambda content: content.__setitem__(
            slice(image.offset + 200, image.offset + image.size), b"\xff" * (image.size - 200)
        ),
    )
    return {13, 16, 19}


def test_ranks_and_epochs_record_a_bad_sample_once_and_name_all_there_is_to_know(root: Path, sound: Epoch) -> None:
    bad = damage_three(root)
    epoch = run_epoch(root, world_size=2, epochs=3)
    assert_only_bad(epoch, bad, sound)
    for record in epoch.records:
        assert set(record) == {"split", "sample", "name", "epoch", "rank", "reason"}
        assert record["split"] == "train" and record["name"] == f"{DAMAGED}.tar:{record['sample']:06d}"
        assert record["rank"] in (0, 1) and record["epoch"] in (0, 1, 2)


def test_a_resumed_run_begins_with_what_the_record_says(
    root: Path, sound: Epoch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = damage_three(root)
    run_epoch(root)
    caplog.clear()
    again = run_epoch(root)  # the same record; it asserts that no line was added
    assert_only_bad(again, bad, sound)
    assert not [record for record in caplog.records if "left out" in record.getMessage()]


def test_the_limit_counts_what_all_ranks_recorded(root: Path) -> None:
    damage_three(root)
    assert len(run_epoch(root, world_size=2, max_bad_samples=3).records) == 3
    (root.parent / "set.quarantine.jsonl").unlink()
    with pytest.raises(WorkError, match=r"more than data\.max_bad_samples \(2\)"):
        run_epoch(root, world_size=2, max_bad_samples=2)


def test_a_run_that_met_too_many_does_not_go_on_when_it_is_resumed(root: Path) -> None:
    damage_three(root)
    for _ in range(2):
        with pytest.raises(WorkError, match=r"more .*data\.max_bad_samples \(2\)"):
            run_epoch(root, max_bad_samples=2)
    assert len(run_epoch(root, max_bad_samples=3).records) == 3


def test_a_record_follows_a_line_that_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"split": "tr')
    Quarantine(file, "train", limit=5, rank=0).add(7, "train-000000.tar:000007", 0, "damaged")
    assert 7 in Quarantine(file, "train", limit=5, rank=0)


def test_evaluation_says_what_it_counted_and_what_it_left_out(tmp_path: Path) -> None:
    root = write_shard_set(tmp_path / "set", {"val": [10]}, replace={4: b"x"})
    tar = root / "val-000000.tar"
    flip(tar, index_tar(tar)[6].members["cls"].offset, bit=6)
    config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=1)
    loader = EvalLoader(config, read_manifest(root), "val", Place(), batch_size=4)
    always_0 = torch.tensor([9.0, 0.0, 0.0, 0.0])
    result = evaluate(lambda batch: always_0.expand(len(batch.labels), -1), loader, 10)
    assert (result.samples, result.bad_samples) == (8, 2)
    assert result.seen.tolist() == [2, 3, 1, 2]  # classes n mod 4 of 0 to 9, without 4 and 6
    assert result.top1 == 2 / 8
    expected = torch.nn.functional.cross_entropy(always_0.expand(8, -1), torch.tensor([0, 1, 2, 3, 1, 3, 0, 1]))
    assert result.loss == pytest.approx(float(expected))
