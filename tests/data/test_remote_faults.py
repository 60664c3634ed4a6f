"""Faults of a server, a cache or a set at a URL: what passes is tried again, what stays is named in one line."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dist_train.data import cache as cache_module
from dist_train.data import remote as remote_module
from dist_train.data.cache import ShardCache
from dist_train.data.manifest import read_manifest
from dist_train.errors import WorkError
from shards.__main__ import main as shards_main
from tests.data.remote_servers import FaultyProxy, Nginx
from tests.data.remote_sets import SHARD, assert_whole, config_for, train_loader
from tests.harness import REPOSITORY


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


def test_a_full_disk_is_found_before_the_download_and_named(
    proxy: FaultyProxy, mount_disk: Callable[[str], Path]
) -> None:
    shard = read_manifest(f"{proxy.url}/set").split("train").shards[1]
    cache = mount_disk("24k") / "cache"
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
