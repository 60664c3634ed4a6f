"""Shard sets at URLs: as good as local ones, one download each, within the cache's bound, in spite of every fault."""

from __future__ import annotations

import hashlib
import json
import mmap
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

import numpy as np
import pytest

from dist_train.config import DataConfig
from dist_train.data import cache as cache_module
from dist_train.data import remote as remote_module
from dist_train.data.cache import ShardCache
from dist_train.data.loader import Batch, EvalLoader, TrainLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.place import Place
from shards.__main__ import main as shards_main
from tests.conftest import REPOSITORY, write_shard_set
from tests.data.remote_servers import NGINX, FaultyProxy, Nginx, free_port, is_listening, tmpfs, wait_until

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx)")
pytestmark = needs_nginx

TARS = [12, 30, 7, 25, 18, 22]  # 114 samples
SHARD = "train-000001.tar"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that nginx serves, with one shard set in it."""
    folder = tmp_path_factory.mktemp("served")
    write_shard_set(folder / "set", {"train": TARS, "val": [9, 8, 0, 6]})
    return folder


@pytest.fixture
def nginx(served: Path, tmp_path: Path) -> Iterator[Nginx]:
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


def config_for(shards: object, cache: Path, **changes: object) -> DataConfig:
    config = DataConfig(
        shards=str(shards), cache=str(cache), image_size=16, crop_margin=4, threads=1, shuffle_window=8, streams=2
    )
    return replace(config, **changes)


def train_loader(
    config: DataConfig, rank: int = 0, world_size: int = 1, manifest: Manifest | None = None
) -> TrainLoader:
    return TrainLoader(
        config,
        manifest or read_manifest(config.shards),
        Place(rank, world_size, world_size),
        batch_size=6,
        micro_batch=6 // world_size,
        seed=3,
    )


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.samples.tolist() == b.samples.tolist() and a.labels.tolist() == b.labels.tolist()
        assert (a.images.numpy() == b.images.numpy()).all()


def assert_whole(cache: Path, shards: int | None = None) -> None:
    """Every shard in the cache is what its name says, and nothing half-done is there."""
    tars = list(cache.glob("*.tar"))
    assert shards is None or len(tars) == shards
    for tar in tars:
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == tar.stem
    assert not [path for path in cache.iterdir() if path.suffix not in (".tar", ".idx", ".lock")]


def gigabytes(size: int) -> float:
    return size / 10**9


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_training_from_a_url_has_the_order_and_pixels_of_a_local_set(
    nginx: Nginx, served: Path, tmp_path: Path, rank: int, world_size: int
) -> None:
    remote = config_for(f"http://127.0.0.1:{nginx.port}/set", tmp_path / "cache")
    local = config_for(served / "set", tmp_path)
    taken = [list(islice(train_loader(config, rank, world_size), 40)) for config in (local, remote)]  # two epochs
    assert_same(*taken)
    assert_whole(tmp_path / "cache")
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "read-ahead"])


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
    wait_until(lambda: len(list(cache.glob("*.tar"))) == len(TARS))


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
from tests.data.test_remote import config_for, train_loader
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
    wait_until(lambda: any(path.stat().st_size for path in cache.glob("*.part")))
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


def test_a_shard_with_views_in_use_is_not_removed_and_makes_room_afterwards(
    nginx: Nginx, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE_S", 0.1)
    url = f"http://127.0.0.1:{nginx.port}/set"
    one, other = read_manifest(url).split("train").shards[1:4:2]
    cache = ShardCache(tmp_path / "cache", one.bytes + other.bytes // 2)
    cache.open(f"{url}/{one.file}", one).close()
    with cache.open(f"{url}/{one.file}", one) as file:
        view = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[1000:2000]
    with pytest.raises(WorkError, match=r"data\.cache_gb"):
        cache.open(f"{url}/{other.file}", other)
    assert cache.path(one).exists() and view.size
    del view
    cache.open(f"{url}/{other.file}", other).close()
    assert not cache.path(one).exists() and cache.path(other).exists()


@pytest.mark.parametrize(
    "faults", [[503, 500], [429], ["truncated"], ["short", "truncated"], ["corrupt"], ["silent", 502]], ids=str
)
def test_a_fault_that_passes_is_tried_again(
    proxy: FaultyProxy, served: Path, tmp_path: Path, quick: None, faults: list[str | int]
) -> None:
    proxy.faults["/set/manifest.json"] = list(faults[:1]) if isinstance(faults[0], int) else []
    proxy.faults[f"/set/{SHARD}"] = list(faults)
    shard = read_manifest(f"{proxy.url}/set").split("train").shards[1]
    with ShardCache(tmp_path / "cache", 10**9).open(f"{proxy.url}/set/{SHARD}", shard) as file:
        assert file.read() == (served / "set" / SHARD).read_bytes()
    assert proxy.requests[f"/set/{SHARD}"] == len(faults) + 1
    assert_whole(tmp_path / "cache", 1)


@pytest.mark.parametrize("fault", ["corrupt", "truncated", 500])
def test_a_shard_that_stays_wrong_ends_the_run_with_its_url(
    proxy: FaultyProxy, tmp_path: Path, quick: None, fault: str | int
) -> None:
    proxy.always[f"/set/{SHARD}"] = fault
    with pytest.raises(WorkError, match=f"{proxy.url}/set/{SHARD}: cannot be read, {remote_module.ATTEMPTS} times"):
        list(islice(train_loader(config_for(f"{proxy.url}/set", tmp_path / "cache")), 19))
    assert_whole(tmp_path / "cache")


@pytest.mark.parametrize("status", [403, 404])
def test_a_shard_that_is_refused_ends_the_run_at_once_with_its_url(
    proxy: FaultyProxy, tmp_path: Path, status: int
) -> None:
    proxy.always[f"/set/{SHARD}"] = status
    shard = read_manifest(f"{proxy.url}/set").split("train").shards[1]
    with pytest.raises(WorkError, match=f"{proxy.url}/set/{SHARD}: "):
        ShardCache(tmp_path / "cache", 10**9).open(f"{proxy.url}/set/{SHARD}", shard)
    assert proxy.requests[f"/set/{SHARD}"] == 1
    assert_whole(tmp_path / "cache", 0)


def test_a_full_disk_is_found_before_the_download_and_named(nginx: Nginx, proxy: FaultyProxy, tmp_path: Path) -> None:
    shard = read_manifest(f"{proxy.url}/set").split("train").shards[1]
    with tmpfs(tmp_path / "disk", "24k") as mounted:
        if not mounted:
            pytest.skip("mounting a small tmpfs is not allowed here")
        cache = tmp_path / "disk" / "cache"
        with pytest.raises(WorkError, match=rf"{cache}: no room for a shard of {shard.bytes:,} bytes, [\d,]+ are free"):
            ShardCache(cache, 10**9).open(f"{proxy.url}/set/{SHARD}", shard)
        assert not proxy.requests[f"/set/{SHARD}"]
        assert_whole(cache, 0)


def test_an_entry_of_the_wrong_size_is_downloaded_again(nginx: Nginx, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{nginx.port}/set"
    shard = read_manifest(url).split("train").shards[1]
    cache = ShardCache(tmp_path / "cache", 10**9)
    cache.path(shard).write_bytes(b"cut short")
    cache.open(f"{url}/{SHARD}", shard).close()
    assert_whole(tmp_path / "cache", 1)


def test_what_a_killed_process_left_makes_room(nginx: Nginx, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{nginx.port}/set"
    shard = read_manifest(url).split("train").shards[1]
    cache = ShardCache(tmp_path / "cache", shard.bytes + 10_000)
    for name in (f"{'1' * 64}.part", f"{'2' * 64}.idx", f".{'3' * 64}.idx.77.tmp"):
        (tmp_path / "cache" / name).write_bytes(bytes(9_000))
    (tmp_path / "cache" / "notes.part").write_text("not ours")
    cache.open(f"{url}/{SHARD}", shard).close()
    names = {f"{shard.sha256}.tar", f"{shard.sha256}.idx", "cache.lock", "notes.part"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == names


def test_a_signature_stays_at_the_end_of_a_url() -> None:
    url = remote_module.file_url("https://host/a%20set/?signature=x%2Fy", "odd name#1.tar")
    assert url == "https://host/a%20set/odd%20name%231.tar?signature=x%2Fy"
    assert remote_module.file_url("s3://bucket/set/", "odd name.tar") == "s3://bucket/set/odd name.tar"


def test_a_hash_from_the_manifest_cannot_name_a_file_elsewhere(nginx: Nginx, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{nginx.port}/set"
    shard = replace(read_manifest(url).split("train").shards[1], sha256="../../outside")
    with pytest.raises(WorkError, match="SHA-256"):
        ShardCache(tmp_path / "a" / "cache", 10**9).open(f"{url}/{SHARD}", shard)
    assert not list(tmp_path.glob("**/outside*"))


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


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_url_that_cannot_be_used_is_refused_in_one_line(
    nginx: Nginx, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    url = f"http://127.0.0.1:{nginx.port}/nothing" if command == "verify" else "bogus://bucket/set"
    for one in (url, f"http://127.0.0.1:{nginx.port}/nothing"):
        assert shards_main([command, one]) == 2
        message = capsys.readouterr().err.strip()
        assert one in message and "\n" not in message


def test_s3_without_its_extra_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None; from shards.__main__ import main; sys.exit(main(['info', 's3://b/s']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and "dist-train[s3]" in done.stderr


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
    wait_until(lambda: is_listening(port), 60)
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
