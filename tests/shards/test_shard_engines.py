"""Promises of the workers: failing shards are tried again, a Ray cluster does the same work, kills lose nothing."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from dist_train.errors import UseError, WorkError
from shards.build import build_shard_set
from shards.plan import BuildOptions
from shards.records import FileContent, Record
from shards.sources import read_source
from shards.workers import run_jobs
from tests.harness import jpeg_bytes

REPOSITORY = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two CPUs."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(params=[2, "ray"], ids=["processes", "ray"])
def workers(request: pytest.FixtureRequest) -> int | str:
    """Each kind of workers."""
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return request.param


def shell(script: str, *arguments: Path) -> partial[bytes]:
    """A `read` that any process can be given: what a shell script prints."""
    return partial(subprocess.check_output, ["sh", "-c", script, "sh", *map(str, arguments)])


def test_a_shard_that_fails_is_tried_again_and_only_that_one(tmp_path: Path, workers: int | str) -> None:
    """Its first try raises, at its second the worker is killed, the third succeeds."""
    fails_twice = """
        echo read >> "$1"
        case $(wc -l < "$1") in 1) exit 1;; 2) kill -9 $PPID;; esac
        cat "$2"
    """
    undisturbed, records = [], []
    for number in range(24):
        picture, log = tmp_path / f"{number}.jpg", tmp_path / f"{number}.log"
        picture.write_bytes(jpeg_bytes(number))
        read = shell(fails_twice if number == 9 else 'echo read >> "$1"; cat "$2"', log, picture)
        records.append(Record(picture.name, read, f"class {number % 2}", tags="a tag"))
        undisturbed.append(Record(picture.name, FileContent(str(picture)), f"class {number % 2}", tags="a tag"))
    # Three samples a shard, by the size that a record of unknown size is taken for.
    out, expected = tmp_path / "out", tmp_path / "expected"
    build_shard_set(records, out, BuildOptions(size=40, shard_mb=0.014, workers=workers))
    build_shard_set(undisturbed, expected, BuildOptions(size=40, shard_mb=0.014))
    assert len(list(out.glob("*.tar"))) > 6
    # But for build.json, which has the sizes of files: here the records have none.
    assert {**contents(out), "build.json": b""} == {**contents(expected), "build.json": b""}
    tries = {number: len((tmp_path / f"{number}.log").read_text().split()) for number in range(24)}
    again = {number for number, times in tries.items() if times > 1}
    assert tries[9] == 3 and len(again) <= 3  # the others are of the same shard


def test_a_shard_that_fails_for_good_is_named_when_all_others_are_finished(
    tmp_path: Path, workers: int | str, capfd: pytest.CaptureFixture[str]
) -> None:
    good = [Record(f"{i:02d}.jpg", partial(bytes, jpeg_bytes(i)), "c", "train") for i in range(12)]
    deadly = Record("12.jpg", partial(os._exit, 9), "c", "val")
    options = BuildOptions(size=40, shard_mb=0.014, workers=workers)
    with pytest.raises(WorkError, match=r"died.*val-000000, tried 3 times"):
        build_shard_set([*good, deadly], tmp_path, options)
    assert capfd.readouterr().err.count("val-000000 failed") == 2
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert sorted(finished) == [f"train-{number:06d}.tar" for number in range(4)]
    assert not (tmp_path / "manifest.json").exists()
    cured = Record("12.jpg", partial(bytes, jpeg_bytes(12)), "c", "val")
    assert build_shard_set([*good, cured], tmp_path, options).split("val").samples == 1
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == finished


def test_a_bug_keeps_its_own_exception_after_the_other_jobs() -> None:
    results = []
    with pytest.raises(ValueError, match="invalid literal") as raised:
        for name, result in run_jobs(int, {"bad": ("x",), "one": ("1",), "two": ("2",)}, 1, 0, "test"):
            results.append((name, result))
    assert results == [("one", 1), ("two", 2)]
    assert raised.value.__notes__ == ["while on bad"]
    with pytest.raises(UseError, match="at least 1, or ray, not two"):
        next(run_jobs(int, {}, "two", 0, "test"))


def test_a_cluster_named_by_its_address_builds_the_same_bytes(photos: Path, tmp_path: Path, cluster: str) -> None:
    build_shard_set(read_source(photos), tmp_path / "here", BuildOptions(size=32, shard_mb=0.05))
    # By a path from the current folder, which is not that of the cluster's processes.
    command = f"-m shards build {photos} there --size 32 --shard-mb 0.05 --workers ray".split()
    environment = {**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_an_address_where_no_cluster_listens_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(WorkError, match=r"RAY_ADDRESS 127.0.0.1:\d+: no Ray cluster"):
            next(run_jobs(int, {"one": ("1",)}, "ray", 0, "test"))


def test_builds_killed_at_random_moments_end_in_the_undisturbed_bytes(tmp_path: Path) -> None:
    source, out, expected = tmp_path / "photos", tmp_path / "out", tmp_path / "expected"
    for number in range(240):
        (source / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        (source / f"{number % 3}/{number}.jpg").write_bytes(jpeg_bytes(number, 640, 480))
        (source / f"{number % 3}/{number}.txt").write_text(f"tag {number}")
    build_shard_set(read_source(source), expected, BuildOptions(size=64, shard_mb=0.06))
    command = f"-m shards build {source} {out} --size 64 --shard-mb 0.06 --workers 2".split()
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    shards_there = []  # at each kill
    for _ in range(6):
        target = len(list(out.glob("*.tar"))) + moments.randrange(4)
        with subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, stdout=subprocess.DEVNULL) as build:
            while build.poll() is None and len(list(out.glob("*.tar"))) < target:
                with suppress(subprocess.TimeoutExpired):
                    build.wait(timeout=0.01)
            with suppress(subprocess.TimeoutExpired):
                build.wait(timeout=moments.uniform(0, 0.2))
            build.send_signal(signal.SIGKILL)
        shards_there.append(len(list(out.glob("*.tar"))))
    all_shards = len(list(expected.glob("*.tar")))
    assert any(0 < there < all_shards for there in shards_there), f"seed {seed}: {shards_there} of {all_shards}"
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    assert contents(out) == contents(expected), f"seed {seed}: {shards_there}"
