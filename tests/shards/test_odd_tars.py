"""Tars that were renamed, joined, or hold more images than samples: all of them is read, or a line says what is not."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from dist_train.config import DataConfig
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import ClassInfo, Manifest, ShardInfo, SplitInfo, read_manifest, write_manifest
from dist_train.data.tarindex import index_tar, read_index, write_index
from dist_train.errors import WorkError
from dist_train.place import Place
from shards.__main__ import main
from shards.records import LeftOut, Record
from shards.sources import read_source
from shards.sources.tars import read_class_names
from tests.harness import jpeg_bytes, write_tar
from tests.shards.test_shard_adopt import plain_tar, png_bytes


def sample(key: str, number: int = 0, label: bytes = b"0") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", jpeg_bytes(number)), (f"{key}.cls", label)]


def test_a_tar_of_unknown_split_among_named_ones_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(("train-0", "val-0", "test-0", "extra-0", "train-and-test-0")):
        plain_tar(tmp_path / "tars" / f"{name}.tar", *sample("0", i))
    for command in (["build", str(tmp_path / "tars"), str(tmp_path / "set")], ["adopt", str(tmp_path / "tars")]):
        assert main([*command, "--workers", "1"]) == 2
        error = capsys.readouterr().err
        assert "(extra-0.tar, train-and-test-0.tar)" in error and error.count("\n") == 1
    for name in ("extra-0", "train-and-test-0"):
        (tmp_path / "tars" / f"{name}.tar").unlink()
    found = read_source(tmp_path / "tars")
    assert {item.name: item.split for item in found if isinstance(item, Record)} == {
        "train-0.tar:0": "train",
        "val-0.tar:0": "val",
        "test-0.tar:0": "test",
    }


@pytest.fixture(params=["two", "three, one of them empty", "one zero block between"])
def joined(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a tar of 3 and 4 samples, joined as by `cat`; the last key of one is the first of the other."""
    for name, count, first in (("a", 3, 0), ("b", 4, 2)):
        samples = [{"jpg": jpeg_bytes(10 * count + i), "cls": str(i % 3).encode()} for i in range(count)]
        write_tar(tmp_path / name, samples, first + (100 if name == "b" else 0))
    write_tar(tmp_path / "empty", [])
    a, b, empty = ((tmp_path / name).read_bytes() for name in ("a", "b", "empty"))
    end = index_tar(tmp_path / "a")[-1].members["cls"].offset + 512
    content = {"two": a + b, "three, one of them empty": a + empty + b}.get(request.param, a[:end] + bytes(512) + b)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/train-0.tar").write_bytes(content)
    return tmp_path / "tars"


def test_tars_joined_by_cat_are_read_to_the_end_by_all(
    joined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = joined / "train-0.tar"
    keys = [f"{i:06d}" for i in (0, 1, 2, 102, 103, 104, 105)]
    assert [found.key for found in index_tar(tar)] == keys
    images = [jpeg_bytes(n) for n in (30, 31, 32, 40, 41, 42, 43)]
    content = tar.read_bytes()
    for found, image in zip(index_tar(tar), images, strict=True):
        place = found.members["jpg"]
        assert content[place.offset : place.offset + place.size] == image

    assert main(["build", str(joined), str(tmp_path / "set"), "--workers", "1"]) == 0
    assert read_manifest(tmp_path / "set").split("train").samples == 7
    assert main(["adopt", str(joined), "--workers", "1"]) == 0
    assert "tars joined into one (train-0.tar)" in capsys.readouterr().err
    manifest = read_manifest(joined)
    assert manifest.split("train").samples == 7 and [found.key for found in read_index(tar)] == keys
    assert main(["verify", str(joined), "--workers", "1"]) == 0
    config = DataConfig(shards=str(joined), image_size=32, device="cpu", threads=1)
    (batch,) = EvalLoader(config, manifest, "train", Place(), batch_size=7)
    assert batch.weights.tolist() == [1] * 7 and batch.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_set_of_a_joined_tar_whose_second_half_was_lost_is_found_by_verify(
    joined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As sets were adopted before: index and manifest know the first archive alone."""
    tar = joined / "train-0.tar"
    write_index(tar, index_tar(tar)[:3])
    shard = ShardInfo(tar.name, 3, tar.stat().st_size, hashlib.sha256(tar.read_bytes()).hexdigest())
    classes = tuple(ClassInfo(str(i), 1) for i in range(3))
    write_manifest(joined, Manifest(classes, {"train": SplitInfo(3, (shard,))}))
    assert main(["verify", str(joined), "--workers", "1"]) == 1
    assert "has 7 samples, 3 by the manifest" in capsys.readouterr().out
    config = DataConfig(shards=str(joined), image_size=32, device="cpu", threads=1)
    (batch,) = EvalLoader(config, read_manifest(joined), "train", Place(), batch_size=3)
    assert batch.weights.tolist() == [1] * 3  # it is readable as before


def test_what_follows_a_tar_and_is_none_is_named(tmp_path: Path) -> None:
    plain_tar(tmp_path / "0.tar", *sample("0"))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole + bytes(3 * 512) + b"junk" * 300)
    with pytest.raises(
        WorkError, match=rf"0.tar: after its end, at offset {len(whole) + 3 * 512}, lies something that is no tar"
    ):
        index_tar(tmp_path / "0.tar")
    (tmp_path / "0.tar").write_bytes(whole + whole[:700])
    with pytest.raises(WorkError, match=r"cut short inside 0\.jpg"):
        index_tar(tmp_path / "0.tar")


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_a_header_that_announces_more_than_any_file_holds_is_a_damaged_tar(tmp_path: Path, kind: bytes) -> None:
    header = bytearray(tarfile.TarInfo("long").tobuf())
    header[124:136], header[156:157] = b"\x80" + b"\x7f" * 11, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(header + bytes(1024))
    with pytest.raises(WorkError, match=r"0\.tar: not a readable tar"):
        index_tar(tmp_path / "0.tar")
    assert index_tar(tmp_path / "0.tar", damaged=True) == []


@pytest.mark.parametrize(
    ("second", "ending"),
    [("png", "jpg"), ("mask.png", "jpg"), ("gif", "jpg"), ("png", "png"), ("mask.png", "mask.png")],
)
def test_image_and_mask_under_one_key_are_refused_until_one_is_named(
    tmp_path: Path, second: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = png_bytes(9)
    for first in (True, False):  # whichever comes first
        members = [("7.jpg", jpeg_bytes(7)), (f"7.{second}", mask)]
        plain_tar(tmp_path / "tars/train-0.tar", *sample("6", 6), *members[:: 1 if first else -1], ("7.cls", b"1"))
        for command in (["build", str(tmp_path / "tars"), str(tmp_path / "x")], ["adopt", str(tmp_path / "tars")]):
            assert main([*command, "--workers", "1"]) == (2 if command[0] == "build" else 1)
            error = capsys.readouterr().err
            assert "sample 7" in error and "7.jpg" in error and f"7.{second}" in error and "--image-ending" in error
    found = read_source(tmp_path / "tars", image_ending=ending)
    taken = {item.name: item.read() for item in found if isinstance(item, Record)}
    assert taken["train-0.tar:7"] == (jpeg_bytes(7) if ending == "jpg" else mask)
    assert len(taken) == (2 if ending == "jpg" else 1)
    assert [(item.name, item.reason) for item in found if isinstance(item, LeftOut)] == (
        [] if ending == "jpg" else [("train-0.tar:6", "no image")]
    )


def test_dotted_keys_are_the_samples_they_were_meant_as_or_each_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = tmp_path / "tars"
    members = [pair for i in range(4) for pair in sample(f"scan.{i}", i, b"%d" % (i % 2))]
    plain_tar(tars / "train-0.tar", *sample("plain", 8), *members, *sample("one.more", 9))
    assert main(["adopt", str(tars), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert (
        "sample scan: has 4 images (scan.0.jpg, scan.1.jpg, scan.2.jpg, scan.3.jpg), as a key ends at the first dot"
        in error
    )
    assert "build --format webdataset" in error
    # What adopt advises does it.
    assert main(["build", str(tars), str(tmp_path / "set"), "--format", "webdataset", "--workers", "1"]) == 0
    assert [(info.name, info.count) for info in read_manifest(tmp_path / "set").classes] == [("0", 4), ("1", 2)]

    members = [member for i in range(4) for member in sample(f"scan.{i}", i)[:1]]
    plain_tar(tars / "train-0.tar", *sample("plain", 8), *members)
    found = read_source(tars)
    left_out = Counter(item.reason for item in found if isinstance(item, LeftOut))
    assert left_out == {"no class": 4} and sum(isinstance(item, Record) for item in found) == 1


def test_a_sample_whose_text_is_not_utf_8_is_left_out_alone(tmp_path: Path) -> None:
    latin = ("1.txt", "café".encode("latin-1"))
    plain_tar(tmp_path / "0.tar", *sample("0", 0), *sample("1", 1), latin, *sample("2", 2), ("2.txt", "café".encode()))
    found = read_source(tmp_path)
    assert [(item.name, item.reason, item.detail) for item in found if isinstance(item, LeftOut)] == [
        ("0.tar:1", "text is not UTF-8", "1.txt")
    ]
    assert [(item.name, item.tags) for item in found if isinstance(item, Record)] == [
        ("0.tar:0", None),
        ("0.tar:2", "café"),
    ]


def test_members_without_an_images_ending_are_images_by_their_content(tmp_path: Path) -> None:
    plain_tar(
        tmp_path / "0.tar", ("0.jpg_large", jpeg_bytes(0)), ("0.cls", b"3"), ("1.image", png_bytes(1)), ("1.cls", b"3")
    )
    found = read_source(tmp_path)
    assert [item.read() for item in found if isinstance(item, Record)] == [jpeg_bytes(0), png_bytes(1)]


def test_tars_with_their_ending_in_capitals_are_tars(tmp_path: Path) -> None:
    plain_tar(tmp_path / "train-0.TAR", *sample("0"))
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 0
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0


@pytest.mark.parametrize("undecodable", [False, True])
def test_adopting_tars_sorted_by_class_names_the_classes_without_training_images(
    tmp_path: Path, undecodable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(10):
        data = b"<html>" if undecodable and i != 3 else jpeg_bytes(i)
        plain_tar(tmp_path / f"{i:05d}.tar", ("0.jpg", data), ("0.cls", b"%d" % i))
    ratios = "1,0,0" if undecodable else "0.5,0,0.5"
    assert main(["adopt", str(tmp_path), "--ratios", ratios, "--workers", "1"]) == 0
    error = capsys.readouterr().err
    assert re.search(rf"{9 if undecodable else 5} of 10 classes have no training image and cannot be learnt: ", error)
    assert len(read_manifest(tmp_path).untrained) == (9 if undecodable else 5)
    assert main(["verify", str(tmp_path), "--workers", "1"]) == (1 if undecodable else 0)


def test_one_tar_under_two_names_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain_tar(tmp_path / "tars/train-0.tar", *sample("0"))
    (tmp_path / "tars/val-0.tar").symlink_to("train-0.tar")
    for command in (["build", str(tmp_path / "tars"), str(tmp_path / "set")], ["adopt", str(tmp_path / "tars")]):
        assert main([*command, "--workers", "1"]) == 2
        assert "val-0.tar: the same file as train-0.tar" in capsys.readouterr().err


def test_a_tar_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unreadable = "/proc/self/mem"  # by anyone at its start; permissions would not stop root
    assert main(["build", unreadable, str(tmp_path / "set"), "--format", "webdataset", "--workers", "1"]) == 2
    assert capsys.readouterr().err == f"error: {unreadable}: cannot be read (Input/output error)\n"


def test_many_class_names_are_read_in_one_pass(tmp_path: Path) -> None:
    """Where each name is looked up in the list of all, 60,000 names are nearly 2 billion comparisons."""
    file = tmp_path / "names"
    file.write_text("".join(f"class {i}\n" for i in range(60_000)))
    assert len(read_class_names(file)) == 60_000
