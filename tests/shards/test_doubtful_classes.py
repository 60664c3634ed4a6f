"""No class of a source appears, vanishes or is confused unsaid: counts, names, classes that cannot be learnt."""

from __future__ import annotations

import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.data.manifest import read_manifest
from shards.__main__ import main
from shards.plan import BuildOptions, make_plan
from shards.sources import read_source
from shards.sources.lists import read_lists
from tests.harness import jpeg_bytes, touch


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """A source of classes with so many good images, and so many that are none."""

    def make(**sizes: tuple[int, int]) -> Path:
        number = 0
        for name, (good, bad) in sizes.items():
            (tmp_path / "source" / name).mkdir(parents=True)
            for i in range(good + bad):
                data = jpeg_bytes(number) if i < good else b"<html>"
                (tmp_path / "source" / name / f"{i}.jpg").write_bytes(data)
                number += 1
        return tmp_path / "source"

    return make


def samples_of(folder: Path) -> Counter[tuple[str, bytes]]:
    """Split and class of each sample, its id looked up, and that its key is as the others'."""
    manifest = read_manifest(folder)
    found: Counter[tuple[str, bytes]] = Counter()
    for split, info in manifest.splits.items():
        for shard in info.shards:
            with tarfile.open(folder / shard.file) as tar:
                for entry in tar:
                    if entry.name.endswith(".cls"):
                        found[split, manifest.class_names[int(tar.extractfile(entry).read())]] += 1
    return found


def test_classes_are_counted_after_decoding(folder_of: Callable[..., Path], tmp_path: Path, capsys: object) -> None:
    source = folder_of(ash=(6, 0), birch=(3, 2), cedar=(4, 1), dead=(0, 5), elm=(2, 0))
    options = ["--min-per-class", "4", "--workers", "1", "--ratios", "0.5,0,0.5", "--shard-mb", "0.02"]
    assert main(["build", str(source), str(tmp_path / "set"), *options]) == 0
    manifest = read_manifest(tmp_path / "set")
    assert [(info.name, info.count) for info in manifest.classes] == [("ash", 6), ("cedar", 4)]
    assert manifest.left_out == {"class has fewer than 4 images": 3 + 2, "not an image": 2 + 1 + 5}
    assert "birch (3), dead (0)" in capsys.readouterr().err
    assert sum(samples_of(tmp_path / "set").values()) == 10
    assert {
        name: sum(n for (_, c), n in samples_of(tmp_path / "set").items() if c == name) for name in ("ash", "cedar")
    } == {
        "ash": 6,
        "cedar": 4,
    }
    assert main(["verify", str(tmp_path / "set"), "--workers", "1"]) == 0


def test_a_build_that_drops_classes_can_be_interrupted(
    folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cut = folder_of(ash=(6, 0), birch=(3, 2), cedar=(6, 0)), tmp_path / "cut"
    options = ["--min-per-class", "4", "--workers", "1", "--shard-mb", "0.02"]
    assert main(["build", str(source), str(tmp_path / "whole"), *options]) == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for step in ("_drop_small_classes", "write_manifest"):  # it ends before this
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(f"shards.build.{step}", lambda *_: 1 / 0)
            main(["build", str(source), str(cut), *options])
    finished = sorted(cut.glob("*.stats.json"))
    assert len(finished) > 2
    finished[0].unlink()  # it ended while this one was written again
    assert main(["build", str(source), str(cut), *options]) == 0
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == expected


def test_a_class_without_training_images_is_named_and_the_set_remembers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path, "s/train/cat/x", "s/test/cat/x", "s/test/dog/x", "s/train/emu/x")
    for i, name in enumerate(("train/cat", "test/cat", "test/dog")):
        (tmp_path / "s" / name / "1.jpg").write_bytes(jpeg_bytes(i))
    (tmp_path / "s/train/emu/1.jpg").write_bytes(b"no image")
    (tmp_path / "s/test/emu").mkdir()
    (tmp_path / "s/test/emu/2.jpg").write_bytes(jpeg_bytes(9))
    assert main(["build", str(tmp_path / "s"), str(tmp_path / "set"), "--workers", "1"]) == 0
    assert "2 of 3 classes have no training image and cannot be learnt: dog, emu" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "set")
    assert manifest.untrained == (1, 2) and manifest.document()["untrained"] == (1, 2)
    # Nothing is said, and the digest is that of a manifest without the word, where all classes can be learnt.
    assert "untrained" not in replace(manifest, untrained=()).document()
    assert main(["info", str(tmp_path / "set")]) == 0
    assert "2 classes have no training image" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "set"), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    "name", ["全角　空白", "می‌خواهم", "no\u00a0break", "👩‍🔬", "\ue000 private", "soft\u00adhyphen"]
)
def test_class_names_of_any_script_are_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / "s" / name).mkdir(parents=True)
    (tmp_path / "s" / name / "1.jpg").write_bytes(jpeg_bytes(0))
    assert main(["build", str(tmp_path / "s"), str(tmp_path / "set"), "--workers", "1"]) == 0
    assert read_manifest(tmp_path / "set").class_names == [name]


@pytest.mark.parametrize("name", ["a\tb", "a\x85b", "a\u2028b", "evil\u202egpj", "a\u2066b", "\u200b", "\u3000"])
def test_class_names_that_would_do_harm_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}/1.jpg", "b/2.jpg")
    assert main(["build", str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}-set"), "--workers", "1"]) == 2


def test_classes_whose_names_look_alike_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(["caf\u00e9", "cafe\u0301", "tea", "Tea"]):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "1.jpg").write_bytes(jpeg_bytes(i))
    assert main(["build", str(tmp_path / "s"), str(tmp_path / "set"), "--workers", "1"]) == 0
    error = capsys.readouterr().err
    assert "look alike" in error and "'caf\\xe9'" in error and "'tea'" in error


def test_the_work_for_class_folders_grows_as_their_number(tmp_path: Path) -> None:
    """Counted in calls of functions, twice as many for twice the classes."""

    def calls(classes: int) -> int:
        root = tmp_path / str(classes)
        touch(root / "data", *(f"c{i}/1.jpg" for i in range(classes)))
        (root / "classid_classname.csv").write_text("".join(f"{i},c{i}\n" for i in range(classes)))
        (root / "train.csv").write_text("".join(f"{i},c{i}/1.jpg\n" for i in range(classes)))
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1

        sys.setprofile(count)
        try:
            make_plan(read_source(root / "data"), BuildOptions())
            read_lists(root, "moeimouto")
        finally:
            sys.setprofile(None)
        return seen

    calls(100)  # what is done once
    assert calls(800) < 2.2 * calls(400)
