"""Checkpoints: complete and undamaged or not used, written while training goes on, and good for any topology."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from dist_train.config import Recipe
from dist_train.errors import WorkError
from dist_train.models.saved import find_damage, list_checkpoints, newest_checkpoint, read_extra
from dist_train.train.checkpoint import CheckpointWriter, RunState, checkpoint_to_resume, read_state
from dist_train.train.engine import build_engine, init_process_group
from dist_train.train.engine_state import gather_state, restore_state
from dist_train.train.record import start_console_log
from tests import harness
from tests.harness import (
    REPOSITORY,
    cut,
    environment,
    error_line,
    flip,
    logged_steps,
    newest_weights,
    same,
    write_shard_set,
)
from tests.train.forked_ranks import train_on

TRAIN = [37, 50, 9]
ADAMW = {"data__shuffle_window": 16, "optim__name": "adamw", "train__batch_size": 24}
arguments, train = (partial(function, **ADAMW) for function in (harness.arguments, harness.train))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": TRAIN, "val": [11, 2]}, baked=20)


def losses(run: Path) -> list[float]:
    steps = logged_steps(run)
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
    return [entry["loss"] for entry in steps]


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run in one process: 8 steps, checkpoints at 4 and 8."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(shards, run) == 0
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# ---------------------------------------------------------------------- any topology
def small_engine(stage: int, precision: str, optimizer: str, weights: dict[str, Tensor] | None = None) -> Any:
    recipe = Recipe()
    recipe.deepspeed.zero_stage, recipe.deepspeed.precision = stage, precision
    recipe.train.batch_size, recipe.optim.name, recipe.optim.lr = 6, optimizer, 0.01
    recipe.optim.weight_decay = 0.01  # two groups of parameters
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.ReLU(), nn.Linear(13, 3))
    if weights is not None:
        model.load_state_dict(weights)
    return build_engine(model, recipe, init_process_group(), 6)


def small_step(engine: deepspeed.DeepSpeedEngine, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    images, labels = torch.randn(6, 7, generator=draw), torch.randint(0, 3, (6,), generator=draw)
    loss = nn.functional.cross_entropy(engine(images.to(next(engine.module.parameters()).dtype)).float(), labels)
    engine.backward(loss)
    engine.step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_zero_stage_and_precision_takes_up_exactly_what_any_other_left(optimizer: str) -> None:
    kinds = [(stage, "float32") for stage in range(4)] + [(stage, "bf16") for stage in (1, 2, 3)]
    left = {}
    for stage, precision in kinds:
        engine = small_engine(stage, precision, optimizer)
        for number in range(3):
            small_step(engine, number)
        before = gather_state(engine)
        small_step(engine, 3)
        left[stage, precision] = before, gather_state(engine)
    states = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}[optimizer]
    for (kind, (before, after)), other in itertools.product(left.items(), kinds):
        weights, state = before
        assert {name.partition("/")[0] for name in state} == states
        engine = small_engine(*other, optimizer, weights)
        restore_state(engine, weights, state)
        assert all(same(*pair) for pair in zip(gather_state(engine), before, strict=True)), (kind, other)
        small_step(engine, 3)
        if kind == other:
            assert all(same(*pair) for pair in zip(gather_state(engine), after, strict=True)), kind
        elif kind[1] == other[1]:
            for name, tensor in gather_state(engine)[0].items():
                torch.testing.assert_close(tensor, after[0][name], rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_with_other_ranks_zero_stages_and_micro_batches_as_if_nothing_had_changed(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes: list[tuple[int, dict[str, object]]] = [
        (1, {"train__stop_after_steps": 2}),
        (2, {"train__stop_after_steps": 4, "deepspeed__zero_stage": 2, "train__micro_batch_size": 4}),
        (3, {"train__stop_after_steps": 6, "deepspeed__zero_stage": 3}),
        (1, {"deepspeed__zero_stage": 1, "train__micro_batch_size": 8}),
    ]
    for ranks, change in changes:
        train_on(ranks, [*arguments(shards, run, **change), "--resume=auto"], tmp_path)
    assert losses(run) == pytest.approx(losses(finished), abs=1e-4)
    assert (read_state(newest_checkpoint(run)).world_size, read_state(newest_checkpoint(run)).zero_stage) == (1, 1)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(
            1, {"model__backbone": "resnet18", "data__image_size": 32, "optim__name": "sgd"}, marks=pytest.mark.slow
        ),
        (2, {"model__backbone": "resnet18", "data__image_size": 32, "optim__name": "sgd"}),
        (2, {"model__dropout": 0.2, "deepspeed__zero_stage": 2}),
    ],
    ids=["batch-norm", "batch-norm-2-ranks", "dropout-2-ranks"],
)
def test_resumed_runs_end_with_bit_identical_weights(
    shards: Path, tmp_path: Path, ranks: int, overrides: dict[str, object]
) -> None:
    if "data__image_size" in overrides:
        shards = write_shard_set(tmp_path / "set", {"train": TRAIN, "val": [4]}, size=(40, 36))
    train_on(ranks, arguments(shards, tmp_path / "straight", **overrides), tmp_path)
    train_on(ranks, arguments(shards, tmp_path / "stopped", train__stop_after_steps=3, **overrides), tmp_path)
    train_on(ranks, [*arguments(shards, tmp_path / "stopped", **overrides), "--resume=auto"], tmp_path)
    assert same(*(newest_weights(tmp_path / name) for name in ("straight", "stopped")))
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


# ---------------------------------------------------------------------- damage
def change_best(file: Path) -> None:
    document = json.loads(file.read_text())
    document["state"]["best_top1"] += 0.01
    file.write_text(json.dumps(document, indent=1))


@pytest.mark.parametrize(
    ("damage", "name", "finding"),
    [
        (flip, "weights.safetensors", "weights.safetensors has another SHA-256 than when it was written"),
        (flip, "state.json", "state.json is not what was written"),
        (change_best, "state.json", "state.json is not what was written"),
        (cut, "optimizer.safetensors", "optimizer.safetensors has "),
        (Path.unlink, "optimizer.safetensors", "optimizer.safetensors cannot be read (No such file or directory)"),
        (Path.unlink, "checksums.json", "checksums.json cannot be read (No such file or directory)"),
        (cut, "checksums.json", "checksums.json is not what was written"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    copy: Path, damage: Any, name: str, finding: str, capsys: Any
) -> None:
    start_console_log(0)
    older, newest = list_checkpoints(copy)
    damage(newest / name)
    assert checkpoint_to_resume(copy, "auto") == older
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{newest} is damaged, so the one before it is used: {finding}")
    with pytest.raises(WorkError, match=r"is damaged: .*; --resume auto uses the newest that is not"):
        checkpoint_to_resume(copy, str(newest))
    flip(older / "weights.safetensors")
    with pytest.raises(WorkError, match="every checkpoint is damaged"):
        checkpoint_to_resume(copy, "auto")


def test_a_run_goes_on_from_before_the_damage_and_replaces_it(
    copy: Path, finished: Path, shards: Path, capsys: Any
) -> None:
    newest = list_checkpoints(copy)[-1]
    assert {file.name for file in newest.iterdir()} == {  # no pickles
        "state.json", "weights.safetensors", "optimizer.safetensors", "checksums.json",
    }  # fmt: skip
    flip(newest / "optimizer.safetensors")
    assert train(shards, copy, str(newest)) == 1
    assert f"error: {newest} is damaged: optimizer.safetensors has another SHA-256" in capsys.readouterr().err
    assert train(shards, copy, "auto", train__stop_after_steps=5, train__keep_checkpoints=1) == 0
    assert capsys.readouterr().err.count(f"{newest} is damaged") == 1
    assert read_state(newest_checkpoint(copy)).step == 5 and not newest.exists()
    assert train(shards, copy, "auto") == 0
    assert same(newest_weights(copy), newest_weights(finished))


# ---------------------------------------------------------------------- no room
def test_no_room_for_a_checkpoint_is_one_line_before_anything_is_written(shards: Path, tmp_path: Path) -> None:
    """On a file system of its own that holds one checkpoint of 65 MB and not two."""
    run = tmp_path / "run"
    run.mkdir()
    code = f"""
import sys
from pathlib import Path
from dist_train.cli import main
from dist_train.models.saved import find_damage, list_checkpoints
code = main({["train", *arguments(shards, run)]!r})
print([(path.name, find_damage(path)) for path in list_checkpoints(Path({str(run)!r}))])
print(list(Path({str(run)!r}).glob("checkpoints/*.tmp")))
sys.exit(code)
"""
    inside = 'mount -t tmpfs -o size=100m tmpfs "$0" && exec "$1" -c "$2"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, str(run), sys.executable, code]
    if subprocess.run([*command[:3], "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    line = error_line(done.stderr)
    assert line.startswith(f"error: {run}/checkpoints: no room for step-00000008: it needs 0.0")
    assert " GB are free; make room or lower train.keep_checkpoints, then --resume auto" in line
    assert done.stdout.splitlines()[-2:] == ["[('step-00000004', None)]", "[]"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_nothing_half(
    copy: Path, shards: Path, capsys: Any
) -> None:
    before = list_checkpoints(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard))  # no file above 10 MB, as if the disk were full
    try:
        assert train(shards, copy, "auto", train__epochs=50, train__stop_after_steps=190) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = error_line(capsys.readouterr().err)
    assert "step-00000012: the checkpoint could not be written (" in line and "older ones are untouched" in line
    assert list_checkpoints(copy) == before and all(find_damage(checkpoint) is None for checkpoint in before)
    assert not list(copy.rglob("*.tmp"))
    assert len(losses(copy)) <= 16  # ended in the background's error, not at the end of the run


# ---------------------------------------------------------------------- another model, more state
@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        ({"model__backbone": "vit_small_patch8"}, "model.backbone was vit_tiny_patch8, now it is vit_small_patch8"),
        ({"model__head": "ifa"}, "model.head was cls, now it is ifa"),
        ({"data__image_size": 8, "data__crop_margin": 12}, "data.image_size was 16, now it is 8"),
    ],
)
def test_a_model_of_another_shape_is_refused_in_one_line(
    finished: Path, shards: Path, capsys: Any, overrides: dict[str, object], finding: str
) -> None:
    assert train(shards, finished, "auto", **overrides) == 2
    line = error_line(capsys.readouterr().err)
    assert f"cannot be resumed, its model has another shape: {finding}; " in line


def test_further_tensors_are_saved_and_given_back(tmp_path: Path) -> None:
    engine = small_engine(0, "float32", "sgd")
    writer = CheckpointWriter(tmp_path, Recipe(), ["class"])
    state = RunState(1, 6, 0, 6, 1, 0, "float32", 1, "digest")
    extra = {"average/0.weight": torch.arange(6.0).reshape(2, 3)}
    writer.save(engine, state, extra)
    extra["average/0.weight"].zero_()  # what is saved is what was given, not what becomes of it
    state.step = 2
    writer.finish()
    assert torch.equal(read_extra(newest_checkpoint(tmp_path))["average/0.weight"], torch.arange(6.0).reshape(2, 3))
    assert read_state(newest_checkpoint(tmp_path)).step == 1
