"""Shard sets at URLs: as good as local ones, one download each, within the cache's bound, in spite of every fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from dist_train.data import remote as remote_module
from dist_train.data.cache import ShardCache
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.place import Place
from shards.__main__ import main as shards_main
from tests.data.remote_servers import FaultyProxy, Nginx
from tests.data.remote_sets import SHARD, TARS, assert_same, assert_whole, config_for, gigabytes, train_loader
from tests.harness import REPOSITORY, free_port, is_listening, wait_for, write_shard_set


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_training_from_a_url_has_the_order_and_pixels_of_a_local_set(
    nginx: Nginx, served: Path, tmp_path: Path, rank: int, world_size: int
) -> None:
    remote = config_for(f"http://127.0.0.1:{nginx.port}/set", tmp_path / "cache")
    local = config_for(served / "set", tmp_path)
    taken = [list(islice(train_loader(config, rank, world_size), 40)) for config in (local, remote)]  # two epochs
    assert_same(*taken)
    assert_whole(tmp_path / "cache")
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "read-ahead"])


def test_evaluation_of_a_url_has_the_order_and_pixels_of_a_local_set(
    nginx: Nginx, served: Path, tmp_path: Path
) -> None:
    remote = config_for(f"http://127.0.0.1:{nginx.port}/set", tmp_path / "cache")
    local = config_for(served / "set", tmp_path)
    for rank in range(2):
        loaders = [
            EvalLoader(config, read_manifest(config.shards), "val", Place(rank, 2, 2), batch_size=5)
            for config in (local, remote)
        ]
        assert_same(*[list(loader) for loader in loaders])


def test_shards_come_ahead_of_their_use(nginx: Nginx, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    batches = iter(train_loader(config_for(f"http://127.0.0.1:{nginx.port}/set", cache)))
    next(batches)
    wait_for(lambda: len(list(cache.glob("*.tar"))) == len(TARS))


@pytest.mark.parametrize("remote", [False, True])
def test_shards_left_behind_are_unmapped(nginx: Nginx, served: Path, tmp_path: Path, remote: bool) -> None:
    root = write_shard_set(served / "left", {"train": [6] * 40})
    config = config_for(f"http://127.0.0.1:{nginx.port}/left" if remote else root, tmp_path / "cache")
    batches = iter(train_loader(config))
    most = 0
    for _ in range(40):
        next(batches)
        folder = tmp_path / "cache" if remote else root
        most = max(most, sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines()))
    # Two windows of two streams, each over at most three shards, and what batches under way still hold.
    assert 2 <= most <= 16


def test_two_processes_download_each_shard_once(nginx: Nginx, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{nginx.port}/set"
    processes = [start_reader(url, tmp_path / "cache", rank, 2) for rank in range(2)]
    samples = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert Counter(samples[0] + samples[1]) == Counter(range(sum(TARS)))
    requests = nginx.requests()
    assert {f"/set/train-{k:06d}.tar" for k in range(len(TARS))} <= requests.keys()
    assert {count for path, count in requests.items() if path.endswith(".tar")} == {1}
    assert_whole(tmp_path / "cache", len(TARS))


READER = """
import json, sys
from pathlib import Path
from dist_train.data.manifest import read_manifest
from tests.data.remote_sets import config_for, train_loader
from tests.harness import REPOSITORY, free_port, is_listening, wait_for, write_shard_set
url, cache, rank, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
batches = iter(train_loader(config_for(url, cache), rank, world_size))
print(json.dumps([sample for _ in range(19) for sample in next(batches).samples.tolist()]))
"""


def start_reader(url: str, cache: Path, rank: int = 0, world_size: int = 1) -> subprocess.Popen[str]:
    """A process that reads its share of one epoch (19 batches of 6) and prints its samples."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, url, str(cache), str(rank), str(world_size)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def test_after_a_kill_in_mid_download_the_next_run_completes_and_nothing_damaged_stays(
    proxy: FaultyProxy, served: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for k in range(len(TARS)):
        proxy.faults[f"/set/train-{k:06d}.tar"] = ["held"]
    reader = start_reader(f"{proxy.url}/set", cache)
    assert proxy.half_sent.wait(60)
    wait_for(lambda: any(path.stat().st_size for path in cache.glob("*.part")))
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate()
    assert list(cache.glob("*.part"))
    proxy.release.set()
    taken = list(islice(train_loader(config_for(f"{proxy.url}/set", cache)), 19))
    assert_same(taken, list(islice(train_loader(config_for(served / "set", tmp_path)), 19)))
    assert_whole(cache, len(TARS))


def test_a_cache_smaller_than_the_set_never_exceeds_its_bound_and_two_ranks_see_every_sample_once(
    nginx: Nginx, served: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    write_shard_set(served / "many", {"train": [6] * 40})
    sizes = [shard.bytes for shard in read_manifest(served / "many").split("train").shards]
    manifest = read_manifest(f"http://127.0.0.1:{nginx.port}/many")
    limit = smallest_cache(f"http://127.0.0.1:{nginx.port}/many", cache, manifest)
    assert limit < 0.6 * sum(sizes)
    config = config_for(f"http://127.0.0.1:{nginx.port}/many", cache, cache_gb=gigabytes(limit))
    loaders = [iter(train_loader(config, rank, 2, manifest)) for rank in range(2)]
    largest, watching = [0], threading.Event()

    def watch() -> None:
        while not watching.is_set():
            with ShardCache(cache, limit)._locked():  # between two changes: a removal and what it makes room for
                largest[0] = max(largest[0], sum(path.stat().st_size for path in cache.glob("*.*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    # In turns, as collectives make them: a rank that waits holds up the other.
    seen = Counter(sample for _ in range(80) for loader in loaders for sample in next(loader).samples.tolist())
    watching.set()
    watcher.join()
    assert seen == Counter({sample: 2 for sample in range(240)})
    assert max(sizes) < largest[0] <= limit
    assert max(nginx.requests().values()) > 1, "nothing was ever removed"
    del loaders
    assert_whole(cache)


def smallest_cache(url: str, cache: Path, manifest: Manifest) -> int:
    """The limit in bytes that the refusal of a smaller cache names."""
    with pytest.raises(UseError, match=r"data\.cache_gb .* at least") as refused:
        train_loader(config_for(url, cache, cache_gb=1e-6), 0, 2, manifest)
    return int(float(str(refused.value).split("at least ")[1].split(" ")[0]) * 10**9)


def test_shell_characters_in_a_url_are_only_characters(nginx: Nginx, served: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a b;touch x&touch y|$(touch z)`touch w`'\""
    write_shard_set(served / name, {"train": [12, 30]})
    config = config_for(f"http://127.0.0.1:{nginx.port}/{name}", tmp_path / "cache")
    assert_same(
        *[list(islice(train_loader(replace(config, shards=root)), 7)) for root in (str(served / name), config.shards)]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"nginx", "cache"}


def test_info_of_a_url(nginx: Nginx, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_main(["info", f"http://127.0.0.1:{nginx.port}/set", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["samples"] == sum(TARS)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket on a real S3 server; yields its URL."""
    pytest.importorskip("moto", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with open(tmp_path / "moto.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    wait_for(lambda: is_listening(port), "the S3 server", 60)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    server.terminate()
    server.wait()
    s3fs.S3FileSystem.clear_instance_cache()


def test_training_from_s3_has_the_order_and_pixels_of_a_local_set(
    s3: str, served: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(served / "set"), f"{s3}/set", recursive=True)
    monkeypatch.setattr(remote_module, "CHUNK", 10_000)  # several ranges a shard
    remote = config_for(f"{s3}/set", tmp_path / "cache")
    local = config_for(served / "set", tmp_path)
    assert_same(*[list(islice(train_loader(config), 40)) for config in (local, remote)])
    assert_whole(tmp_path / "cache", len(TARS))

    manifest = read_manifest(f"{s3}/set")
    s3fs.S3FileSystem().rm(f"{s3}/set/{SHARD}")
    started = time.monotonic()
    with pytest.raises(WorkError, match=f"{s3}/set/{SHARD}"):
        ShardCache(tmp_path / "another", 10**9).open(f"{s3}/set/{SHARD}", manifest.split("train").shards[1])
    assert time.monotonic() - started < 5
