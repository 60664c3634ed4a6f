"""Promises of shards.sources: which records a folder or a CSV file gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.errors import UseError
from shards.records import LeftOut, Record
from shards.sources import read_source
from tests.harness import touch


def records(found: list[Record | LeftOut]) -> list[Record]:
    return [item for item in found if isinstance(item, Record)]


def test_a_folder_gives_one_record_per_image_below_its_class(tmp_path: Path) -> None:
    touch(tmp_path, "cat/2.PNG", "cat/1.jpg", "cat/deep/er/3.webp", "dog/4.jpeg", "dog/5.tiff")
    touch(tmp_path, "cat/notes.txt", "cat/.hidden.jpg", "dog/.thumbs/6.jpg", ".git/7.jpg", "loose.jpg")
    found = records(read_source(tmp_path))
    assert [(record.name, record.class_name) for record in found] == [
        ("cat/1.jpg", "cat"),
        ("cat/2.PNG", "cat"),
        ("cat/deep/er/3.webp", "cat"),
        ("dog/4.jpeg", "dog"),
        ("dog/5.tiff", "dog"),
    ]
    assert {record.split for record in found} == {None} and {record.tags for record in found} == {None}
    assert found[2].read() == b"cat/deep/er/3.webp"


def test_folders_named_as_splits_give_the_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "valid/cat/2.jpg", "test/dog/3.jpg")
    assert {(r.name, r.class_name, r.split) for r in read_source(tmp_path)} == {
        ("train/cat/1.jpg", "cat", "train"),
        ("valid/cat/2.jpg", "cat", "val"),
        ("test/dog/3.jpg", "dog", "test"),
    }
    classes = records(read_source(tmp_path, split_folders=False))
    assert {r.class_name for r in classes} == {"train", "valid", "test"}


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.jpg", "data/cat/2.jpg")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data/cat")
    assert [record.name for record in read_source(tmp_path / "data")] == ["cat/2.jpg", "dog/1.jpg"]


def test_a_csv_gives_one_record_per_line_relative_to_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, "img/1.jpg", "img/2.jpg", "img/3.jpg")
    (tmp_path / "list.csv").write_text(
        'path,class,split,tags,mood\nimg/1.jpg,b,train,"red, blue",x\nimg/2.jpg,a,validation,,x\nimg/3.jpg,a,,one,x\n',
        encoding="utf-8-sig",
    )
    found = read_source(tmp_path / "list.csv")
    assert [(r.name, r.class_name, r.split, r.tags) for r in found] == [
        ("img/1.jpg", "b", "train", "red blue"),
        ("img/2.jpg", "a", "val", ""),
        ("img/3.jpg", "a", None, "one"),
    ]
    assert found[1].read() == b"img/2.jpg"
    by_mood = read_source(tmp_path / "list.csv", class_column="mood")
    assert {record.class_name for record in by_mood} == {"x"}


def test_csv_paths_start_from_the_root_that_is_given(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "lists/unrelated.jpg")
    (tmp_path / "lists/list.csv").write_text("class,path\nx,1.jpg\n")
    (record,) = read_source(tmp_path / "lists/list.csv", root=tmp_path / "a")
    assert record.read() == b"a/1.jpg" and record.tags is None
    with pytest.raises(UseError, match=r"none of its 1 images.*--root"):
        read_source(tmp_path / "lists/list.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column 'path'"),
        ("1.jpg,x\n", "path,class"),
        ("path,label\n1.jpg,x\n", "--class-column"),
        ("path,class\n", "lists no images"),
        ("path,class\n1.jpg,x\n,x\n", "line 3"),
        ("path,class\n1.jpg,x,more\n", "line 2"),
        ("path,class\n1.jpg,x\n\0\0\0,x\n", "line 3: .*zero bytes"),
        ("path,class,split\n1.jpg,x,holdout\n", "unknown split 'holdout'"),
        ('path,class\n"1.jpg,x\n', "cannot be read as a CSV"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused_with_the_place(tmp_path: Path, content: str, message: str) -> None:
    touch(tmp_path, "1.jpg")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UseError, match=message) as raised:
        read_source(tmp_path / "list.csv")
    assert "list.csv" in str(raised.value) and "\n" not in str(raised.value)


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "loose/readme.txt", "loose.jpg")
    with pytest.raises(UseError, match="no such folder"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(UseError, match=r"one folder per class"):
        read_source(tmp_path)
    with pytest.raises(UseError, match="--format"):
        read_source(tmp_path / "loose.jpg")
    with pytest.raises(UseError, match="--format csv needs a file"):
        read_source(tmp_path, "csv")
    with pytest.raises(UseError, match="belongs to sources of --format csv"):
        read_source(tmp_path, root=tmp_path)
