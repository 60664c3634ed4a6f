"""launch/slurm.sbatch under a real SLURM: preempted or out of time it saves, and goes on as if undisturbed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train.train.checkpoint import newest_checkpoint, read_state
from tests.harness import REPOSITORY, newest_weights, same, steps_done, wait_for, write_shard_set
from tests.multinode.slurm import Cluster, slurm, why_no_slurm
from tests.multinode.test_two_hosts import ENVIRONMENT, arguments
from tests.multinode.two_hosts import two_hosts, why_not

WHY_NOT = why_not() or why_no_slurm()
pytestmark = [pytest.mark.launch, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL")
# An epoch has 100 steps: hardly a checkpoint is written but at a stop.
ENDLESS = {"train__epochs": 1000, "train__timeout_s": 300, "train__log_every": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    before = Path.cwd()
    os.chdir(REPOSITORY)  # from where jobs are submitted
    with two_hosts(folder) as hosts, slurm(folder, hosts, ENVIRONMENT) as cluster:
        yield cluster
    os.chdir(before)


@pytest.fixture(scope="module")
def submit(folder: Path, cluster: Cluster) -> Callable[..., str]:
    """Queue the script on both hosts, a CPU rank on each. Returns the job's number."""
    shards = write_shard_set(folder / "set", {"train": [700, 500], "val": [12]}, baked=20)
    head = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0".split()

    def queue(run: Path, partition: str = "low", **overrides: object) -> str:
        words = [
            *head,
            f"--partition={partition}",
            f"--output={run}.log",
            "launch/slurm.sbatch",
            *arguments(shards, run, **ENDLESS | overrides),
        ]
        return cluster.run("sbatch", "--parsable", *words).strip()

    return queue


def finish(cluster: Cluster, job: str, run: Path) -> None:
    wait_for(lambda: cluster.job(job)["JobState"] in ENDED, f"job {job}", 240)
    assert cluster.job(job)["JobState"] == "COMPLETED", Path(f"{run}.log").read_text()[-3000:]


def assert_as_if_undisturbed(cluster: Cluster, submit: Callable[..., str], run: Path) -> None:
    """The newest weights are, to the bit, those of a job that came to their step without a stop."""
    state = read_state(newest_checkpoint(run))
    plain = run.with_name(f"{run.name}-undisturbed")
    finish(cluster, submit(plain, train__stop_after_steps=state.step), plain)
    assert read_state(newest_checkpoint(plain)).step == state.step
    assert same(newest_weights(run), newest_weights(plain))


@pytest.mark.parametrize("partition", ["low", pytest.param("abrupt", marks=pytest.mark.slow)])
def test_a_preempted_job_saves_is_queued_again_and_goes_on_with_the_same_weights(
    partition: str, folder: Path, cluster: Cluster, submit: Callable[..., str]
) -> None:
    """With grace time, and without."""
    run = folder / f"preempted-{partition}"
    job = submit(run, partition)
    wait_for(lambda: steps_done(run) >= 5, "step 5", 120)
    urgent = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: cluster.job(urgent.strip())["JobState"] == "COMPLETED", "the urgent job", 120)
    saved = read_state(newest_checkpoint(run)).step
    assert saved >= 5

    wait_for(lambda: cluster.job(job)["Restarts"] == "1", "the job to be queued again", 60)
    # Not in the same second: slurmd revoked the job's credentials in it, and would refuse new ones of that second.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    wait_for(lambda: steps_done(run) >= saved + 5, "five more steps", 180)
    cluster.run("scancel", "--signal=USR1", job)
    finish(cluster, job, run)
    assert cluster.job(job)["Restarts"] == "1", "a job that ended by itself was queued again"
    assert_as_if_undisturbed(cluster, submit, run)


@pytest.mark.slow
def test_a_job_whose_time_is_nearly_up_saves_and_goes_on_when_it_is_submitted_again(
    folder: Path, cluster: Cluster, submit: Callable[..., str]
) -> None:
    run = folder / "out-of-time"
    job = submit(run)
    wait_for(lambda: steps_done(run) >= 5, "step 5", 120)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # less than USR1@120 before the end
    finish(cluster, job, run)
    saved = read_state(newest_checkpoint(run)).step

    job = submit(run)
    wait_for(lambda: steps_done(run) >= saved + 5, "five more steps", 120)
    cluster.run("scancel", "--signal=USR1", job)
    finish(cluster, job, run)
    assert_as_if_undisturbed(cluster, submit, run)
