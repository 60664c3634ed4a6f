"""Whole runs: what they write, that they follow a plain loop, stop and resume to the same end, and refuse mistakes."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

from dist_train.cli import main, parse_recipe, run_training
from dist_train.config import DataConfig
from dist_train.data.draws import random_bits
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.models.build import build_model
from dist_train.models.saved import list_checkpoints, newest_checkpoint
from dist_train.place import Place
from dist_train.train.checkpoint import read_state
from dist_train.train.evaluate import evaluate
from dist_train.train.meters import find_stragglers
from dist_train.train.schedule import learning_rate
from tests import harness
from tests.harness import (
    CLASSES,
    IFA,
    evaluations,
    jpeg_bytes,
    logged_steps,
    newest_weights,
    read_metrics,
    read_summary,
    same,
    steps_done,
    wait_for,
    write_shard_set,
)
from tests.train.conftest import SPLITS
from tests.train.forked_ranks import fork_ranks, train_on

TRAIN, VAL, TEST = (sum(SPLITS[split]) for split in ("train", "val", "test"))
arguments, train = (partial(function, **IFA) for function in (harness.arguments, harness.train))


def test_a_run_leaves_all_its_files_and_counts_every_sample(finished: Path, shards: Path) -> None:
    steps = logged_steps(finished)
    total = math.ceil(2 * TRAIN / 24)
    assert [entry["step"] for entry in steps] == list(range(1, total + 1))
    assert [entry["samples"] for entry in steps] == [24 * step for step in range(1, total + 1)]
    names = {"step", "epoch", "samples", "loss", "lr", "images_per_s", "step_ms", "data_wait_ms", "mfu", "memory_mb"}
    assert all(set(entry) == names for entry in steps)
    assert [(e["split"], e["step"], e["samples"]) for e in evaluations(finished)] == [
        ("val", 4, VAL),
        ("val", total, VAL),
        ("test", total, TEST),
    ]
    summary = read_summary(finished)
    assert summary["manifest_digest"] == read_manifest(shards).digest
    assert summary["evaluations"]["test"]["samples"] == TEST
    assert {"versions", "hardware", "commit", "seconds", "images_per_s", "peak_memory_mb"} <= set(summary)
    assert len(summary["hosts"]) == 1 and summary["hosts"][0].startswith(f"{socket.gethostname()}: ")
    last_step = [line for line in (finished / "log.txt").read_text().splitlines() if f"step {total}/{total}" in line]
    assert last_step[0].endswith("0:00:00 left")
    assert list((finished / "tensorboard").glob("events.*")) and (finished / "log.txt").stat().st_size > 0
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["model"]["head"] == "ifa" and recipe["train"]["batch_size"] == 24
    assert (finished / "checkpoints" / "latest").read_text().strip() == newest_checkpoint(finished).name
    assert not list(finished.rglob("*.tmp"))


def test_a_trace_of_the_steps_is_written_where_asked_for(shards: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "run", train__profile_steps=2, train__stop_after_steps=13, train__epochs=4) == 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert sorted({name for name in names if name.startswith("ProfilerStep")}) == ["ProfilerStep#10", "ProfilerStep#11"]
    assert any("addmm" in name for name in names)


def test_a_rank_more_than_a_fifth_slower_than_the_others_is_a_straggler() -> None:
    assert find_stragglers([100, 101, 125, 99]) == {2: pytest.approx(1.25)}
    assert find_stragglers([100, 130]) == {1: pytest.approx(1.3)}
    assert find_stragglers([100, 119]) == {} and find_stragglers([50.0]) == {}


def test_training_through_deepspeed_follows_a_plain_pytorch_loop(finished: Path, shards: Path, tmp_path: Path) -> None:
    """Same data, same start: equal losses and weights; an engine that clipped gradients silently would part at once."""
    recipe, _ = parse_recipe(arguments(shards, tmp_path))
    manifest = read_manifest(shards)
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    model, _ = build_model(recipe.model, 16, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = iter(TrainLoader(recipe.data, manifest, Place(), batch_size=24, micro_batch=24, seed=0))
    logged = logged_steps(finished)
    norms: list[float] = []
    model.train()
    for entry in logged:
        batch = next(batches)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe.optim, 24, entry["step"] - 1, len(logged), TRAIN)
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item())
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert max(norms) > 1  # where the engine's default would have clipped
    weights = newest_weights(finished)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overrides", [{"optim__name": "adamw"}, {"model__dropout": 0.2, "train__micro_batch_size": 6}])
def test_stopped_and_resumed_runs_end_with_bit_identical_weights(
    shards: Path, tmp_path: Path, overrides: dict[str, object]
) -> None:
    assert train(shards, tmp_path / "straight", **overrides) == 0
    seconds = [0.0]
    for step in (3, 4):  # within an epoch, and where one ends
        began = time.perf_counter()
        assert train(shards, tmp_path / "stopped", train__stop_after_steps=step, resume="auto", **overrides) == 0
        state = read_state(newest_checkpoint(tmp_path / "stopped"))
        assert state.step == step and seconds[-1] < state.seconds <= seconds[-1] + time.perf_counter() - began + 0.1
        seconds.append(state.seconds)
    assert train(shards, tmp_path / "stopped", resume="auto", **overrides) == 0
    assert same(*(newest_weights(tmp_path / name) for name in ("straight", "stopped")))
    one, other = (
        [(e["step"], e["loss"], e["lr"]) for e in logged_steps(tmp_path / name)] for name in ("straight", "stopped")
    )
    assert one == other
    assert read_summary(tmp_path / "stopped")["seconds"] > seconds[-1], "of all of its processes"


def test_two_ranks_with_accumulation_train_as_one_does(finished: Path, shards: Path, tmp_path: Path) -> None:
    options = arguments(shards, tmp_path / "run", train__micro_batch_size=4, deepspeed__zero_stage=1)
    train_on(2, options, tmp_path)
    one, two = logged_steps(finished), logged_steps(tmp_path / "run")
    assert [e["step"] for e in one] == [e["step"] for e in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    one, two = evaluations(finished), evaluations(tmp_path / "run")
    assert [(e["split"], e["step"], e["samples"]) for e in one] == [(e["split"], e["step"], e["samples"]) for e in two]


@pytest.mark.slow
def test_one_two_and_three_ranks_have_the_same_losses_with_every_augmentation(shards: Path, tmp_path: Path) -> None:
    everything = {"data__crop": "random_resized", "data__auto_augment": "randaugment", "data__erasing": 0.5}
    everything |= {"data__blur": 0.3, "data__grey": 0.2, "data__eval_crop": "center"}
    losses = []
    for ranks in (1, 2, 3):
        run = tmp_path / str(ranks)
        train_on(ranks, arguments(shards, run, train__micro_batch_size=4, **everything), tmp_path)
        losses.append([entry["loss"] for entry in logged_steps(run)] + [entry["loss"] for entry in evaluations(run)])
    assert len(losses[0]) > 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_signal_to_one_of_two_ranks_ends_both_after_the_step_with_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = arguments(shards, run, train__epochs=2000)
    ranks = fork_ranks(2, tmp_path, run_training, options)
    try:
        wait_for(lambda: steps_done(run) >= 3, "step 3")
        os.kill(ranks[1].pid, signal.SIGTERM)
        for rank in ranks:
            rank.join(120)
    finally:
        for rank in ranks:
            rank.kill()
    said = (tmp_path / "rank0.log").read_text()
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    assert "--resume auto continues" in said
    step = read_state(newest_checkpoint(run)).step
    assert 3 <= step < 8000
    train_on(2, [*options, f"--train.stop_after_steps={step + 2}", "--resume=auto"], tmp_path)
    assert read_state(newest_checkpoint(run)).step == step + 2
    assert [entry["step"] for entry in logged_steps(run)] == list(range(1, step + 3))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_of_a_model_is_the_same_over_any_number_of_ranks(
    finished: Path, shards: Path, world_size: int
) -> None:
    """Ranks one after the other, their counts added: what the all-reduce does, checked against PIL and argmax."""
    recipe, _ = parse_recipe(arguments(shards, finished))
    manifest = read_manifest(shards)
    model, _ = build_model(recipe.model, 16, CLASSES)
    model.load_state_dict(newest_weights(finished))
    model.eval()
    counts = []
    for rank in range(world_size):
        loader = EvalLoader(recipe.data, manifest, "val", Place(rank, world_size), batch_size=3)
        expected = sum(len(positions) for positions in loader.batches)
        counts.append(evaluate(lambda batch: model(batch.images), loader, expected))
    logged = next(e for e in reversed(evaluations(finished)) if e["split"] == "val")
    assert sum(int(count.correct.sum()) for count in counts) / VAL == logged["top1"]
    assert sum(count.samples for count in counts) == VAL


def test_a_logged_loss_is_the_mean_of_its_steps_also_across_the_end_of_an_epoch(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    assert train(shards, tmp_path / "run", train__log_every=3) == 0
    every = {e["step"]: e["loss"] for e in logged_steps(finished)}
    logged = logged_steps(tmp_path / "run")
    assert [e["step"] for e in logged] == [3, 6, 8]  # epochs end at 4 and 8
    for entry, steps in zip(logged, [(1, 2, 3), (4, 5, 6), (7, 8)], strict=True):
        assert entry["loss"] == pytest.approx(sum(every[step] for step in steps) / len(steps), rel=1e-5)


def test_a_batch_that_passes_several_epochs_misses_no_evaluation(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [10], "val": [4]}, baked=20)
    assert train(shards, tmp_path / "run", train__batch_size=16, train__epochs=10, train__eval_every=2) == 0
    assert [entry["epoch"] // 1 for entry in logged_steps(tmp_path / "run")] == [1, 3, 4, 6, 8, 9, 11]
    assert [entry["step"] for entry in evaluations(tmp_path / "run")] == [2, 3, 4, 5, 7]


def test_old_checkpoints_go_and_the_best_stays(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__epochs=5, train__keep_checkpoints=1) == 0
    kept = list_checkpoints(run)
    state = read_state(kept[-1])
    assert {read_state(folder).step for folder in kept} == {state.step, state.best_step}
    assert state.step == math.ceil(5 * TRAIN / 24)


def test_a_run_with_bad_samples_ends_well_records_each_once_and_says_what_it_evaluated(
    tmp_path: Path, capsys: Any
) -> None:
    splits = {"train": [24], "val": [8], "test": [9]}
    flat = bytearray(jpeg_bytes(26, 20, 20))
    flat[200:] = b"\xff" * len(flat[200:])  # its frame header stands before
    broken = {5: b"no image", 26: bytes(flat), 33: b""}
    shards = write_shard_set(tmp_path / "set", splits, baked=20, replace=broken)
    run = tmp_path / "run"
    assert train(shards, run, train__stop_after_steps=1, optim__warmup_steps=0) == 0
    assert train(shards, run, resume="auto", optim__warmup_steps=0) == 0
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    names = {"train-000000.tar:000005", "val-000000.tar:000026", "test-000000.tar:000033"}
    assert {record["name"] for record in records} == names and len(records) == 3
    evaluated = evaluations(run)
    assert {(e["split"], e["samples"], e["bad_samples"]) for e in evaluated} == {("val", 7, 1), ("test", 8, 1)}
    assert all(math.isfinite(entry["loss"]) for entry in read_metrics(run))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["samples"], figures["bad_samples"], figures["top1"]) == (8, 1, evaluated[-1]["top1"])


def test_training_and_evaluation_say_when_images_are_resized_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = "its images were resized to 20x20 and are resized again to 22x22 (data.image_size 16 + crop_margin 6)"
    assert train(shards, run, data__crop_margin=6, model__head="cls", train__stop_after_steps=1) == 0
    assert (run / "log.txt").read_text().count(line) == 1
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert f"{shards}: {line}" in capsys.readouterr().err
    manifest = read_manifest(shards)
    assert manifest.resize_note(DataConfig(image_size=16, crop_margin=4)) is None
    assert manifest.resize_note(DataConfig(image_size=20, crop="random_resized")) is None
    assert "cropped and resized to 24, that is, enlarged" in str(
        manifest.resize_note(DataConfig(image_size=24, crop="random_resized"))
    )
