"""Shard sets at gs://, against an emulator of Google Cloud Storage: as good as a local one, and what fails is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dist_train.data import remote as remote_module
from dist_train.data.cache import ShardCache
from dist_train.data.manifest import read_manifest
from dist_train.errors import WorkError
from shards.__main__ import main as shards_main
from tests.data.remote_sets import assert_same, assert_whole, config_for, train_loader
from tests.harness import free_port, is_listening, wait_for, write_shard_set

gcsfs: Any = pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e '.[gs]'")
pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")

SHARD = "train-000001.tar"
_EMULATOR = "import sys; from gcp_storage_emulator.__main__ import main; main(sys.argv[1:])"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket of the emulator; yields its URL."""
    port = free_port()
    # What the library reads: nothing of it is in a recipe.
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    command = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket"]
    with open(tmp_path / "emulator.log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-c", _EMULATOR, *command], stdout=log, stderr=log, env=os.environ)
    wait_for(lambda: is_listening(port), "the emulator", 60)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "gs://bucket"
    server.terminate()
    server.wait()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_training_from_gs_has_the_order_and_pixels_of_a_local_set(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote_module, "CHUNK", 10_000)  # several ranges a shard
    local = write_shard_set(tmp_path / "set", {"train": [12, 30, 7], "val": [9]})
    files = gcsfs.GCSFileSystem()
    for path in local.iterdir():
        files.pipe_file(f"bucket/set/{path.name}", path.read_bytes())

    configs = config_for(local, tmp_path), config_for(f"{bucket}/set", tmp_path / "cache")
    assert_same(*[list(islice(train_loader(config), 20)) for config in configs])
    assert_whole(tmp_path / "cache", 3)
    assert shards_main(["info", f"{bucket}/set"]) == 0
    assert read_manifest(local).digest in capsys.readouterr().out

    manifest = read_manifest(f"{bucket}/set")
    files.rm(f"bucket/set/{SHARD}")
    started = time.monotonic()
    with pytest.raises(WorkError, match=f"{bucket}/set/{SHARD}"):
        ShardCache(tmp_path / "another", 10**9).open(f"{bucket}/set/{SHARD}", manifest.split("train").shards[1])
    assert time.monotonic() - started < 5, "a file that is not there was asked for again and again"


def test_a_set_that_is_not_there_is_named_in_one_line(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_main(["info", f"{bucket}/nothing"]) == 2
    message = capsys.readouterr().err.strip()
    assert f"{bucket}/nothing" in message and "\n" not in message
