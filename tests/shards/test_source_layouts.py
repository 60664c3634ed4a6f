"""Promises of the readers of layouts: DAF and its kin, Danbooru metadata, tags beside images, tars of others."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset

from dist_train.data.manifest import read_manifest
from dist_train.data.tags import tag_line
from dist_train.errors import UseError
from shards.__main__ import main
from shards.records import LeftOut, Record
from shards.sources import read_source
from tests.harness import jpeg_bytes, touch


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def rows(found: Iterable[Record | LeftOut]) -> list[tuple[str, str, str | None, str | None]]:
    return [(r.name, r.class_name, r.split, r.tags) for r in found if isinstance(r, Record)]


def reasons(found: Iterable[Record | LeftOut]) -> dict[str, int]:
    return {entry.reason: entry.count for entry in found if isinstance(entry, LeftOut)}


def daf(root: Path, *image_folders: str) -> Path:
    write(root / "labels/classid_classname.csv", "0,hatsune_miku", '1,"rem, the (re:zero)"')
    write(root / "labels/train.csv", "1,0291/1796291.jpg", "0,0007/7.jpg")
    write(root / "labels/val.csv", "0,0008/8.jpg")
    write(root / "labels/test.csv", "1,0009/9.jpg")
    for folder in image_folders:
        touch(root / folder, "0291/1796291.jpg", "0007/7.jpg", "0008/8.jpg", "0009/9.jpg")
    return root


@pytest.mark.parametrize(("layout", "folder"), [("daf", "faces"), ("dafull", "fullMin256")])
def test_daf_gives_its_splits_its_class_names_and_its_general_tags(tmp_path: Path, layout: str, folder: str) -> None:
    root = daf(tmp_path, folder)
    header = "id,dir,class_id,tags_cat0,tags_cat3,tags_cat4"
    write(
        root / "labels/train_tags.csv",
        header,
        """7,0007/7.jpg,0,"['smile', 'long hair', ""it's""]",['vocaloid'],['hatsune_miku']""",
        """1796291,0291/1796291.jpg,1,['1girl'],['re:zero'],['rem']""",  # not the order of train.csv
    )
    write(root / "labels/val_tags.csv", header)
    write(root / "labels/test_tags.csv", header, "9,0009/9.jpg,1,[],[],[]")
    found = read_source(root)
    assert rows(found) == rows(read_source(root, layout))
    assert rows(found) == [
        ("0291/1796291.jpg", "rem, the (re:zero)", "train", "1girl"),
        ("0007/7.jpg", "hatsune_miku", "train", "smile long hair it's"),
        ("0008/8.jpg", "hatsune_miku", "val", ""),
        ("0009/9.jpg", "rem, the (re:zero)", "test", ""),
    ]
    assert Path(found[0].read.path) == root / folder / "0291/1796291.jpg"


def test_tags_with_commas_and_halves_of_characters_stay_tags_of_their_own(tmp_path: Path) -> None:
    """A loader takes a line with a comma for tags that commas separate."""
    root = daf(tmp_path / "daf", "faces")
    for name in ("val.csv", "test.csv"):
        (root / "labels" / name).unlink()
    write(root / "labels/train.csv", "0,0007/7.jpg")
    write(root / "labels/train_tags.csv", "dir,tags_cat0", """0007/7.jpg,"['yes,_sir', 'a,', 'smile']\"""")
    assert [tags for *_, tags in rows(read_source(root))] == ["yes_sir a smile"]

    touch(tmp_path / "512px", "0009/9.jpg")
    (tmp_path / "512px/0009/9.jpg").write_bytes(jpeg_bytes(9))
    write(tmp_path / "posts.json", json.dumps(NEW_POSTS[3] | {"tag_string_general": "yes,_sir half_\ud800 smile"}))
    build = ["build", str(tmp_path / "posts.json"), str(tmp_path / "set"), "--root", str(tmp_path / "512px")]
    assert main([*build, "--workers", "1"]) == 0
    with tarfile.open(tmp_path / "set/train-000000.tar") as tar:
        (text,) = (tar.extractfile(entry).read().decode() for entry in tar if entry.name.endswith(".txt"))
    assert text == tag_line(text) == "yes_sir half_? smile"


def test_daf_and_dafull_in_one_folder_are_told_apart_by_the_user(tmp_path: Path) -> None:
    root = daf(tmp_path, "faces", "fullMin256")
    with pytest.raises(UseError, match="both of faces and fullMin256; say --format daf"):
        read_source(root)
    assert "/fullMin256/" in read_source(root, "dafull")[0].read.path
    assert {record.tags for record in read_source(root, "daf")} == {None}


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("train.csv", ["5,0007/7.jpg"], r"train.csv, line 1: expected class_id,path with an id"),
        ("train.csv", ["0"], r"train.csv, line 1"),
        ("train.csv", ["0,0007/7.jpg", "0,\0\0"], r"train.csv, line 2"),
        ("train.csv", [], "lists no images"),
        ("train.csv", ["0,gone.jpg"], "none of its 1 images is found in .*faces"),
        ("classid_classname.csv", ["0,a", "1,a"], "line 2: expected class_id,class_name, each id and each name once"),
        ("train_tags.csv", ["dir,tags_cat0", "0007/7.jpg,__import__('os')"], "line 2: expected a Python list"),
        (
            "train_tags.csv",
            ["dir,tags_cat0", "faces/0007/7.jpg,['smile']"],
            r"none of the paths of train.csv \(faces/0007/7.jpg here, 0291/1796291.jpg there\)",
        ),
        ("train_tags.csv", ["dir"], "no columns dir and tags_cat0"),
    ],
)
def test_lists_that_cannot_be_used_are_refused_with_the_place(
    tmp_path: Path, file: str, lines: list[str], message: str
) -> None:
    root = daf(tmp_path, "faces")
    for name in ("val.csv", "test.csv"):
        (root / "labels" / name).unlink()
    write(root / "labels" / file, *lines)
    with pytest.raises(UseError, match=message):
        read_source(root, "daf")


def test_tags_for_some_of_the_splits_only_are_refused(tmp_path: Path) -> None:
    write(daf(tmp_path, "faces") / "labels/train_tags.csv", "dir,tags_cat0")
    with pytest.raises(UseError, match=r"val_tags.csv: missing, while train_tags.csv is there"):
        read_source(tmp_path)


@pytest.mark.parametrize("layout", [None, "moeimouto", "icartoonface"])
def test_moeimouto_and_icartoonface_give_train_and_test(tmp_path: Path, layout: str | None) -> None:
    touch(tmp_path / "data", "000_miku/face_1.png", "001_sakura/face_2.png")
    write(tmp_path / "classid_classname.csv", "0,000_miku", "1,001_sakura")
    write(tmp_path / "train.csv", "0,000_miku/face_1.png")
    write(tmp_path / "test.csv", "1,001_sakura/face_2.png")
    assert rows(read_source(tmp_path, layout)) == [
        ("000_miku/face_1.png", "000_miku", "train", None),
        ("001_sakura/face_2.png", "001_sakura", "test", None),
    ]


OLD_POSTS = [
    {
        "id": "1234123",
        "file_ext": "png",
        "rating": "s",
        "tags": [
            {"id": "1", "name": "smile", "category": "0"},
            {"id": "2", "name": "miku", "category": "4"},
            {"id": "3", "name": "ahoge", "category": "0"},
            {"id": "2", "name": "miku", "category": "4"},  # listed twice
            {"id": "4", "name": "vocaloid", "category": "3"},
        ],
    },
    {"id": "5", "file_ext": "jpg", "tags": [{"id": "1", "name": "smile", "category": 0}]},
    {"id": 7, "file_ext": "jpg", "tags": [{"id": 2, "name": n, "category": 4} for n in ("miku", "rin")]},
    {"id": 9, "file_ext": "jpg", "tags": [{"id": 2, "name": "rin", "category": 4}]},
    {"id": 11, "file_ext": "../x", "tags": [{"id": 2, "name": "rin", "category": 4}]},
]
NEW_POSTS = [
    {"id": 1234123, "file_ext": "png", "tag_string_character": "miku", "tag_string_general": "smile ahoge"},
    {"id": 5, "file_ext": "jpg", "tag_string_character": "", "tag_string_general": "smile"},
    {"id": 7, "file_ext": "jpg", "tag_string_character": "miku rin", "tag_string_general": ""},
    {"id": 9, "file_ext": "jpg", "tag_string_character": "rin", "tag_string_general": "", "tag_string": "rin"},
    {"id": 11, "file_ext": None, "tag_string_character": "rin", "tag_string_general": "smile"},
]


@pytest.mark.parametrize("posts", [OLD_POSTS, NEW_POSTS], ids=["to 2020", "from 2021"])
@pytest.mark.parametrize(("tree", "suffix"), [("original", "png"), ("512px", "jpg")])
def test_danbooru_posts_with_one_character_are_samples_and_the_others_counted(
    tmp_path: Path, posts: list[dict], tree: str, suffix: str
) -> None:
    touch(tmp_path / tree, f"0123/1234123.{suffix}", "0005/5.jpg", "0007/7.jpg", "0009/9.jpg")
    banned = {key: value for key, value in posts[0].items() if key != "id"}
    write(tmp_path / "posts.json", *map(json.dumps, [*posts, banned, posts[0]]))
    found = read_source(tmp_path / "posts.json", root=tmp_path / tree)
    assert rows(found) == [
        (f"0123/1234123.{suffix}", "miku", None, "smile ahoge"),
        ("0009/9.jpg", "rin", None, ""),
    ]
    assert found[0].read() == f"0123/1234123.{suffix}".encode()
    assert reasons(found) == {
        "no character tag": 1,
        "several character tags": 1,
        "missing file": 1,
        "post without an id": 1,
        "post listed twice": 1,
    }


def test_danbooru_metadata_may_be_a_folder_of_files_without_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "512px", "0123/1234123.jpg", "0009/9.jpg")
    write(tmp_path / "metadata/2020000000000000", json.dumps(OLD_POSTS[0]))
    write(tmp_path / "metadata/2020000000000001", json.dumps(OLD_POSTS[3]))
    found = read_source(tmp_path / "metadata", "danbooru", root=tmp_path / "512px")
    assert [record.class_name for record in found] == ["miku", "rin"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[{"id": 1}]', r"one JSON array.*jq"),
        ('{"id": 1', r"posts.json, line 2: not a post in JSON"),
        ('{"id": 1}', r"line 2: not a Danbooru post"),
        ('{"id": 1e999, "tags": []}', r"line 2: not a Danbooru post"),
        ('{"id": 1, "tags": "miku smile"}', r"line 2: not a Danbooru post"),
        ("3", r"line 2: not a post in JSON"),
    ],
)
def test_metadata_that_is_none_is_refused_with_the_place(tmp_path: Path, line: str, message: str) -> None:
    touch(tmp_path, "0009/9.jpg")
    write(tmp_path / "posts.json", *([] if line[0] == "[" else [json.dumps(NEW_POSTS[3])]), line)
    with pytest.raises(UseError, match=message):
        read_source(tmp_path / "posts.json", root=tmp_path)


def test_danbooru_without_its_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "posts.json", json.dumps(NEW_POSTS[3]))
    with pytest.raises(UseError, match="--root must name"):
        read_source(tmp_path / "posts.json")
    with pytest.raises(UseError, match=r"no post has one character tag and an image.*1 missing file"):
        read_source(tmp_path / "posts.json", root=tmp_path)


def test_danbooru_metadata_is_streamed(tmp_path: Path) -> None:
    """Memory is for the posts that are kept: 40 MB of posts with no image take less than 2."""
    touch(tmp_path, "0009/9.jpg")
    other = {"id": 1, "tag_string_character": "rin", "tag_string_general": "tag_of_a_post " * 2800}
    with open(tmp_path / "posts.json", "w") as file:
        file.write(json.dumps(NEW_POSTS[3]) + "\n")
        for number in range(1000):
            file.write(json.dumps(other | {"id": 1000 + number}) + "\n")
    assert (tmp_path / "posts.json").stat().st_size > 39e6
    tracemalloc.start()
    found = read_source(tmp_path / "posts.json", root=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows(found)) == 1 and reasons(found) == {"missing file": 1000}
    assert peak < 2e6


def test_tags_beside_the_images_become_one_line_each(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "a/3.PNG", "b/4.jpg", "b/5.jpg")
    (tmp_path / "a/1.txt").write_bytes("1girl, long hair ,\\(o\\)_\\(o\\), école,".encode())
    (tmp_path / "a/2.txt").write_bytes(b"\xef\xbb\xbfred eyes\r\nsmile\r\n\r\n")
    (tmp_path / "a/3.txt").write_text("already one_line  of_tags\n")
    (tmp_path / "b/4.txt").write_text("")
    write(tmp_path / "b/readme.txt", "no image has this name")
    found_all = read_source(tmp_path)
    found = [item for item in found_all if isinstance(item, Record)]
    assert [record.tags for record in found] == [
        "1girl long_hair (o)_(o) école",
        "red_eyes smile",
        "already one_line of_tags",
        "",
        "",  # no file
    ]
    assert rows(found) == rows(read_source(tmp_path, "sidecar"))
    plain = read_source(tmp_path, "folders")
    assert {tags for *_, tags in rows(plain)} == {None}
    assert reasons(plain) == reasons(found_all) == {"text without an image": 1}


def test_sidecars_that_are_asked_for_must_be_there_and_readable(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/other.txt")
    assert read_source(tmp_path)[0].tags is None
    with pytest.raises(UseError, match=r"no KEY.txt lies beside any"):
        read_source(tmp_path, "sidecar")
    (tmp_path / "a/1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UseError, match=r"a/1.txt: cannot be read as UTF-8"):
        read_source(tmp_path)


def test_options_belong_to_their_layouts(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    for option in ({"root": tmp_path}, {"class_column": "x"}, {"class_key": "x"}, {"class_names": tmp_path}):
        with pytest.raises(UseError, match="belongs to sources of"):
            read_source(tmp_path, **option)


def test_tars_of_img2dataset_are_packed_anew_with_the_class_of_their_json(tmp_path: Path) -> None:
    source, out = tmp_path / "tars", tmp_path / "set"
    source.mkdir()
    for shard in range(2):
        # As img2dataset's own writer calls it: the library's TarWriter, image, caption, metadata of indent 4.
        with open(source / f"{shard:05d}.tar", "wb") as file:
            writer = webdataset.TarWriter(file)
            for number in range(6):
                key = f"{shard:05d}{number:04d}"
                meta = {"url": "http://x", "kind": ("cat", "dog", None)[number % 3], "status": "success", "key": key}
                writer.write(
                    {
                        "__key__": key,
                        "webp" if shard else "jpg": jpeg_bytes(10 * shard + number),
                        "txt": f"a {key}",
                        "json": json.dumps(meta, indent=4),
                    }
                )
            writer.close()
        (source / f"{shard:05d}.parquet").write_bytes(b"")
        (source / f"{shard:05d}_stats.json").write_text("{}")
    assert main(["build", str(source), str(out), "--class-key", "kind", "--workers", "1", "--ratios", "1,0,0"]) == 0
    manifest = read_manifest(out)
    assert [(info.name, info.count) for info in manifest.classes] == [("cat", 4), ("dog", 4)]
    assert manifest.text and manifest.left_out == {"no class": 4}
    found = {}
    for shard in manifest.split("train").shards:
        with tarfile.open(out / shard.file) as tar:
            for entry in tar:
                key, extension = entry.name.split(".")
                found.setdefault(key, {})[extension] = tar.extractfile(entry).read()
    expected = {
        (jpeg_bytes(10 * shard + number), str(number % 3).encode(), f"a {shard:05d}{number:04d}".encode())
        for shard in range(2)
        for number in range(6)
        if number % 3 < 2
    }
    assert {(sample["jpg"], sample["cls"], sample["txt"]) for sample in found.values()} == expected


def test_tars_keep_their_splits_and_may_have_named_classes_or_ids_with_names(tmp_path: Path) -> None:
    def write_tar(name: str, *samples: tuple[str, bytes]) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, (extension, content) in enumerate(samples):
                for suffix, data in (("bmp", b"picture"), (extension, content)):
                    entry = tarfile.TarInfo(f"{number}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))

    write_tar("birds-train-00000.tar", ("cls", b"1"), ("cls", b"wren\n"), ("json", b"{}"))
    write_tar("birds-validation-00000.tar", ("cls", b"0"))
    write(tmp_path / "names", "robin", "tit")
    found = read_source(tmp_path, class_names=tmp_path / "names")
    assert rows(found) == [
        ("birds-train-00000.tar:0", "tit", "train", None),
        ("birds-train-00000.tar:1", "wren", "train", None),
        ("birds-validation-00000.tar:0", "robin", "val", None),
    ]
    assert reasons(found) == {"no class": 1} and found[0].read() == b"picture"
    assert rows(read_source(tmp_path / "birds-train-00000.tar"))[0][1:3] == ("1", "train")
    write(tmp_path / "names", "robin", "robin")
    with pytest.raises(UseError, match="line 2: empty or there twice"):
        read_source(tmp_path, class_names=tmp_path / "names")
