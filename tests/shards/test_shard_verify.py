"""Promises of shards.verify: each kind of damage is found and named."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.data.checksums import write_checksums
from dist_train.data.manifest import read_manifest
from dist_train.data.tarindex import index_tar
from shards.__main__ import main
from shards.build import build_shard_set
from shards.plan import BuildOptions
from shards.sources import read_source

OPTIONS = BuildOptions(size=32, shard_mb=0.05)


@pytest.fixture(scope="module")
def sound(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set in which all is as it should be."""
    out = tmp_path_factory.mktemp("sets") / "sound"
    build_shard_set(read_source(photos), out, OPTIONS)
    return out


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def patch(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def flip_a_byte_of_padding(root: Path) -> None:
    patch(root / "train-000001.tar", (root / "train-000001.tar").stat().st_size - 1, b"\x01")


def damage_an_image(root: Path) -> None:
    place = index_tar(root / "train-000001.tar")[2].members["jpg"].offset
    patch(root / "train-000001.tar", place, b"\x00\x00")


def relabel_a_sample(root: Path) -> None:
    place = index_tar(root / "train-000001.tar")[2].members["cls"].offset
    patch(root / "train-000001.tar", place, b"7")


def exchange_a_label(root: Path) -> None:
    place = index_tar(root / "train-000001.tar")[2].members["cls"].offset
    with open(root / "train-000001.tar", "rb") as file:
        file.seek(place)
        old = file.read(1)
    patch(root / "train-000001.tar", place, b"0" if old != b"0" else b"1")


def cut_the_end(root: Path) -> None:
    path = root / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-5000])


def remove_the_shard(root: Path) -> None:
    (root / "train-000001.tar").unlink()


def remove_the_index(root: Path) -> None:
    (root / "train-000001.idx").unlink()


def exchange_the_index(root: Path) -> None:
    shutil.copy(root / "train-000000.idx", root / "train-000001.idx")


def garble_the_index(root: Path) -> None:
    (root / "train-000001.idx").write_text("v1.2 1\njpg ten 20 a.jpg\n")


def drop_a_member(root: Path) -> None:
    path = root / "train-000001.tar"
    with tarfile.open(path) as tar:
        kept = [(entry, tar.extractfile(entry).read()) for entry in tar][1:]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, content in kept:
            tar.addfile(entry, io.BytesIO(content))


def spoil_the_manifest(root: Path) -> None:
    path = root / "manifest.json"
    path.write_text(path.read_text().replace('"count": 12', '"count": 13'))


def add_a_tar(root: Path) -> None:
    shutil.copy(root / "train-000001.tar", root / "train-000099.tar")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_a_byte_of_padding, "train-000001.tar: its SHA-256"),
        (damage_an_image, "train-000001.tar: sample train-000001-000002: its image does not decode"),
        (relabel_a_sample, "train-000001.tar: sample train-000001-000002: class b'7' is not between 0 and 3"),
        (exchange_a_label, "by the manifest"),
        (cut_the_end, "train-000001.tar: cut short"),
        (remove_the_shard, "train-000001.tar: missing"),
        (remove_the_index, "train-000001.idx: missing"),
        (exchange_the_index, "train-000001.idx: does not match its tar"),
        (garble_the_index, "train-000001.idx: not an index"),
        (drop_a_member, "train-000001.tar: sample train-000001-000000: has 0 images"),
        (add_a_tar, "train-000099.tar: not in the manifest"),
    ],
)
def test_damage_is_found_and_named(
    copy: Path, damage: Callable[[Path], None], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert main(["verify", str(copy), "--workers", "1"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert any(expected in line for line in printed), printed
    assert all(line.startswith(str(copy)) for line in printed)


def test_a_sound_set_passes_with_its_totals(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sound), "--workers", "2"]) == 0
    assert "66 samples, 4 classes" in capsys.readouterr().out


def test_indexes_are_written_again_from_the_tars(sound: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_the_index(copy)
    (copy / "val-000000.idx").write_text("v1.2 0\n")
    assert main(["verify", str(copy), "--fix-index", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("written again") == 2
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in sound.iterdir()}


def test_wrong_checksums_of_a_sound_tar_are_one_line_and_written_again(
    sound: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = copy / "train-000001.tar"
    write_checksums(tar, [0] * len(index_tar(tar)))
    assert main(["verify", str(copy), "--workers", "1"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{tar.with_suffix('.crc')}: damaged, or of another tar; write it again with --fix-index"
    assert main(["verify", str(copy), "--fix-index", "--workers", "1"]) == 0
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in sound.iterdir()}


def test_a_damaged_tar_keeps_no_other_index_from_being_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_the_end(copy)
    (copy / "train-000002.idx").unlink()
    assert main(["verify", str(copy), "--fix-index", "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"{copy}/train-000002.idx: written again" in printed and "train-000001.tar: cut short" in printed


@pytest.mark.parametrize("damage", [flip_a_byte_of_padding, remove_the_shard, spoil_the_manifest])
def test_the_cure_that_is_named_makes_a_damaged_set_whole(
    photos: Path, sound: Path, copy: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert main(["verify", str(copy), "--workers", "1"]) == 1
    said = "".join(capsys.readouterr())
    assert re.search(r"manifest's|missing|digest", said) and re.search("delete (it|manifest.json) and build", said)
    (copy / "manifest.json").unlink()
    build_shard_set(read_source(photos), copy, OPTIONS)
    assert read_manifest(copy) == read_manifest(sound)
    assert main(["verify", str(copy), "--workers", "1"]) == 0
