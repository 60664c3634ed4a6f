"""`python -m shards cache`: a set of a folder of images, built once and used again until the images change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.data.manifest import read_manifest
from shards.__main__ import main
from shards.cached import _key, cached_shard_set
from shards.plan import BuildOptions
from shards.sources import read_source
from tests.harness import environment, jpeg_bytes

SIZE = BuildOptions(size=24)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "my photos"
    for number in range(12):
        path = root / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(number))
        os.utime(path, ns=(10**18, 10**18))
    return root


def test_it_is_built_once_and_used_again(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_shard_set(photos, tmp_path / "cache", SIZE)
    said = capsys.readouterr().err
    assert f"{photos}: building a shard set of 12 images in 2 classes (resize 24x24) into {first} (once" in said
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert cached_shard_set(photos, tmp_path / "cache", SIZE) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == written
    assert capsys.readouterr().err.startswith(f"{photos}: unchanged since the shard set {first} was built of it (12 ")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cached_shard_set(photos, tmp_path / "cache", SIZE) == first
    assert capsys.readouterr().err == "", "one rank of a host says it for all"
    assert first.name.startswith("my_photos-") and read_manifest(first).transform == "resize 24x24"


def test_an_unfinished_one_is_completed(photos: Path, tmp_path: Path) -> None:
    first = cached_shard_set(photos, tmp_path / "cache", SIZE)
    digest = read_manifest(first).digest
    (first / "manifest.json").unlink()
    assert cached_shard_set(photos, tmp_path / "cache", SIZE) == first and read_manifest(first).digest == digest


def grown(photos: Path) -> None:
    (photos / "class 1" / "new.jpg").write_bytes(jpeg_bytes(77))


def shrunk(photos: Path) -> None:
    (photos / "class 1" / "3.jpg").unlink()


def moved(photos: Path) -> None:
    shutil.move(photos / "class 1" / "3.jpg", photos / "class 0" / "3.jpg")


def renamed(photos: Path) -> None:
    (photos / "class 1").rename(photos / "class b")


def touched(photos: Path) -> None:
    os.utime(photos / "class 1" / "3.jpg", ns=(10**18, 10**18 + 1))


def resized(photos: Path) -> None:
    path = photos / "class 1" / "3.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(10**18, 10**18))


def tagged(photos: Path) -> None:
    (photos / "class 1" / "3.txt").write_text("red hair, smile")


@pytest.mark.parametrize("change", [grown, shrunk, moved, renamed, touched, resized, tagged])
def test_what_changes_the_images_or_their_classes_makes_another_set(
    photos: Path, change: Callable[[Path], None]
) -> None:
    before = _key(read_source(photos), SIZE)
    assert _key(read_source(photos), SIZE) == before
    change(photos)
    assert _key(read_source(photos), SIZE) != before


def test_other_options_make_another_set_but_not_the_workers(photos: Path) -> None:
    found = read_source(photos)
    keys = [_key(found, BuildOptions(size=24, workers=workers)) for workers in (1, 2)]
    keys += [_key(found, options) for options in (BuildOptions(size=32), BuildOptions(max_side=24), BuildOptions())]
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_the_same_images_elsewhere_give_the_same_set_to_the_byte(photos: Path, tmp_path: Path) -> None:
    """As on two hosts, each with its own copy and its own times of change."""
    shutil.copytree(photos, tmp_path / "other" / photos.name, copy_function=shutil.copy)
    roots = (photos, tmp_path / "other" / photos.name)
    one, other = (cached_shard_set(root, root.parent / "cache", SIZE) for root in roots)
    assert one.name != other.name and read_manifest(one).digest == read_manifest(other).digest


def test_of_a_csv_file_each_line_counts(photos: Path) -> None:
    table = photos / "labels.csv"
    table.write_text("path,class,split\nclass 0/0.jpg,a,train\nclass 1/1.jpg,b,train\n")
    before = _key(read_source(table), SIZE)
    table.write_text("path,class,split\nclass 0/0.jpg,a,train\nclass 1/1.jpg,b,test\n")
    assert _key(read_source(table), SIZE) != before


def test_two_processes_at_once_build_one_set(photos: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "shards", "cache", str(photos), str(tmp_path / "cache"), "--size=24", "--workers=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    both = [subprocess.Popen(words, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (folder,) = {out.splitlines()[-1] for out, _ in said}
    assert sum("building a shard set" in error for _, error in said) == 1
    assert sum(split.samples for split in read_manifest(folder).splits.values()) == 12


def test_a_cache_that_cannot_be_is_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["cache", str(photos), str(tmp_path / "file" / "sets")]) == 2
    assert capsys.readouterr().err.endswith("set data.cache to a folder\n")
