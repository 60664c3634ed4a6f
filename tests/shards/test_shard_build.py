"""Promises of shards.build: what a built set holds, that it is reproducible, and that a build can be interrupted."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dist_train.data.manifest import read_manifest
from dist_train.data.tarindex import index_tar, read_index
from dist_train.errors import UseError, WorkError
from shards.__main__ import main
from shards.build import build_shard_set
from shards.plan import BuildOptions
from shards.records import FileContent, Record
from shards.sources import read_source
from tests.harness import jpeg_bytes

REPOSITORY = Path(__file__).parents[2]
GROCERY = REPOSITORY / "../shared/data/grocery"

OPTIONS = BuildOptions(size=32, shard_mb=0.05, seed=3)  # about 12 samples a shard


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as a shard set, by one worker."""
    out = tmp_path_factory.mktemp("sets") / "built"
    build_shard_set(read_source(photos), out, OPTIONS)
    return out


def members(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Content of every sample of a split, by key and extension, read by the standard library alone."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                key, extension = entry.name.split(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(entry).read()
    return samples


def test_a_set_holds_every_image_once_with_its_class(photos: Path, built: Path) -> None:
    manifest = read_manifest(built)
    assert [(info.name, info.count) for info in manifest.classes] == [
        ("ash", 12),
        ("birch", 15),
        ("cedar", 18),
        ("douglas fir", 21),
    ]
    assert (manifest.transform, manifest.text, manifest.left_out) == ("resize 32x32", False, {})
    small = {}
    for path in photos.glob("*/*.jpg"):
        small[path] = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    found = Counter()
    for split, info in manifest.splits.items():
        samples = members(built, split)
        assert len(samples) == info.samples
        for key, sample in samples.items():
            assert key.isascii() and key.startswith(split) and set(sample) == {"jpg", "cls"}
            image = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
            nearest = min(small, key=lambda path: np.abs(small[path] - image).mean())
            assert nearest.parent.name == manifest.class_names[int(sample["cls"])]
            found[nearest] += 1
    assert found == Counter(dict.fromkeys(small, 1))


def test_shards_are_plain_ustar_and_their_indexes_are_right(built: Path) -> None:
    manifest = read_manifest(built)
    assert len(list(built.glob("train-*.tar"))) > 2
    for split in manifest.splits.values():
        for shard in split.shards:
            path = built / shard.file
            assert read_index(path) == index_tar(path)
            with tarfile.open(path, format=tarfile.USTAR_FORMAT) as tar:
                for entry in tar:
                    assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, 0, "", "")
                    assert not entry.pax_headers and path.read_bytes()[entry.offset + 257 :][:6] == b"ustar\0"
    leftovers = {path.suffix for path in built.iterdir()} - {".tar", ".idx", ".crc"}
    assert leftovers == {".json", ".jsonl"} and not list(built.glob("*.stats.json"))


def test_the_set_is_the_same_whatever_the_number_of_workers(photos: Path, built: Path, tmp_path: Path) -> None:
    records = read_source(photos)
    build_shard_set(records[::-1], tmp_path, BuildOptions(size=32, shard_mb=0.05, seed=3, workers=2))
    assert contents(tmp_path) == contents(built)


def test_a_killed_build_is_completed_by_the_same_command(photos: Path, built: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, source)
    # An image that nobody has written yet: the build waits there, and opening it to write waits for the build.
    picture = sorted(source.glob("*/*.jpg"))[40]
    content = picture.read_bytes()
    picture.unlink()
    os.mkfifo(picture)
    command = f"-m shards build {source} {out} --size 32 --shard-mb 0.05 --seed 3 --workers 1".split()
    with subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, stdout=subprocess.DEVNULL) as build:
        with open(picture, "wb") as writing_end:
            build.send_signal(signal.SIGKILL)
            worker = select.poll()
            worker.register(writing_end, 0)
            assert worker.poll(20_000), "the worker outlives its parent"  # an error on the pipe: no one reads it now
    assert not (out / "manifest.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(finished) < len(list(built.glob("*.tar")))

    picture.unlink()
    picture.write_bytes(content)
    completed = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert f"{len(finished)} of" in completed.stdout
    assert contents(out) == contents(built)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished  # they were not written again


def test_a_worker_that_dies_is_an_error_that_names_its_shard_and_the_build_goes_on_after(
    photos: Path, tmp_path: Path
) -> None:
    image = next(photos.glob("*/*.jpg")).read_bytes()
    good = [Record(f"{i}.jpg", partial(bytes, image), "c", "train") for i in range(20)]
    deadly = Record("20.jpg", partial(os._exit, 9), "c", "test")
    with pytest.raises(WorkError, match=r"died.*test-000000"):
        build_shard_set([*good, deadly], tmp_path, BuildOptions())
    cured = Record("20.jpg", partial(bytes, image), "c", "test")
    assert build_shard_set([*good, cured], tmp_path, BuildOptions()).classes[0].count == 21


def test_what_fails_is_left_out_and_listed_by_reason(photos: Path, tmp_path: Path) -> None:
    whole = next(photos.glob("*/*.jpg")).read_bytes()
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "a").mkdir(parents=True)
    (source / "rare").mkdir()
    for i in range(5):
        (source / f"a/{i}.jpg").write_bytes(whole)
    (source / "a/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "a/page.jpg").write_bytes(b"<html>not found</html>")
    (source / "a/empty.png").write_bytes(b"")
    (source / "a/gone.jpg").symlink_to("nowhere")
    (source / "rare/1.jpg").write_bytes(whole)
    manifest = build_shard_set(read_source(source), out, BuildOptions(min_per_class=2, ratios=(1, 0, 0)))
    assert manifest.left_out == {
        "class has fewer than 2 images": 1,
        "empty file": 1,
        "not an image": 1,
        "missing file": 1,
        "truncated": 1,
    }
    assert [(info.name, info.count) for info in manifest.classes] == [("a", 5)]
    assert list(manifest.splits) == ["train"]
    listed = {}
    for line in (out / "left_out.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert set(entry) == {"name", "reason", "detail", "count"} and entry["detail"]
        listed[entry["name"]] = entry["reason"]
    assert listed == {
        "rare/1.jpg": "class has fewer than 2 images",
        "a/empty.png": "empty file",
        "a/page.jpg": "not an image",
        "a/cut.jpg": "truncated",
        "a/gone.jpg": "missing file",
    }
    kept = members(out, "train")
    assert {sample["jpg"] for sample in kept.values()} == {whole}


def test_a_split_and_a_set_without_any_usable_image_are_left_out_and_refused(photos: Path, tmp_path: Path) -> None:
    image = next(photos.glob("*/*.jpg")).read_bytes()
    good, bad = Record("1", partial(bytes, image), "c", "train"), Record("2", partial(bytes, b"?"), "c", "val")
    assert list(build_shard_set([good, bad], tmp_path / "one", BuildOptions()).splits) == ["train"]
    assert not list((tmp_path / "one").glob("val*"))
    with pytest.raises(WorkError, match="none of the images is usable"):
        build_shard_set([bad], tmp_path / "none", BuildOptions())
    assert not (tmp_path / "none/manifest.json").exists()


def test_tags_are_one_line_beside_every_image_of_a_set_with_text(photos: Path, tmp_path: Path) -> None:
    read = FileContent(str(next(photos.glob("*/*.jpg"))))
    tags = {"1": "red hair, école", "2": "two\nlines  and blanks ", "3": "", "4": None}
    records = [Record(name, read, f"class {name}", "train", text) for name, text in tags.items()]
    assert build_shard_set(records, tmp_path, BuildOptions()).text
    found = {sample["cls"]: sample["txt"].decode() for sample in members(tmp_path, "train").values()}
    assert found == {b"0": "red hair, école", b"1": "two lines and blanks", b"2": "", b"3": ""}


def test_a_complete_set_is_left_as_it_is_and_others_are_not_written_over(
    photos: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_source(photos)
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    assert build_shard_set(records, built, OPTIONS) == read_manifest(built)
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(UseError, match="size 32 there, 48 here"):
        build_shard_set(records, built, BuildOptions(size=48, shard_mb=0.05, seed=3))
    with pytest.raises(UseError, match="the source's images"):
        build_shard_set(records[:-1], built, OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(UseError, match="did not make"):
        build_shard_set(records, tmp_path, OPTIONS)


def test_images_that_have_changed_under_the_same_names_are_read_again_or_refused(tmp_path: Path) -> None:
    """Read again by a build that goes on; refused where the set is complete."""
    image = tmp_path / "0.jpg"
    image.write_bytes(jpeg_bytes(0))
    before = [Record(image.name, FileContent(str(image)), "c", "train")]
    deadly, cured = (Record("1.jpg", read, "c", "test") for read in (partial(os._exit, 9), partial(jpeg_bytes, 1)))
    with pytest.raises(WorkError, match="test-000000"):
        build_shard_set([*before, deadly], tmp_path / "set", BuildOptions())
    assert (tmp_path / "set" / "train-000000.stats.json").exists()

    image.write_bytes(jpeg_bytes(2, width=64))
    build_shard_set([*before, cured], tmp_path / "set", BuildOptions())
    (sample,) = members(tmp_path / "set", "train").values()
    assert sample["jpg"] == jpeg_bytes(2, width=64)
    build_shard_set([*before, cured], tmp_path / "set", BuildOptions())

    image.write_bytes(jpeg_bytes(3, width=80))
    with pytest.raises(
        UseError, match=r"a complete shard set .* \(images have changed since, for example of train-0+\)"
    ):
        build_shard_set([*before, cured], tmp_path / "set", BuildOptions())
    with pytest.raises(UseError, match=r"\(size None there, 48 here\)"):
        build_shard_set([*before, cured], tmp_path / "set", BuildOptions(size=48))
    written = json.loads((tmp_path / "set" / "build.json").read_bytes())
    del written["sizes"]  # as in a set of an older version
    (tmp_path / "set" / "build.json").write_text(json.dumps(written))
    build_shard_set([*before, cured], tmp_path / "set", BuildOptions())


def test_two_builds_at_once_in_one_folder_are_refused(photos: Path, tmp_path: Path) -> None:
    with open(tmp_path / ".build.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UseError, match="another build"):
            build_shard_set(read_source(photos), tmp_path, OPTIONS)


def test_a_folder_that_cannot_be_written_or_is_no_builds_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "left_out.jsonl").mkdir(parents=True)  # what no rename replaces
    command = ["build", str(photos), str(out), "--size", "32", "--workers", "1"]
    assert main(command) == 1
    line = f"error: {out}: cannot be written (Is a directory); run the same command again to resume\n"
    assert capsys.readouterr().err == line
    (out / "left_out.jsonl").rmdir()
    assert main(command) == 0 and "3 of 3 shards are there already" in capsys.readouterr().out
    for content in ("[]", '{"sizes": []}', "?"):
        (out / "build.json").write_text(content)
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(f"error: {out}/build.json: no build wrote it; delete {out} or")


def test_a_lock_that_was_removed_before_it_was_had_locks_nobody_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: int) -> None:
        (tmp_path / ".build.lock").unlink()  # as by a build that ends
        taken(*arguments)

    taken = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UseError, match="another build"):
        build_shard_set(read_source(photos), tmp_path, OPTIONS)


def test_what_a_build_leaves_behind_is_removed_and_no_other_file(photos: Path, tmp_path: Path) -> None:
    others = {"my.stats.json", ".mine.tmp", ".notes.txt.7.tmp", "train.txt"}
    leftovers = {"train-000000.stats.json", ".test-000001.tar.host.7.tmp", ".val-000000.crc.7.tmp", ".build.json.7.tmp"}
    for name in others | leftovers:
        (tmp_path / name).write_text("")
    build_shard_set(read_source(photos), tmp_path, OPTIONS)
    there = {path.name for path in tmp_path.iterdir()}
    assert others <= there and not leftovers & there


def test_a_file_system_without_locks_is_warned_of(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(["build", str(photos), str(tmp_path), "--size", "32", "--workers", "1"]) == 0
    assert f"warning: {tmp_path}: its file system has no locks (Function not implemented)" in capsys.readouterr().err


def test_the_webdataset_library_reads_the_set(built: Path) -> None:
    for split, info in read_manifest(built).splits.items():
        shards = [str(built / shard.file) for shard in info.shards]
        seen = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
        expected = members(built, split)
        assert [sample["__key__"] for sample in seen] == list(expected)
        for sample in seen:
            assert sample["jpg"].shape == (32, 32, 3)
            assert sample["cls"] == int(expected[sample["__key__"]]["cls"])


def test_dalis_own_reader_reads_the_set_with_our_indexes(built: Path) -> None:
    info = read_manifest(built).split("train")
    shards = [str(built / shard.file) for shard in info.shards]

    @pipeline_def(batch_size=info.samples, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        indexes = [path.replace(".tar", ".idx") for path in shards]
        image, label = fn.readers.webdataset(
            paths=shards, index_paths=indexes, ext=["jpg", "cls"], missing_component_behavior="error"
        )
        return fn.decoders.image(image, device="cpu"), label

    images, labels = pipeline().run()
    expected = list(members(built, "train").values())
    assert [bytes(np.asarray(labels.at(i))) for i in range(info.samples)] == [sample["cls"] for sample in expected]
    assert {images.at(i).shape for i in range(info.samples)} == {(32, 32, 3)}


@pytest.mark.skipif(not GROCERY.is_dir(), reason=f"the grocery photos are absent: {GROCERY}")
def test_the_grocery_photos_make_a_complete_set_with_their_own_splits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shards"]
    source = [str(GROCERY / "labels.csv"), str(tmp_path), "--class-column", "coarse", "--size", "64"]
    subprocess.run([*command, "build", *source, "--workers", "2"], cwd=REPOSITORY, check=True)
    manifest = read_manifest(tmp_path)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 2640, "val": 296, "test": 2485}
    assert len(manifest.classes) == 43 and manifest.left_out == {}
    subprocess.run([*command, "verify", str(tmp_path), "--workers", "2"], cwd=REPOSITORY, check=True)
