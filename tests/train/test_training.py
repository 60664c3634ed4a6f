"""Whole runs: what they write, that they follow a plain loop, stop and resume to the same end, and refuse mistakes."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from dist_train.cli import main, parse_recipe
from dist_train.data.draws import random_bits
from dist_train.data.images import FORMATS
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest, write_manifest
from dist_train.models.build import build_model
from dist_train.models.saved import list_checkpoints, newest_checkpoint, read_weights
from dist_train.place import Place
from dist_train.train.checkpoint import read_state
from dist_train.train.evaluate import evaluate
from dist_train.train.meters import find_stragglers
from dist_train.train.schedule import learning_rate
from tests.conftest import CLASSES, REPOSITORY, jpeg_bytes, write_shard_set

TRAIN, VAL, TEST = [37, 50, 9], [11, 2], [10]
SAMPLES = sum(TRAIN)
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(
        tmp_path_factory.mktemp("sets") / "set", {"train": TRAIN, "val": VAL, "test": TEST}, baked=20, text=True
    )


def arguments(shards: Path, run: Path, **overrides: object) -> list[str]:
    keys: dict[str, object] = {
        "data.shards": shards,
        "data.image_size": 16,
        "data.crop_margin": 4,
        "data.shuffle_window": 16,
        "data.threads": 1,
        "model.backbone": "vit_tiny_patch8",
        "model.head": "ifa",
        "optim.lr": 0.01,
        "optim.warmup_steps": 2,
        "train.run": run,
        "train.epochs": 2,
        "train.batch_size": 24,
        "train.log_every": 1,
    }
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def train(shards: Path, run: Path, resume: str = "none", **overrides: object) -> int:
    return main(["train", *arguments(shards, run, **overrides), "--resume", resume])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def launch_command(ranks: int, options: list[str]) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    launcher = [str(deepspeed), "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [*launcher, str(REPOSITORY / "launch" / "train.py"), *options]


def launch(shards: Path, run: Path, ranks: int, resume: str = "none", **overrides: object) -> None:
    """The real launcher with real processes."""
    command = launch_command(ranks, [*arguments(shards, run, **overrides), "--resume", resume])
    done = subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run in one process."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(shards, run) == 0
    return run


def test_a_run_leaves_all_its_files_and_counts_every_sample(finished: Path, shards: Path) -> None:
    metrics = read_metrics(finished)
    steps = [entry for entry in metrics if "split" not in entry]
    evaluations = [entry for entry in metrics if "split" in entry]
    total = math.ceil(2 * SAMPLES / 24)
    assert [entry["step"] for entry in steps] == list(range(1, total + 1))
    assert [entry["samples"] for entry in steps] == [24 * step for step in range(1, total + 1)]
    names = {"step", "epoch", "samples", "loss", "lr", "images_per_s", "step_ms", "data_wait_ms", "mfu", "memory_mb"}
    assert all(set(entry) == names for entry in steps)
    assert [(e["split"], e["step"], e["samples"]) for e in evaluations] == [
        ("val", 4, sum(VAL)),
        ("val", total, sum(VAL)),
        ("test", total, sum(TEST)),
    ]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["manifest_digest"] == read_manifest(shards).digest
    assert summary["evaluations"]["test"]["samples"] == sum(TEST)
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


def test_a_rank_more_than_a_fifth_slower_than_the_median_is_a_straggler() -> None:
    assert find_stragglers([100, 101, 125, 99]) == {2: pytest.approx(125 / 100.5)}
    assert find_stragglers([100, 119]) == {} and find_stragglers([50.0]) == {}


def test_training_through_deepspeed_follows_a_plain_pytorch_loop(finished: Path, shards: Path, tmp_path: Path) -> None:
    """Same data, same start: equal losses and weights; an engine that clipped gradients silently would part at once."""
    recipe, _ = parse_recipe(arguments(shards, tmp_path))
    manifest = read_manifest(shards)
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    model, _ = build_model(recipe.model, 16, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = iter(TrainLoader(recipe.data, manifest, Place(), batch_size=24, micro_batch=24, seed=0))
    logged = [entry for entry in read_metrics(finished) if "split" not in entry]
    norms: list[float] = []
    model.train()
    for entry in logged:
        batch = next(batches)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe.optim, 24, entry["step"] - 1, len(logged), SAMPLES)
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item())
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert max(norms) > 1  # where the engine's default would have clipped
    weights = read_weights(newest_checkpoint(finished))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overrides", [{"optim__name": "adamw"}, {"model__dropout": 0.2, "train__micro_batch_size": 6}])
def test_stopped_and_resumed_runs_end_with_bit_identical_weights(
    shards: Path, tmp_path: Path, overrides: dict[str, object]
) -> None:
    assert train(shards, tmp_path / "straight", **overrides) == 0
    for step in (3, 4):  # within an epoch, and where one ends
        assert train(shards, tmp_path / "stopped", train__stop_after_steps=step, resume="auto", **overrides) == 0
        assert read_state(newest_checkpoint(tmp_path / "stopped")).step == step
    assert train(shards, tmp_path / "stopped", resume="auto", **overrides) == 0
    straight, resumed = (read_weights(newest_checkpoint(tmp_path / name)) for name in ("straight", "stopped"))
    assert all((straight[name] == resumed[name]).all() for name in straight)
    one, other = (
        [(e["step"], e["loss"], e["lr"]) for e in read_metrics(tmp_path / name) if "split" not in e]
        for name in ("straight", "stopped")
    )
    assert one == other


def test_two_ranks_with_accumulation_train_as_one_does(finished: Path, shards: Path, tmp_path: Path) -> None:
    launch(shards, tmp_path / "run", ranks=2, train__micro_batch_size=4, deepspeed__zero_stage=1)
    one, two = ([e for e in read_metrics(run) if "split" not in e] for run in (finished, tmp_path / "run"))
    assert [e["step"] for e in one] == [e["step"] for e in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    a, b = ([e for e in read_metrics(run) if "split" in e] for run in (finished, tmp_path / "run"))
    assert [(e["split"], e["step"], e["samples"]) for e in a] == [(e["split"], e["step"], e["samples"]) for e in b]


def test_a_signal_to_one_of_two_ranks_ends_both_after_the_step_with_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = launch_command(2, arguments(shards, run, train__epochs=2000))
    with subprocess.Popen(
        command, env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:  # until the first steps are made
                if line.startswith("step 3/"):
                    break
            ranks = [
                child for child in psutil.Process(process.pid).children(True) if "--local_rank=1" in child.cmdline()
            ]
            assert len(ranks) == 1
            ranks[0].send_signal(signal.SIGTERM)
            output = process.stderr.read()
            assert process.wait(timeout=120) == 0, output
        finally:
            process.kill()
    assert "--resume auto continues" in output
    state = read_state(newest_checkpoint(run))
    assert 3 <= state.step < 8000
    launch(shards, run, ranks=2, resume="auto", train__epochs=2000, train__stop_after_steps=state.step + 2)
    assert read_state(newest_checkpoint(run)).step == state.step + 2
    assert [e["step"] for e in read_metrics(run) if "split" not in e] == list(range(1, state.step + 3))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_of_a_model_is_the_same_over_any_number_of_ranks(
    finished: Path, shards: Path, world_size: int
) -> None:
    """Ranks one after the other, their counts added: what the all-reduce does, checked against PIL and argmax."""
    recipe, _ = parse_recipe(arguments(shards, finished))
    manifest = read_manifest(shards)
    model, _ = build_model(recipe.model, 16, CLASSES)
    model.load_state_dict(read_weights(newest_checkpoint(finished)))
    model.eval()
    counts = []
    for rank in range(world_size):
        loader = EvalLoader(recipe.data, manifest, "val", Place(rank, world_size), batch_size=3)
        expected = sum(len(positions) for positions in loader.batches)
        counts.append(evaluate(lambda batch: model(batch.images), loader, expected))
    logged = next(e for e in reversed(read_metrics(finished)) if e.get("split") == "val")
    assert sum(int(count.correct.sum()) for count in counts) / sum(VAL) == logged["top1"]
    assert sum(count.samples for count in counts) == sum(VAL)


def test_evaluate_writes_a_class_table_that_adds_up(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), "--split", "test"]) == 0
    figures = json.loads(capsys.readouterr().out)
    logged = next(e for e in read_metrics(finished) if e.get("split") == "test")
    assert (figures["samples"], figures["top1"]) == (sum(TEST), logged["top1"])
    rows = list(csv.DictReader(open(figures["csv"])))
    assert len(rows) == CLASSES and sum(int(row["samples"]) for row in rows) == sum(TEST)
    assert sum(int(row["correct"]) for row in rows) == round(logged["top1"] * sum(TEST))
    assert figures["class_mean_top1"] == pytest.approx(
        sum(int(row["correct"]) / int(row["samples"]) for row in rows) / CLASSES
    )


def test_predict_answers_good_files_and_names_bad_ones(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Image.new("L", (30, 20), 77).save(tmp_path / "grey.png")
    files = [str(tmp_path / name) for name in ("bad.jpg", "good.jpg", "none.jpg", "grey.png")]
    assert main(["predict", str(finished), *files]) == 1
    out, error = capsys.readouterr()
    assert error.splitlines()[1:] == [  # the first names the checkpoint
        f"{files[0]}: not an image that can be used (not an image: none of the formats {', '.join(FORMATS)})",
        f"{files[2]}: No such file or directory",
    ]
    blocks = [block for block in out.split(str(tmp_path)) if block]
    assert len(blocks) == 2
    for block in blocks:
        probabilities = [float(line.split()[0]) for line in block.splitlines()[1:]]
        assert len(probabilities) == CLASSES and sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert probabilities == sorted(probabilities, reverse=True)
    assert main(["predict", str(finished), files[1]]) == 0


def test_exported_weights_load_into_timms_model(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, model__head="cls", train__stop_after_steps=2) == 0
    assert main(["export", str(run), str(tmp_path / "weights.safetensors")]) == 0
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES, pretrained=False)
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    ours, _ = build_model(parse_recipe(arguments(shards, run, model__head="cls"))[0].model, 16, CLASSES)
    ours.load_state_dict(read_weights(newest_checkpoint(run)))
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), ours.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_grid_of_predictions_is_a_picture(finished: Path) -> None:
    assert main(["grid", str(finished)]) == 0
    assert Image.open(finished / "predictions.png").size[0] == 8 * 128


def test_a_logged_loss_is_the_mean_of_its_steps_also_across_the_end_of_an_epoch(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    assert train(shards, tmp_path / "run", train__log_every=3) == 0
    every = {e["step"]: e["loss"] for e in read_metrics(finished) if "split" not in e}
    logged = [e for e in read_metrics(tmp_path / "run") if "split" not in e]
    assert [e["step"] for e in logged] == [3, 6, 8]  # epochs end at 4 and 8
    for entry, steps in zip(logged, [(1, 2, 3), (4, 5, 6), (7, 8)], strict=True):
        assert entry["loss"] == pytest.approx(sum(every[step] for step in steps) / len(steps), rel=1e-5)


def test_old_checkpoints_go_and_the_best_stays(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__epochs=5, train__keep_checkpoints=1) == 0
    kept = list_checkpoints(run)
    state = read_state(kept[-1])
    assert {read_state(folder).step for folder in kept} == {state.step, state.best_step}
    assert state.step == math.ceil(5 * SAMPLES / 24)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"data__shards": "/no/such/set"}, "/no/such/set: no such shard set"),
        ({"data__digest": "0" * 64}, "data.digest is 000000"),
        ({"data__streams": 7}, "data.streams 7 does not divide train.batch_size 24"),
        ({"train__micro_batch_size": 7}, "train.micro_batch_size 7 does not divide the 24 samples"),
        ({"model__backbone": "vit_tiny_patch7"}, "image_size"),
        ({"model__backbone": "resnet19"}, "resnet18"),
        ({"model__backbone": "resnet18", "model__head": "ifa"}, "ifa"),
        ({"optim__warmup_steps": 10_000}, "optim.warmup_steps 10000 leaves nothing"),
        ({"deepspeed__precision": "fp16"}, "deepspeed.precision fp16 needs a GPU"),
        ({"data__device": "gpu"}, "data.device is gpu"),
        ({"train__epochs": 0}, "train.epochs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_one_line_and_exit_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: dict[str, object], line: str
) -> None:
    capsys.readouterr()
    assert train(shards, tmp_path / "run", **overrides) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_incomplete_set_is_refused(shard_set: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    root = shard_set({"train": [8]})
    (root / "manifest.json").unlink()
    assert train(root, tmp_path / "run") == 2
    assert "no manifest.json, so this is no complete shard set" in capsys.readouterr().err


def test_text_asked_of_shards_without_tags_is_refused(
    shard_set: Callable[..., Path], shared_data: Path, tmp_path: Path, capsys: Any
) -> None:
    root = shard_set({"train": [24]}, baked=20)
    vocabulary = shared_data / "text" / "bert-base-uncased-vocab.txt"
    assert train(root, tmp_path / "run", model__text_tokens=16, data__tokenizer=vocabulary, optim__warmup_steps=0) == 2
    assert "model.text_tokens asks for tags, but the shard set" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_other_data_is_not_resumed(
    finished: Path, shards: Path, shard_set: Callable[..., Path], capsys: Any
) -> None:
    assert train(shards, finished) == 2
    assert "already holds a run; add --resume auto" in capsys.readouterr().err
    other = shard_set({"train": TRAIN, "val": VAL, "test": [9]}, baked=20)
    assert train(other, finished, resume="auto") == 2
    assert "manifest digest of the shard set was" in capsys.readouterr().err
    more_classes = shard_set({"train": TRAIN}, name="more", baked=20, classes=6)
    assert train(more_classes, finished, resume="auto") == 2
    assert "classes of the shard set was 4, now it is 6" in capsys.readouterr().err
    assert main(["evaluate", str(finished), "--shards", str(more_classes), "--split", "train"]) == 2
    assert "has 6 classes" in capsys.readouterr().err
    assert train(shards, finished, resume="auto", train__seed=1) == 2
    assert "train.seed was 0, now it is 1" in capsys.readouterr().err


def test_a_vilt_trains_evaluates_and_predicts_with_tags(
    shards: Path, shared_data: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    vocabulary = shared_data / "text" / "bert-base-uncased-vocab.txt"
    options = {"model__text_tokens": 16, "data__tokenizer": vocabulary, "train__epochs": 1}
    assert train(shards, run, **options) == 0
    (tmp_path / "good.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    capsys.readouterr()
    answers = []
    for tags in ("red hair smile", "cat ears " * 6):
        assert main(["predict", str(run), str(tmp_path / "good.jpg"), "--tags", tags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_classes_that_cannot_be_learnt_are_named_before_training(tmp_path: Path, capsys: Any) -> None:
    """The digest of a set from before that was written down is as it was, and its classes of no image are named."""
    root = write_shard_set(tmp_path / "set", {"train": [4], "val": [2]}, baked=20, classes=9)
    assert train(root, tmp_path / "run", train__epochs=1, train__batch_size=4, optim__warmup_steps=0) == 0
    assert (
        "3 of 9 classes have no training image and cannot be learnt: class 6, class 7, class 8"
        in capsys.readouterr().err
    )
    write_manifest(root, replace(read_manifest(root), untrained=(4, 5, 6, 7, 8)))
    assert train(root, tmp_path / "again", train__epochs=1, train__batch_size=4, optim__warmup_steps=0) == 0
    assert "5 of 9 classes have no training image" in capsys.readouterr().err


def test_a_vilt_of_whole_tags_keeps_its_vocabulary_in_the_run_folder(shards: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    options = {"model__text_tokens": 4, "data__tokenizer": "tags", "data__tag_order": "frequency"}
    assert train(shards, run, train__stop_after_steps=3, **options) == 0
    vocabulary = (run / "tags.txt").read_text()
    assert vocabulary == "hair\nred\nsmile\ncat\nears\n"
    edited = vocabulary.replace("hair\nred\n", "red\nhair\n")
    (run / "tags.txt").write_text(edited)
    assert train(shards, run, resume="auto", **options) == 0
    assert (run / "tags.txt").read_text() == edited  # a run that goes on keeps its tags
    (logged,) = [entry for entry in read_metrics(run) if entry.get("split") == "test"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == logged["top1"]
    (tmp_path / "good.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    answers = []
    for tags in ("red hair smile", "smile hair red", "cat ears"):
        assert main(["predict", str(run), str(tmp_path / "good.jpg"), "--tags", tags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    # Tags are separated as they are beside images: "red hair" is one here, and the model knows no such.
    for tags, warning in (
        ([], "the model reads tags and is given none"),
        (["--tags", "red hair, cat ears"], "the model knows none of the tags 'red_hair cat_ears'"),
        (["--tags", "red hair, smile"], ""),
        (["--tags", " smile,,red"], ""),
    ):
        assert main(["predict", str(run), str(tmp_path / "good.jpg"), *tags]) == 0
        error = capsys.readouterr().err
        assert error.count("warning: ") == bool(warning) and warning in error
    (run / "tags.txt").unlink()
    assert main(["evaluate", str(run), "--split", "test"]) == 1
    assert "tags.txt: cannot be read" in capsys.readouterr().err


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
    evaluations = [entry for entry in read_metrics(run) if "split" in entry]
    assert {(e["split"], e["samples"], e["bad_samples"]) for e in evaluations} == {("val", 7, 1), ("test", 8, 1)}
    assert all(math.isfinite(entry["loss"]) for entry in read_metrics(run))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["samples"], figures["bad_samples"], figures["top1"]) == (8, 1, evaluations[-1]["top1"])


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
    assert read_manifest(shards).resize_note(16, 4) is None
