"""No file of a source moves, vanishes or doubles unsaid: split folders, files not taken, CSV files, classes."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError
from shards.__main__ import main
from shards.records import LeftOut, Record
from shards.sources import read_source
from tests.harness import jpeg_bytes, touch, write_tar


def rows(found: list[Record | LeftOut]) -> list[tuple[str, str, str | None]]:
    return [(item.name, item.class_name, item.split) for item in found if isinstance(item, Record)]


def reasons(found: list[Record | LeftOut]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for item in found:
        if isinstance(item, LeftOut):
            counts[item.reason] += item.count
    return dict(counts)


# ---- split folders ---------------------------------------------------------------------------------------------------

SPLITS = ("train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg")
THEIR_ROWS = {
    ("train/cat/1.jpg", "cat", "train"),
    ("train/dog/2.jpg", "dog", "train"),
    ("test/cat/3.jpg", "cat", "test"),
}


@pytest.mark.parametrize(
    ("beside", "counted"),
    [
        (("__MACOSX/train/cat/1.jpg",), {"in a folder named __macosx": 1}),
        (("annotations/1.xml", "Annotations/masks/1.png"), {"in a folder named annotations": 2}),
        ((".git/1.jpg", ".DS_Store"), {"in a hidden folder": 1, "hidden file": 1}),
        (("docs/readme.md",), {"no known image format (.md)": 1}),
        (("old_set/build.json", "old_set/train-000000.tar"), {"in a shard set": 2}),
        (("labels.csv", "README"), {"no known image format (.csv)": 1, "no known image format (no ending)": 1}),
        (
            ("cover.jpg", "train/loose.jpg", "train/loose.txt"),
            {"image outside of the class folders": 2, "text of an image that is left out": 1},
        ),
    ],
)
def test_what_lies_beside_split_folders_leaves_them_splits_and_is_counted(
    tmp_path: Path, beside: tuple[str, ...], counted: dict[str, int]
) -> None:
    touch(tmp_path, *SPLITS, *beside)
    found = read_source(tmp_path)
    assert set(rows(found)) == THEIR_ROWS and reasons(found) == counted


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "eval"),
        ("training_set", "valid", "test_set"),
        ("seg_train", "seg_dev", "seg_test"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_splits_are_known_by_the_usual_names(tmp_path: Path, train: str, val: str, test: str) -> None:
    touch(tmp_path, f"{train}/cat/1.jpg", f"{val}/cat/2.jpg", f"{test}/cat/3.jpg")
    assert [split for *_, split in sorted(rows(read_source(tmp_path)))] == [
        dict(zip((train, val, test), ("train", "val", "test"), strict=True))[name]
        for name in sorted((train, val, test))
    ]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ((*SPLITS, "holdout/cat/4.jpg"), ("train", "test", "holdout")),
        ((*SPLITS, "cat/4.jpg", "dog/5.jpg"), ("train", "test", "cat", "dog")),
        ((*SPLITS, "unlabelled/4.jpg"), ("train", "unlabelled")),
        (("train/1.jpg", "test/2.jpg", "tram/3.jpg"), ("train", "test", "tram")),
        (("train/cat/1.jpg", "val/2.jpg"), ("val", "path,class,split")),
        (("train/1.jpg", "test/2.jpg"), ("train", "test", "path,class,split")),
        ((*SPLITS, "dev/cat/4.jpg", "val/cat/5.jpg"), ("dev", "val")),
        (("flowers/train/rose/1.jpg", "flowers/test/rose/2.jpg"), ("flowers", "train", "as SOURCE")),
        (("bottle/train/good/1.jpg", "bottle/test/bad/2.jpg", "cable/train/good/3.jpg"), ("bottle", "SOURCE")),
        (("seg_train/seg_train/cat/1.jpg", "seg_test/seg_test/cat/2.jpg"), ("seg_test", "move what it holds up")),
        (("test/1.jpg", "images/cat/2.jpg", "images/dog/3.jpg"), ("test", "images")),
    ],
)
def test_what_may_be_splits_or_classes_is_refused_with_the_names(
    tmp_path: Path, files: tuple[str, ...], named: tuple[str, ...]
) -> None:
    touch(tmp_path, *files)
    with pytest.raises(UseError) as raised:
        read_source(tmp_path)
    assert all(name in str(raised.value) for name in named) and "\n" not in str(raised.value)


def test_the_user_ends_the_doubt(tmp_path: Path) -> None:
    touch(tmp_path, *SPLITS, "holdout/cat/4.jpg", "holdout/cat/5.jpg", "val/6.jpg")
    found = read_source(tmp_path, split_folders=True)
    assert set(rows(found)) == THEIR_ROWS
    assert reasons(found) == {"in a folder that is no split": 2, "image outside of the class folders": 1}
    classes = {class_name for _, class_name, _ in rows(read_source(tmp_path, split_folders=False))}
    assert classes == {"train", "test", "holdout", "val"}


def test_a_class_that_is_called_as_a_split_is_a_class_among_others(tmp_path: Path) -> None:
    names = [f"part {i}" for i in range(30)] + ["test"]
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in names for i in range(2)), "part 3/2019/old.jpg")
    found = rows(read_source(tmp_path))
    assert {class_name for _, class_name, _ in found} == set(names) and {split for *_, split in found} == {None}
    (tmp_path / "trains").mkdir()
    touch(tmp_path / "trains", "bullet train/1.jpg", "freight train/2.jpg")
    assert {c for _, c, _ in rows(read_source(tmp_path / "trains"))} == {"bullet train", "freight train"}


@pytest.mark.parametrize("place", ["set", "train/set", "train/cat/set"])
@pytest.mark.parametrize("splits", [True, False])
def test_the_set_may_lie_inside_its_source_and_the_command_be_given_twice(
    tmp_path: Path, place: str, splits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(["train/cat/1.jpg", "train/dog/2.jpg", *(["test/cat/3.jpg"] if splits else ["x/3.jpg"])]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg_bytes(i))
    options = ["--workers", "1", *([] if splits else ["--no-split-folders"])]
    command = ["build", str(tmp_path), str(tmp_path / place), *options]
    assert main(command) == 0
    manifest = read_manifest(tmp_path / place)
    assert manifest.class_names == (["cat", "dog"] if splits else ["train", "x"]) and manifest.left_out == {}
    capsys.readouterr()
    assert main(command) == 0
    assert "already complete" in capsys.readouterr().out
    assert main(["build", str(tmp_path), str(tmp_path), "--workers", "1"]) == 2
    assert "among its own source" in capsys.readouterr().err


def test_tars_are_read_again_from_a_folder_that_holds_their_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [{"jpg": jpeg_bytes(i), "cls": b"0"} for i in range(2)])
    for _ in range(2):
        assert main(["build", str(tmp_path), str(tmp_path / "set"), "--workers", "1"]) == 0


# ---- files that are not taken ----------------------------------------------------------------------------------------


def test_the_content_says_what_is_an_image_where_the_ending_does_not(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    names = {"JPEG": "a.jpg_large", "PNG": "b", "WEBP": "c.image", "GIF": "d.HEIC", "BMP": "e.1", "TIFF": "f.tf8"}
    (tmp_path / "cat").mkdir()
    for kind, name in names.items():
        picture.save(tmp_path / "cat" / name, kind)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    (tmp_path / "cat/real.HEIC").write_bytes(heic)
    (tmp_path / "cat/raw.NEF").write_bytes((tmp_path / "cat/f.tf8").read_bytes())  # its TIFF is a thumbnail
    touch(tmp_path, "cat/notes.json", "cat/BM.doc", "cat/empty")
    found = read_source(tmp_path)
    assert {name for name, *_ in rows(found)} == {f"cat/{name}" for name in names.values()}
    assert reasons(found) == {
        "no known image format (.heic)": 1,
        "no known image format (.nef)": 1,
        "no known image format (.json)": 1,
        "no known image format (.doc)": 1,
        "no known image format (no ending)": 1,
    }


def test_files_that_are_not_taken_are_in_the_summary_and_in_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    touch(source, "cat/note.xml", "dog/x.HEIC", "dog/y.heic", "cover.png", "cat/.hidden.jpg", "cat/odd.$$$")
    (source / "cat/1.jpg").write_bytes(jpeg_bytes(0))
    (source / "cat/2.jpg_large").write_bytes(jpeg_bytes(1))
    assert main(["build", str(source), str(out), "--workers", "1", "--ratios", "1,0,0"]) == 0
    said = capsys.readouterr()
    manifest = read_manifest(out)
    assert manifest.classes[0].count == 2 and manifest.left_out == {
        "no known image format (.xml)": 1,
        "no known image format (.heic)": 2,
        "no known image format (other endings)": 1,
        "image outside of the class folders": 1,
        "hidden file": 1,
    }
    assert "2 no known image format (.heic)" in said.out
    listed = {json.loads(line)["name"] for line in (out / "left_out.jsonl").read_text().splitlines()}
    every = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert listed == every - {"cat/1.jpg", "cat/2.jpg_large"}
    assert "give no class: dog" in said.err and "one class alone, 'cat'" in said.err


def test_many_endings_do_not_fill_the_manifest(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", *(f"cat/core.{i}" for i in range(500)))
    counted = reasons(read_source(tmp_path))
    assert len(counted) == 21 and counted["no known image format (other endings)"] == 480


def test_sidecars_are_found_in_any_case_or_counted(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/2.JPG", "cat/3.jpg_large", "cat/IMG.jpg", "cat/img.txt", "cat/4.txt")
    (tmp_path / "cat/3.jpg_large").write_bytes(jpeg_bytes(0))
    for name, text in (("1.TXT", "red hair"), ("2.Txt", "a, b"), ("3.txt", "c")):
        (tmp_path / "cat" / name).write_text(text)
    found = read_source(tmp_path)
    tags = {item.name: item.tags for item in found if isinstance(item, Record)}
    assert tags == {"cat/1.jpg": "red hair", "cat/2.JPG": "a b", "cat/3.jpg_large": "c", "cat/IMG.jpg": ""}
    assert reasons(found) == {"text without an image": 2}


def test_a_source_without_images_says_what_there_is(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.heic", "cat/2.heic", "cat/3.xml")
    with pytest.raises(UseError, match=r"no images found.*2 no known image format \(.heic\), 1 no known"):
        read_source(tmp_path)


# ---- one image, one place --------------------------------------------------------------------------------------------


def test_an_image_under_two_names_is_taken_once_or_refused(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "cat/link.jpg").symlink_to("1.jpg")
    os.link(tmp_path / "cat/1.jpg", tmp_path / "cat/hard.jpg")
    found = read_source(tmp_path)
    assert [name for name, *_ in rows(found)] == ["cat/1.jpg", "dog/2.jpg"]
    assert reasons(found) == {"image listed again": 2}
    (tmp_path / "dog/again").symlink_to(tmp_path / "cat")
    with pytest.raises(UseError, match=r"dog/again/1.jpg: the same image as cat/1.jpg .*class 'dog' here, 'cat' there"):
        read_source(tmp_path)


def csv_file(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    (folder / "list.csv").write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return folder / "list.csv"


def test_repeated_rows_of_a_csv_are_counted_and_taken_once(tmp_path: Path) -> None:
    touch(tmp_path, "img/1.jpg", "img/2.jpg")
    (tmp_path / "link.jpg").symlink_to("img/1.jpg")
    lines = ["path,class,split", "img/1.jpg,a,train", "img/2.jpg,b,val", "./img//1.jpg,a,train", "link.jpg,a,train"]
    lines += ["img\\1.jpg,a,Training", "gone.jpg,a,train", "./gone.jpg,a,train"]
    found = read_source(csv_file(tmp_path, *lines))
    assert [name for name, *_ in rows(found)] == ["img/1.jpg", "img/2.jpg", "gone.jpg"]
    assert reasons(found) == {"image listed again": 4}
    details = [item.detail for item in found if isinstance(item, LeftOut)]
    assert details[0].endswith("list.csv, line 4: the same image as " + f"{tmp_path}/list.csv, line 2")


@pytest.mark.parametrize(
    ("header", "first", "second", "said"),
    [
        ("path,class", "1.jpg,a", "1.jpg,b", "its class 'b' here, 'a' there"),
        ("path,class,split", "1.jpg,a,train", "./1.jpg,a,test", "its split 'test' here, 'train' there"),
        ("path,class,split", "1.jpg,a,train", "1.jpg,a,", "its split 'none' here, 'train' there"),
        ("path,class,tags", "1.jpg,a,smile", "1.jpg,a,hat", "its tags 'hat' here, 'smile' there"),
    ],
)
def test_a_csv_that_contradicts_itself_is_refused_with_both_lines(
    tmp_path: Path, header: str, first: str, second: str, said: str
) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    other = "2.jpg,c" + ",val" * (header.count(",") - 1)
    with pytest.raises(UseError) as raised:
        read_source(csv_file(tmp_path, header, first, other, second))
    assert (
        said in str(raised.value)
        and "line 4: the same image as" in str(raised.value)
        and ", line 2" in str(raised.value)
    )


@pytest.mark.parametrize(
    "lines",
    [
        ("path, class, split, tags", '1.jpg, a, train, "red, blue"', "sub/2.jpg, b, val ,x"),
        ("Path,Class,Split,Tags", '1.jpg,a,train,"red,blue"', "sub/2.jpg,b,VAL,x"),
        ("path;class;split;tags", "1.jpg;a;train;red,blue", "sub/2.jpg;b;val;x"),
        ("path\tclass\tsplit\ttags", "1.jpg\ta\ttrain\tred,blue", "sub/2.jpg\tb\tval\tx"),
        ('"path","class","split","tags"', '"1.jpg","a","train","red, blue"', '"sub\\2.jpg","b","val","x"'),
        ("class ,path ,split,tags", 'a,1.jpg ,train,"red\nblue"', "b, sub\\2.jpg,dev,x"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_files_as_programs_write_them_are_read(tmp_path: Path, lines: tuple[str, ...], encoding: str) -> None:
    touch(tmp_path, "1.jpg", "sub/2.jpg")
    found = read_source(csv_file(tmp_path, *lines, encoding=encoding))
    assert [(r.class_name, r.split, r.tags) for r in found] == [("a", "train", "red blue"), ("b", "val", "x")]
    assert [record.read() for record in found] == [b"1.jpg", b"sub/2.jpg"]


@pytest.mark.parametrize(("file", "path"), [("sub/\u304b\u3099.jpg", "sub/\u304c.jpg"), ("\xe9.jpg", "e\u0301.jpg")])
def test_a_name_is_found_in_either_of_unicodes_forms(tmp_path: Path, file: str, path: str) -> None:
    touch(tmp_path, file, "2.jpg")
    found = read_source(csv_file(tmp_path, "path,class", f"{path},a", "2.jpg,b"))
    assert [record.read() for record in found] == [file.encode(), b"2.jpg"]


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("photos\\cat\\9.jpg", "backslashes were read as slashes too"),
        ("C:\\photos\\1.jpg", "paths of another machine"),
        ("/elsewhere/1.jpg", "absolute"),
        ("lists/img/1.jpg", "start a folder higher: --root"),
        ("IMG/1.JPG", "img/1.jpg: write the paths as the files are called"),
        ("img/1", "img/1.jpg: write the paths as the files are called"),
        ("https://x/1.jpg", "URLs"),
        ("1.jpg", "--root"),
    ],
)
def test_a_csv_of_paths_that_are_not_there_says_what_was_tried_and_why(tmp_path: Path, path: str, cure: str) -> None:
    touch(tmp_path, "lists/img/1.jpg")
    with pytest.raises(UseError) as raised:
        read_source(csv_file(tmp_path / "lists", "path,class", f"{path},a"))
    message = str(raised.value)
    assert cure in message and "\n" not in message
    assert str(tmp_path / "lists" / path) in message or path in message


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    with pytest.raises(UseError, match="the column 'class' is there 2 times"):
        read_source(csv_file(tmp_path, "path,class,class", "1.jpg,a,b"))
