"""Promises of `shards adopt`: tars of the webdataset library become a set where they lie, or are refused by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.tarindex import index_tar, read_index
from dist_train.place import Place
from shards.__main__ import main
from shards.build import build_shard_set
from shards.plan import BuildOptions
from shards.sources import read_source
from tests.harness import jpeg_bytes, smooth_image


def png_bytes(number: int) -> bytes:
    file = io.BytesIO()
    smooth_image(number, 48, 40).save(file, "PNG")
    return file.getvalue()


def write_with_webdataset(folder: Path, pattern: str, first: int, count: int, **extra: object) -> None:
    """Tars of 5 samples by the library's own ShardWriter: sample n has picture n and class n mod 3."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=5, verbose=0) as writer:
        for n in range(first, first + count):
            image = {"png": png_bytes(n)} if n % 2 else {"jpg": jpeg_bytes(n)}
            sample = {"__key__": f"photo {n:04d}", **image, "cls": n % 3, "txt": f"tag{n} smile", "json": {"n": n}}
            writer.write(sample | extra)


def plain_tar(path: Path, *members: tuple[str, bytes], **options: object) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tars_of_the_webdataset_library_become_a_set_that_the_loader_and_verify_read(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    write_with_webdataset(folder, "birds-train-%06d.tar", 0, 13)
    write_with_webdataset(folder, "birds-val-%06d.tar", 13, 6)
    (tmp_path / "names.txt").write_text("robin\nwren\ntit\nnever seen\n")
    before = listing(folder)
    assert main(["adopt", str(folder), "--classes", str(tmp_path / "names.txt"), "--workers", "2"]) == 0
    manifest = read_manifest(folder)
    assert {name: split.shard_samples for name, split in manifest.splits.items()} == {"train": [5, 5, 3], "val": [5, 1]}
    assert [(c.name, c.count) for c in manifest.classes] == [("robin", 7), ("wren", 6), ("tit", 6), ("never seen", 0)]
    assert manifest.text and manifest.transform is None and manifest.left_out == {}
    after = listing(folder)
    assert {name: after[name] for name in before} == before  # the tars are as they were
    assert set(after) - set(before) == {
        "manifest.json",
        "left_out.jsonl",
        *(name.replace(".tar", suffix) for name in before for suffix in (".idx", ".crc")),
    }
    assert main(["verify", str(folder), "--workers", "1"]) == 0

    config = DataConfig(shards=str(folder), image_size=32, device="cpu", threads=1)
    loader = EvalLoader(config, manifest, "train", Place(), batch_size=4)
    batches = list(loader)
    assert np.concatenate([batch.labels for batch in batches]).tolist() == [n % 3 for n in range(13)]
    for n, image in enumerate(np.concatenate([batch.images for batch in batches])):
        expected = np.asarray(smooth_image(n, 48, 40).resize((32, 32), Image.Resampling.BILINEAR)) / 127.5 - 1
        assert np.abs(image - expected.transpose(2, 0, 1)).mean() < 0.05
    positions = loader.batches[0]
    assert loader.fetcher.fetch(positions, with_text=True).texts[1] == "tag1 smile"


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        (["--split", "train"], {"train": 20}),
        (["--ratios", "0.5,0.25,0.25", "--seed", "1"], {"train": 10, "val": 5, "test": 5}),
    ],
)
def test_tars_without_a_split_in_their_names_get_one(tmp_path: Path, options: list[str], splits: dict) -> None:
    folder = tmp_path / "tars"
    write_with_webdataset(folder, "%05d.tar", 0, 20)
    assert main(["adopt", str(folder), "--workers", "1"]) == 2
    assert main(["adopt", str(folder), "--workers", "1", *options]) == 0
    manifest = read_manifest(folder)
    assert {name: split.samples for name, split in manifest.splits.items()} == splits
    assert manifest.class_names == ["0", "1", "2"]


GOOD = [("0.jpg", jpeg_bytes(0)), ("0.cls", b"0")]


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ([*GOOD, ("1.cls", b"0")], "sample 1: has 0 images"),
        ([*GOOD, ("1.jpg", jpeg_bytes(1))], "sample 1: has no .cls"),
        ([*GOOD, ("1.jpg", jpeg_bytes(1)), ("1.cls", b"cat")], r"sample 1: class b'cat'.*[^;]*; .*takes names"),
        ([*GOOD, ("1.jpg", b"x"), ("1.cls", b"7000000")], "sample 1: class b'7000000' is not between 0"),
        ([*GOOD, ("1.jpg", b"x"), ("1.cls", b"7" * 5000)], "sample 1: class b'77777777777777777777' is not between 0"),
        ([*GOOD, *GOOD], "sample 0: the key comes twice"),
        ([*GOOD, ("0.png", jpeg_bytes(1))], "sample 0: has 2 images"),
        ([("0.jpg", jpeg_bytes(0)), ("0.json", b"{}")], "none of its samples has a .cls; .*--format webdataset"),
        ([], "holds no samples[^\n]*\n.*nothing was written"),
        ([("a\nb.jpg", jpeg_bytes(0)), ("a\nb.cls", b"0")], "sample .* has a name that no index can hold"),
    ],
)
def test_tars_that_the_loader_could_not_read_are_named_and_nothing_is_written(
    tmp_path: Path, members: list[tuple[str, bytes]], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_tar(tmp_path / "train-0.tar", *GOOD)
    plain_tar(tmp_path / "train-1.tar", *members)
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"^error: .*train-1.tar: {line}", error) and "train-0.tar" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"train-0.tar", "train-1.tar"}


def test_a_tar_full_of_samples_that_cannot_be_used_does_not_fill_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{n}.{suffix}", data) for n in range(50) for suffix, data in (("jpg", GOOD[0][1]), ("cls", b"cat"))]
    plain_tar(tmp_path / "train-0.tar", *members)
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 1
    *lines, more, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and more.endswith("train-0.tar: 30 lines more of this kind") and "takes names" in last


def test_damaged_and_compressed_tars_and_other_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(status: int, *arguments: str) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        assert main(["adopt", str(tmp_path), "--workers", "1", *arguments]) == status
        assert {path.name for path in tmp_path.iterdir()} == before
        return capsys.readouterr().err

    assert "no .tar files" in refused(2)
    tar = tmp_path / "train-0.tar"
    plain_tar(tar, *GOOD)
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700])
    assert "train-0.tar: cut short inside 0.jpg" in refused(1)
    tar.write_bytes(whole[:257] + bytes(8) + whole[265:])
    assert "train-0.tar: " in refused(1)
    tar.write_bytes(gzip.compress(whole))
    assert "compressed" in refused(2)
    tar.rename(tmp_path / "train-0.tar.gz")
    assert "unpack it with gunzip" in refused(2)
    (tmp_path / "train-0.tar.gz").unlink()
    tar.write_bytes(whole)
    assert "exclude each other" in refused(2, "--split", "train", "--ratios", "1,0,0")
    assert "leave none for val and test" in refused(2, "--ratios", "0.7,0.1,0.2")
    (tmp_path / "build.json").write_text("{}")
    assert "has a build.json already" in refused(2)


def test_a_folder_that_cannot_be_written_is_said_so_before_the_work_and_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_tar(tmp_path / "train-0.tar", *GOOD)
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        assert main(["adopt", str(tmp_path), "--workers", "1"]) == 2
    assert re.fullmatch(r"error: .*: cannot be written, .*`python -m shards build`.*\n", capsys.readouterr().err)
    (tmp_path / "train-0.idx").mkdir()  # what no rename replaces
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 1
    assert "cannot be written (Is a directory)" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "train-0.idx").rmdir()
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 0
    (tmp_path / "train-0.idx").unlink()
    (tmp_path / "train-0.idx").mkdir()
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--fix-index", "--workers", "1"]) == 1
    assert "cannot be written (Is a directory)" in capsys.readouterr().err.splitlines()[-1]


def test_a_tar_from_before_the_ustar_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = tmp_path / "train-0.tar"
    plain_tar(tar, *GOOD, format=tarfile.USTAR_FORMAT)
    content = bytearray(tar.read_bytes())
    for start in [member.offset - 512 for sample in index_tar(tar) for member in sample.members.values()]:
        content[start + 257 : start + 265] = bytes(8)  # no magic, no version
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    tar.write_bytes(content)
    assert len(index_tar(tar)) == 1
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 1
    assert "train-0.tar: a tar from before the USTAR format" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"train-0.tar"}


@pytest.mark.parametrize("options", [[], ["--no-decode"]])
def test_images_that_do_not_decode_are_listed_and_set_aside_by_the_loader(tmp_path: Path, options: list[str]) -> None:
    folder = tmp_path / "tars"
    bad = [("1.jpg", jpeg_bytes(1)[:300]), ("1.cls", b"1")]
    plain_tar(folder / "train-0.tar", *GOOD, *bad, ("2.jpg", jpeg_bytes(2)), ("2.cls", b"1"))
    assert main(["adopt", str(folder), "--workers", "1", *options]) == 0
    manifest = read_manifest(folder)
    listed = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    if options:
        assert manifest.left_out == {} and listed == []
        return
    assert manifest.left_out == {"in the tar but undecodable": 1}
    assert [entry["name"] for entry in listed] == ["train-0.tar:1"] and "truncated" in listed[0]["detail"]
    config = DataConfig(shards=str(folder), image_size=32, device="cpu", threads=1)
    (batch,) = EvalLoader(config, manifest, "train", Place(), batch_size=3)
    assert batch.weights.tolist() == [1, 0, 1] and batch.labels[batch.weights > 0].tolist() == [0, 1]


def test_a_blank_in_an_extension_becomes_what_an_index_can_hold(tmp_path: Path) -> None:
    plain_tar(tmp_path / "train-0.tar", *GOOD, ("0.a note", b"seen"))
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 0
    (sample,) = read_index(tmp_path / "train-0.tar")
    assert sample.members == index_tar(tmp_path / "train-0.tar")[0].members
    assert set(sample.members) == {"jpg", "cls", "a_note"} and sample.members["a_note"].size == 4


def test_names_of_any_script_and_of_newer_characters_are_names(tmp_path: Path) -> None:
    names = ("ネコ\u3000イヌ", "a\u00a0b", "\U0001f469\u200d\U0001f467", "می\u200cخواهم", "\U0001fae8", "\U0003fffd")
    plain_tar(
        tmp_path / "train-0.tar",
        *(pair for key in names for pair in ((f"{key}.jpg", GOOD[0][1]), (f"{key}.cls", b"0"))),
    )
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 0
    assert [sample.key for sample in read_index(tmp_path / "train-0.tar")] == list(names)
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0


@pytest.mark.parametrize("dotted", ["{}.v2.cls", "{}.cls"])
def test_class_and_tags_are_found_where_a_key_was_cut_at_its_first_dot(tmp_path: Path, dotted: str) -> None:
    members = [
        (name.format(n), content)
        for n in range(3)
        for name, content in (("{}.v2.jpg", jpeg_bytes(n)), (dotted, b"%d" % (n % 2)), ("{}.v2.txt", b"smile"))
    ]
    plain_tar(tmp_path / "train-0.tar", *members)
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path)
    assert [info.count for info in manifest.classes] == [2, 1] and manifest.text
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0


def test_a_set_with_tags_for_some_samples_counts_as_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain_tar(tmp_path / "train-0.tar", *GOOD, ("0.txt", b"smile"), ("1.jpg", jpeg_bytes(1)), ("1.cls", b"0"))
    assert main(["adopt", str(tmp_path), "--workers", "1"]) == 0
    assert "1 of 2 samples have no .txt" in capsys.readouterr().out
    assert not read_manifest(tmp_path).text


@pytest.mark.parametrize("adopted", [False, True], ids=["built", "adopted"])
def test_the_webdataset_library_and_dali_read_a_set_sample_for_sample(tmp_path: Path, adopted: bool) -> None:
    """Bytes of images, classes and tags in the order of the manifest; the reference is tarfile's own reading."""
    if adopted:
        with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=5, verbose=0) as writer:
            for n in range(12):
                writer.write({"__key__": f"{n:04d}", "jpg": jpeg_bytes(n), "cls": n % 3, "txt": f"tag{n} smile"})
        folder = tmp_path
        assert main(["adopt", str(folder), "--workers", "1"]) == 0
    else:
        for n in range(12):
            place = tmp_path / f"photos/train/{n % 3}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n}.jpg").write_bytes(jpeg_bytes(n))
            (place / f"{n}.txt").write_text(f"tag {n}, smile")
        (tmp_path / "photos/test").mkdir()
        folder = tmp_path / "set"
        build_shard_set(read_source(tmp_path / "photos"), folder, BuildOptions(shard_mb=0.02))
    split = read_manifest(folder).split("train")
    tars = [folder / shard.file for shard in split.shards]
    assert len(tars) > 1 and split.samples == 12
    expected: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for entry in tar:
                key, extension = entry.name.split(".")
                expected.setdefault((path.name, key), {})[extension] = tar.extractfile(entry).read()
    extensions = ["jpg", "cls", "txt"]
    rows = [tuple(sample[extension] for extension in extensions) for sample in expected.values()]
    assert len(set(rows)) == 12

    seen = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False, empty_check=False)
    assert [tuple(sample[extension] for extension in extensions) for sample in seen] == rows

    @pipeline_def(batch_size=12, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        return tuple(
            fn.readers.webdataset(
                paths=[str(path) for path in tars],
                index_paths=[str(path.with_suffix(".idx")) for path in tars],
                ext=extensions,
                missing_component_behavior="error",
            )
        )

    columns = pipeline().run()
    assert [tuple(bytes(np.asarray(column.at(i))) for column in columns) for i in range(12)] == rows
