"""Names of samples: odd ones are no damage, the last part of an extension decides, equal keys are two samples."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from dist_train.data.tarindex import read_index
from tests.data.damaged_sets import TOTAL, Epoch, assert_only_bad, run_epoch, write_named_set
from tests.harness import CLASSES, jpeg_bytes

NAMES = {
    "blanks": lambda n: f"my photo  {n} (copy)",
    "a line break": lambda n: f"line\nbreak\u2028{n}",
    "over 100 characters": lambda n: f"{'x' * 120}{n:03d}",
    "over 256 characters": lambda n: f"{'folder/' * 40}{'x' * 200}{n:03d}",
    "not ASCII": lambda n: f"ネコ/é{n}",
    "not UTF-8": lambda n: f"caf\udce9{n}",
    "folders with dots": lambda n: f"./v1.0/a.b/{n}",
}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("kind", NAMES)
def test_odd_names_are_no_damage(tmp_path: Path, sound: Epoch, kind: str, tar_format: int) -> None:
    files = [(NAMES[kind](n), {"jpg": jpeg_bytes(n), "cls": str(n % CLASSES).encode()}) for n in range(TOTAL)]
    root = write_named_set(tmp_path / "set", files, tar_format)
    assert_only_bad(run_epoch(root), set(), sound)
    places = [[(m.offset, m.size) for m in s.members.values()] for s in read_index(root / "train-000000.tar")]
    with tarfile.open(root / "train-000000.tar") as tar:
        expected = [(entry.offset_data, entry.size) for entry in tar]
    assert [place for sample in places for place in sample] == expected


def test_the_last_part_of_an_unknown_extension_decides_as_in_webdataset(tmp_path: Path, sound: Epoch) -> None:
    import webdataset

    files = [
        (f"{n:03d}", {"final version.v2.JPG": jpeg_bytes(n), "final version.cls": str(n % CLASSES).encode()})
        for n in range(TOTAL)
    ]
    root = write_named_set(tmp_path / "set", files)
    assert_only_bad(run_epoch(root), set(), sound)
    decoded = list(webdataset.WebDataset(str(root / "train-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert len(decoded) == TOTAL
    assert [sample["final version.cls"] for sample in decoded] == [n % CLASSES for n in range(TOTAL)]
    assert all(sample["final version.v2.jpg"].shape == (40, 48, 3) for sample in decoded)


def test_of_several_images_none_is_chosen_in_silence(tmp_path: Path) -> None:
    files = [(f"{n:03d}", {"jpg": jpeg_bytes(n), "cls": b"1"}) for n in range(TOTAL)]
    files[5][1].clear()
    files[5][1].update({"left.jpg": jpeg_bytes(1), "right.jpg": jpeg_bytes(2), "cls": b"1"})
    (record,) = run_epoch(write_named_set(tmp_path / "set", files)).records
    assert record["sample"] == 5 and "or several (members: left.jpg, right.jpg, cls)" in str(record["reason"])


def test_samples_of_the_same_key_are_samples_of_their_own(tmp_path: Path, sound: Epoch) -> None:
    keys = ["same"] * 10 + [f"{n % 13}" for n in range(10, TOTAL)]
    files = [(key, {"jpg": jpeg_bytes(n), "cls": str(n % CLASSES).encode()}) for n, key in enumerate(keys)]
    root = write_named_set(tmp_path / "set", files)
    assert_only_bad(run_epoch(root), set(), sound)
