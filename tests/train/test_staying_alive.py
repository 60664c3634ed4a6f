"""A job whose ranks are lost ends and says which; a supervised one goes on; a folder and a bad step are guarded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dist_train.cli import main, parse_recipe
from dist_train.data.loader import Batch
from dist_train.data.manifest import read_manifest
from dist_train.data.plan import EpochPlan
from dist_train.models.build import build_model
from dist_train.models.saved import newest_checkpoint
from dist_train.place import Place
from dist_train.train.badsteps import BadSteps
from dist_train.train.checkpoint import read_state
from dist_train.train.engine import build_engine, init_process_group
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter
from dist_train.train.ranks import StopSignal
from dist_train.train.step import TrainStep, make_forward
from tests.conftest import REPOSITORY, write_shard_set

SAMPLES = 48
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["PYTHONPATH"] = str(REPOSITORY)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [30, 18]}, baked=20)


def arguments(shards: Path, run: Path, **overrides: object) -> list[str]:
    keys: dict[str, object] = {
        "data.shards": shards,
        "data.image_size": 16,
        "data.crop_margin": 4,
        "data.threads": 1,
        "model.backbone": "vit_tiny_patch8",
        "optim.lr": 0.01,
        "train.run": run,
        "train.epochs": 1,
        "train.batch_size": 12,
        "train.log_every": 1,
    }
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def local_launch(options: list[str], ranks: int = 2) -> list[str]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    ports = ["--num_accelerators", str(ranks), "--master_port", free_port()]
    return [deepspeed, *ports, str(REPOSITORY / "launch" / "train.py"), *options]


def ranks_under(pid: int) -> list[psutil.Process]:
    """The training processes that the process has started, directly or not."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.cmdline()[2:3] == [str(REPOSITORY / "launch" / "train.py")]]


# ---------------------------------------------------------------------- lost ranks
@pytest.mark.launch
@pytest.mark.parametrize(
    ("fate", "said"),
    [
        ("killed", "rank 1 on {host} has died"),
        ("stopped", "no sign of life for 6 s (train.timeout_s) from rank 1 on {host}"),
        ("hangs", "rank 1 on {host} took no part in what all ranks do together"),
        ("fails", "error (rank 1 on {host}): a file of mine is damaged"),
    ],
)
def test_a_lost_rank_ends_the_others_in_time_and_is_named(fate: str, said: str) -> None:
    timeout_s = 6
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(Path(__file__).with_name("watched_rank.py")), fate, str(timeout_s)]
    ranks = [
        subprocess.Popen(
            command,
            env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said_by_0 = ranks[0].communicate(timeout=120)[1]
        ranks[1].send_signal(signal.SIGCONT)
        said_by_1 = ranks[1].communicate(timeout=timeout_s + 30)[1]  # one that hangs is ended, too
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1 and ranks[1].returncode in (1, -signal.SIGKILL)
    lines = [line for line in (said_by_0 + said_by_1).splitlines() if "error (" in line]
    assert said.format(host=socket.gethostname()) in "\n".join(lines), said_by_0 + said_by_1
    assert "Traceback" not in said_by_0 + said_by_1


@pytest.mark.launch
def test_ranks_whose_launcher_is_killed_save_and_end(shards: Path, tmp_path: Path) -> None:
    options = arguments(shards, tmp_path / "run", train__epochs=1000)
    launcher = subprocess.Popen(local_launch(options), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, "step 2")
    ranks = ranks_under(launcher.pid)
    assert len(ranks) == 2
    for process in [*psutil.Process(launcher.pid).children(), launcher]:
        process.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, 60)
    assert not alive
    assert read_state(newest_checkpoint(tmp_path / "run")).step == steps_done(tmp_path / "run")


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "begun"), [(2, True), (1, False)], ids=["training", "importing"])
def test_sigterm_to_the_deepspeed_command_makes_the_ranks_save_and_end(
    shards: Path, tmp_path: Path, ranks: int, begun: bool
) -> None:
    """The command ends at once and passes nothing on; what it started between itself and the ranks lives. Ranks that
    still import must not take who adopted that for their launcher.
    """
    run, said = tmp_path / "run", tmp_path / "said"
    command = local_launch(arguments(shards, run, train__epochs=1000), ranks)
    with open(said, "w") as stderr:
        launcher = subprocess.Popen(command, env=ENVIRONMENT, stderr=stderr, stdout=subprocess.DEVNULL)
    wait_for(lambda: (steps_done(run) >= 2) if begun else any(map(imports, ranks_under(launcher.pid))), "the ranks")
    processes = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks_under(launcher.pid)) == ranks and len(processes) == 1 + ranks
    launcher.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, 120)
    launcher.wait()
    for process in alive:
        process.kill()
    assert not alive
    assert read_state(newest_checkpoint(run)).step == steps_done(run)
    assert "its launcher is gone; stopping" in said.read_text()
    assert "--resume auto continues" in said.read_text()


def imports(process: psutil.Process) -> bool:
    """Whether it has begun to read what takes seconds to import."""
    return any("/torch/" in mapped.path for mapped in process.memory_maps())


@pytest.mark.launch
def test_ctrl_c_saves_and_says_how_to_go_on(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = arguments(shards, run, train__epochs=1000)
    command = [sys.executable, "-m", "dist_train.cli", "train", *options]

    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: steps_done(run) >= 2, "step 2")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, "so that the next command of a script does not begin"
    assert "interrupted: saving a checkpoint after this step; Ctrl-C again ends without one" in said
    assert "--resume auto continues" in said and "Traceback" not in said
    assert read_state(newest_checkpoint(run)).step == steps_done(run)


def test_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal(60) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(Place()) and stop.interrupted
        assert capfd.readouterr().err.count("interrupted") == 1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_terminal_that_is_closed_saves_too_unless_nohup_forbids(shards: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopSignal(60) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested(Place())
        assert signal.getsignal(signal.SIGHUP) == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignal(60) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested(Place())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_while_the_ranks_agree_is_heard_after_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most of the time that a rank waits for the others it waits there."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    try:
        with StopSignal(60) as stop:
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
            assert not stop.requested(Place(0, 2, 2))
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
            assert stop.requested(Place(0, 2, 2))
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------------- SLURM
@pytest.mark.launch
def test_ranks_find_their_places_in_slurms_variables(shards: Path, tmp_path: Path) -> None:
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "4711"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), *arguments(shards, tmp_path / "run")]
    tasks = [
        subprocess.Popen(command, env=ENVIRONMENT | job | {"SLURM_PROCID": task, "SLURM_LOCALID": task})
        for task in ("0", "1")
    ]
    assert [task.wait(240) for task in tasks] == [0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


# ---------------------------------------------------------------------- the supervisor
def supervise(*options: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), *options]


@pytest.mark.launch
def test_a_supervised_job_keeps_others_out_and_saves_and_ends_at_sigterm(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = arguments(shards, run, train__epochs=1000)
    job = subprocess.Popen(supervise("--", *local_launch(options)), env=ENVIRONMENT)
    wait_for(lambda: steps_done(run) >= 2, "step 2")
    ranks = ranks_under(job.pid)
    rank_0 = next(rank for rank in ranks if rank.environ()["RANK"] == "0")

    assert main(["train", *options, "--resume", "auto"]) == 1
    assert f"{run} is in use by process {rank_0.pid} on {socket.gethostname()}" in capsys.readouterr().err

    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 0
    assert not any(rank.is_running() for rank in ranks)
    assert read_state(newest_checkpoint(run)).step == steps_done(run)


def test_the_supervisor_gives_up_without_progress_and_at_wrong_use(tmp_path: Path) -> None:
    def starts(*command: str) -> tuple[int, int]:
        options = supervise("--restarts=2", "--backoff=0.05", "--", *command, f"--train.run={tmp_path / 'run'}")
        done = subprocess.run(options, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr.count("supervise: start:")

    assert starts("false") == (1, 3)
    assert starts("true") == (1, 3)  # ends well, it says, but there is no run
    assert starts("sh", "-c", "exit 2") == (2, 1)


# ---------------------------------------------------------------------- the run folder's disk
@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 4 MB."""
    return mount_disk("4m")


def test_a_full_disk_ends_the_run_with_one_line_and_no_half_checkpoint(
    small_disk: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments(shards, small_disk / "run")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {small_disk}") and "no room for step-" in said
    assert newest_checkpoint(small_disk / "run") is None


def test_a_read_only_disk_is_named(small_disk: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", *arguments(shards, small_disk / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (f"error: train.run {small_disk / 'run'}: {small_disk} cannot be written; choose another train.run")


# ---------------------------------------------------------------------- bad steps
def test_a_loss_that_is_not_finite_ends_the_run_and_the_samples_of_its_step_are_written(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = arguments(shards, run, optim__lr="1e30", optim__schedule="constant", train__log_every=4)
    assert main(["train", *options]) == 1
    bad = json.loads((run / "bad_batch.json").read_text())
    said = capsys.readouterr().err
    assert f"the loss is not finite at step {bad['step']}; its samples are in {run / 'bad_batch.json'}" in said
    assert bad["step"] in (2, 3), "the weights after a step that was far too long"
    numbers = EpochPlan((30, 18), 12, 0, 0, 4096).batch(12 * (bad["step"] - 1)).sample.tolist()
    assert [sample["name"].split(":")[1] for sample in bad["samples"]] == [f"{number:06d}" for number in numbers]


def test_a_skipped_step_changes_neither_weights_nor_batch_statistics(shards: Path, tmp_path: Path) -> None:
    words = arguments(shards, tmp_path / "run", model__backbone="resnet18", data__image_size=32)
    recipe, _ = parse_recipe(words)
    place = init_process_group()
    model, _ = build_model(recipe.model, 32, len(read_manifest(shards).classes), 0)
    engine = build_engine(model, recipe, place, 12)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 4
    good = Batch(images, labels, torch.ones(12), None, None, np.arange(12))
    poisoned = replace(good, images=good.images * float("inf"))
    bad_steps = BadSteps(1, tmp_path, Place(rank=0, world_size=1), lambda step: [f"sample of {step}"])

    cpu = torch.device("cpu")

    def step(batch: Batch, number: int) -> float:
        meter, objective = StepMeter(cpu, 1, 1), Objective(recipe.optim, [12] * 4, cpu)
        make = TrainStep(engine, make_forward(engine, recipe, cpu), objective, recipe, 1, 0, meter, bad_steps)
        return float(make(iter([batch]), 0.01, number))

    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    assert step(poisoned, 0) == 0
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    assert json.loads((tmp_path / "bad_batch.json").read_text())["samples"] == [{"rank": 0, "name": "sample of 0"}]
    assert step(good, 1) > 0
    after = dict(engine.module.named_parameters())
    assert not all(torch.equal(weight, before[name]) for name, weight in after.items())
    with pytest.raises(Exception, match=r"not finite at step 3 after train.skip_bad_steps \(1\) others"):
        step(poisoned, 2)
