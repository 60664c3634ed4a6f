"""A sound set's epoch; and a set that nginx serves, directly and through a proxy that injects faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.data import remote as remote_module
from tests.data.damaged_sets import COUNTS, Epoch, run_epoch
from tests.data.remote_servers import NGINX, FaultyProxy, Nginx
from tests.data.remote_sets import TARS
from tests.harness import write_shard_set


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Epoch:
    """The epoch of an undamaged set."""
    return run_epoch(write_shard_set(tmp_path_factory.mktemp("sound") / "set", {"train": COUNTS}))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that nginx serves, with one shard set in it."""
    folder = tmp_path_factory.mktemp("served")
    write_shard_set(folder / "set", {"train": TARS, "val": [9, 8, 0, 6]})
    return folder


@pytest.fixture
def nginx(served: Path, tmp_path: Path) -> Iterator[Nginx]:
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx)")
    state = tmp_path / "nginx"
    state.mkdir()
    server = Nginx(served, state)
    yield server
    server.stop()


@pytest.fixture
def proxy(nginx: Nginx) -> Iterator[FaultyProxy]:
    server = FaultyProxy(nginx.port)
    yield server
    server.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without their long waits, and little patience with a silent server."""
    monkeypatch.setattr(remote_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote_module, "SILENCE_S", 0.5)
