"""Promises of the command `python -m shards`: exit statuses and one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_train.data.manifest import read_manifest
from shards.__main__ import main


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set built by the command."""
    out = tmp_path_factory.mktemp("sets") / "made"
    assert main(["build", str(photos), str(out), "--max-side", "24", "--workers", "1", "--ratios", "0.5,0,0.5"]) == 0
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        "build NOWHERE OUT",
        "build PHOTOS OUT --size 0",
        "build PHOTOS OUT --size big",
        "build PHOTOS OUT --size 32 --max-side 32",
        "build PHOTOS OUT --ratios 0.5,0.5",
        "build PHOTOS OUT --ratios 0.5,0.5,0.5",
        "build PHOTOS OUT --quality 0",
        "build PHOTOS OUT --workers 0",
        "build PHOTOS OUT --workers two",
        "build PHOTOS OUT --format sidecar",
        "build PHOTOS OUT --format danbooru",
        "build PHOTOS OUT --format daf",
        "build PHOTOS OUT --format webdataset",
        "build PHOTOS OUT --class-key label",
        "adopt NOWHERE --split train",
        "adopt PHOTOS --split train",
        "adopt MADE",
        "adopt PHOTOS --ratios 1,1,1",
        "build PHOTOS OUT --min-per-class 1000",
        "build PHOTOS OUT --format csv",
        "build PHOTOS OUT --seed -1",
        "build PHOTOS PHOTOS/ash/000.jpg",
        "build PHOTOS",
        "verify NOWHERE",
        "verify PHOTOS",
        "verify MADE --workers 0",
        "info NOWHERE",
        "info PHOTOS",
        "demo OUT --size 0",
        "nothing",
        "",
    ],
)
def test_wrong_use_exits_2_with_one_line(
    photos: Path, made: Path, tmp_path: Path, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"NOWHERE": tmp_path / "nowhere", "PHOTOS": photos, "OUT": tmp_path / "out", "MADE": made}
    words = arguments.split()
    for name, path in places.items():
        words = [word.replace(name, str(path)) for word in words]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest_exits_1(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, tmp_path / "copy")
    manifest = tmp_path / "copy/manifest.json"
    manifest.write_text(manifest.read_text().replace('"count": 12', '"count": 13'))
    for command in ("verify", "info"):
        assert main([command, str(tmp_path / "copy")]) == 1
        assert "digest" in capsys.readouterr().err


def test_info_says_what_is_in_the_set(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(made)]) == 0
    text = capsys.readouterr().out
    for words in ("66 samples, 4 classes", "largest 21 (douglas fir)", "smallest 12 (ash)", "longer side at most 24"):
        assert words in text
    assert main(["info", str(made), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["digest"] == read_manifest(made).digest
    assert facts["imbalance"] == 21 / 12
    assert set(facts["splits"]) == {"train", "test"} and facts["splits"]["train"]["samples"] == 34


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("build", "adopt", "verify", "info", "demo"):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        assert command in capsys.readouterr().out
