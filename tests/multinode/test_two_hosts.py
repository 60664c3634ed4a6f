"""Training over two hosts by real ssh: it trains, stops, goes on, and ends by itself when a host or rank is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import (
    REPOSITORY,
    environment,
    logged_steps,
    newest_weights,
    read_summary,
    same,
    steps_done,
    wait_for,
    write_shard_set,
)
from tests.multinode.two_hosts import Host, two_hosts, why_not
from tests.train.forked_ranks import train_on

pytestmark = [pytest.mark.launch, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

STEPS, TIMEOUT_S = 60, 10
ENVIRONMENT = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin")
arguments = partial(harness.arguments, optim__lr=0.01, train__epochs=STEPS // 4, train__timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(folder) as both:
        yield both


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    return write_shard_set(folder / "set", {"train": [30, 18], "val": [12]}, baked=20)


def multinode(folder: Path, options: list[str]) -> list[str]:
    return [str(REPOSITORY / "launch" / "multinode.sh"), str(folder / "hostfile"), *options]


def start(host: Host, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        return subprocess.Popen(host.command(*command), env=ENVIRONMENT, stdout=output, stderr=output)


def read_steps(run: Path) -> dict[int, dict[str, Any]]:
    return {entry["step"]: entry for entry in logged_steps(run)}


def last_evaluation(run: Path) -> dict[str, Any]:
    return read_summary(run)["evaluations"]["val"]


def nothing_left(hosts: tuple[Host, Host]) -> bool:
    return not any(host.processes("train.py") for host in hosts)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, shards: Path) -> Path:
    """A run of two ranks of this machine, from start to end."""
    train_on(2, arguments(shards, folder / "undisturbed", train__timeout_s=300), folder)
    return folder / "undisturbed"


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """One rank on each host came to the same samples and losses at every step, same accuracy, same weights."""
    assert [line.split(":")[0] for line in read_summary(run)["hosts"]] == ["node1", "node2"]
    steps, expected = read_steps(run), read_steps(undisturbed)
    assert list(steps) == list(expected) == list(range(1, STEPS + 1))
    for step, line in expected.items():
        assert (steps[step]["samples"], steps[step]["loss"]) == (line["samples"], line["loss"]), step
    assert last_evaluation(run) == last_evaluation(undisturbed)
    assert same(newest_weights(run), newest_weights(undisturbed))


@pytest.mark.slow  # tests/multinode/test_slurm.py has a signal and a resumption of ranks on two hosts, too
def test_a_run_stopped_by_a_signal_goes_on_over_both_hosts(
    folder: Path, hosts: tuple[Host, Host], shards: Path, undisturbed: Path
) -> None:
    run, log = folder / "stopped", folder / "stopped.log"
    first = start(hosts[0], multinode(folder, arguments(shards, run, train__timeout_s=300)), log)
    wait_for(lambda: steps_done(run) >= 2, "step 2", 120)
    hosts[1].processes("launch/train.py --local_rank")[0].send_signal(signal.SIGUSR1)
    assert first.wait(120) == 0, log.read_text()[-5000:]
    assert 2 <= steps_done(run) < STEPS and nothing_left(hosts)
    again = [*arguments(shards, run, train__timeout_s=300), "--resume", "auto"]
    assert start(hosts[0], multinode(folder, again), log).wait(240) == 0, log.read_text()[-5000:]
    assert_same_end(run, undisturbed)


def supervised(folder: Path, shards: Path, run: Path) -> list[str]:
    supervisor = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--backoff=1", "--"]
    return [*supervisor, *multinode(folder, arguments(shards, run))]


def lines_of_the_end(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "error (noticed by" in line]


def test_lost_ranks_end_the_job_in_time_with_their_names_and_the_supervised_run_ends_as_if_undisturbed(
    folder: Path, hosts: tuple[Host, Host], shards: Path, undisturbed: Path
) -> None:
    """One rank is killed; after the new start, the cable to the other is cut."""
    run, log = folder / "lost", folder / "lost.log"
    job = start(hosts[0], supervised(folder, shards, run), log)
    wait_for(lambda: steps_done(run) >= 5, "step 5")
    hosts[1].processes("launch/train.py --local_rank")[0].kill()
    wait_for(lambda: lines_of_the_end(log), "the end of the job", TIMEOUT_S + 30)
    assert "rank 1 on node2 has died" in lines_of_the_end(log)[0] and len(lines_of_the_end(log)) == 1

    done = steps_done(run)
    wait_for(lambda: steps_done(run) > done, "a step after the new start")
    ranks = [process for host in hosts for process in host.processes("launch/train.py --local_rank")]
    hosts[1].run("ip", "link", "set", "eth0", "down")
    cut = time.monotonic()
    try:
        wait_for(lambda: not any(rank.is_running() for rank in ranks), "both ranks to end", TIMEOUT_S + 30)
        wait_for(lambda: log.read_text().count("supervise: failed with status") == 2, "the launcher", TIMEOUT_S + 30)
        assert time.monotonic() - cut < TIMEOUT_S + 30
    finally:
        hosts[1].run("ip", "link", "set", "eth0", "up")
    assert any(
        f"no sign of life for {TIMEOUT_S} s" in line and "rank 1 on node2" in line for line in lines_of_the_end(log)
    )
    assert job.wait(240) == 0, log.read_text()[-5000:]
    assert_same_end(run, undisturbed)
    assert nothing_left(hosts)


def doctor(host: Host, *options: str) -> tuple[int, list[str]]:
    command = host.command(sys.executable, "-m", "dist_train.cli", "doctor", *options)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_the_doctor_finds_both_hosts_well_and_names_what_ails_them(
    folder: Path, hosts: tuple[Host, Host], shards: Path
) -> None:
    good = ["--hostfile", str(folder / "hostfile"), *arguments(shards, folder / "examined")]
    status, lines = doctor(hosts[0], *good)
    assert status == 0 and all(line.startswith("ok ") for line in lines), lines
    assert any("hosts: 2 with the same Python, packages, code and shard set" in line for line in lines)
    assert any(line.startswith("ok   node2: no GPU") and "eth0 10.77.0.2" in line for line in lines)

    (folder / "two_more").write_text("node1 slots=1\nnode2 slots=4\nnode3 slots=1\n")
    hosts[1].run("mount", "-t", "tmpfs", "tmpfs", str(folder / "set"))  # node2 loses sight of the shards
    try:
        status, lines = doctor(hosts[0], "--hostfile", str(folder / "two_more"), *good[2:], "--train.batch_size=13")
    finally:
        hosts[1].run("umount", str(folder / "set"))
    failed = "\n".join(line for line in lines if line.startswith("fail"))
    assert status == 1
    assert "fail node3: ssh: Could not resolve hostname node3" in failed
    assert "fail node2, data.shards: " in failed and "node1, data.shards" not in failed
    assert "fail recipe: train.batch_size 13 does not divide over 6 ranks" in failed
