"""One run that several files look at. A test that changes a run copies it first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.harness import IFA, train, write_shard_set

SPLITS = {"train": [37, 50, 9], "val": [11, 2], "test": [10]}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set with tags; a file that needs another has its own."""
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", SPLITS, baked=20, text=True)


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run in one process: 8 steps with an IFA head, evaluated at 4 and 8."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(shards, run, **IFA) == 0
    return run


@pytest.fixture
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves a job that would train for hours: what names the test's folder is killed."""
    yield
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(tmp_path) in " ".join(process.cmdline()):
                process.kill()
