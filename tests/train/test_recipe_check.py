"""What a recipe asks for that cannot be: `train` and `doctor` say the same of it, at once."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.cli import main
from dist_train.cluster import probe
from dist_train.cluster.doctor import state_bytes
from dist_train.config import DataConfig
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError
from dist_train.machine import available_memory
from dist_train.models.build import build_model
from dist_train.parse import parse_recipe
from dist_train.recipe import AUGMENTATION_OFF, check_step, problems
from dist_train.train.memory import predict_step
from tests.harness import REPOSITORY, write_shard_set

# What is wrong, and what is said of it. {folder} is that of the test, where `set` is a shard set of 32 images without
# tags, `tagged` one with, and `old` a run.
REFUSED = {
    "backbone": ("--model.backbone=vit_bse_patch16", "did you mean vit_base_patch16?"),
    "patch": ("--data.image_size=40", "patches of 16 pixels, which do not divide data.image_size 40"),
    "ifa on a CNN": (
        "--model.backbone=resnet18 --model.head=ifa",
        "model.head: ifa needs the [CLS] token of every block",
    ),
    "freeze": ("--model.freeze=13", "model.freeze is '13'"),
    "layers": ("--model.backbone=resnet18 --model.freeze=9", "model.freeze is '9'"),
    "weights": ("--model.weights={folder}/none.pth", "model.weights: there is no file {folder}/none.pth"),
    "weights of no run": ("--model.weights={folder}/none", "nor the folder of a run or checkpoint that is there"),
    "weights' kind": ("--model.weights=imagenet", "model.weights: 'imagenet' is not none, hub, hub:TAG or a file"),
    "run": ("--train.run={folder}/old", "{folder}/old already holds a run; add --resume auto"),
    "run is a file": ("--train.run={folder}/ds.json/run", "{folder}/ds.json is a file; choose another train.run"),
    "tokenizer": (
        "--data.shards={folder}/tagged --model.text_tokens=8 --data.tokenizer={folder}/none.txt",
        "none.txt: no such file",
    ),
    "tokenizer's folder": (
        "--data.shards={folder}/tagged --model.text_tokens=8 --data.tokenizer={folder}/tagged",
        "{folder}/tagged: a folder; name the vocab.txt in it",
    ),
    "no room for tags": (
        "--data.shards={folder}/tagged --model.text_tokens=2",
        "model.text_tokens is 2, and a WordPiece",
    ),
    "ranks": ("--train.batch_size=9", "train.batch_size 9 does not divide over 2 ranks; use 8 or 10"),
    "micro-batch": ("--train.micro_batch_size=3", "train.micro_batch_size 3 does not divide the 4 samples"),
    "crop's range": ("--data.crop_ratio=[2,1]", "data.crop_ratio is [2.0, 1.0]; the first number must not be above"),
    "blur of few pixels": (
        "--model.backbone=vit_tiny_patch2 --data.blur=0.5 --data.image_size=4",
        "data.blur reflects 4 pixels at the border",
    ),
    "skipped steps": ("--train.micro_batch_size=2 --train.skip_bad_steps=1", "train.skip_bad_steps needs one micro-"),
    "odd pairs": ("--train.micro_batch_size=1 --data.mixup=0.2", "which has an odd 1"),
    "mixed tags": (
        "--data.shards={folder}/tagged --data.tokenizer=tags --model.text_tokens=8 --data.cutmix=1",
        "tags cannot be mixed",
    ),
    "streams": ("--data.streams=3", "data.streams 3 does not divide train.batch_size 8"),
    "DeepSpeed file": ("--deepspeed.config={folder}/none.json", "none.json: cannot be read as JSON"),
    "DeepSpeed's own": ("--deepspeed.config={folder}/ds.json", "ds.json: gradient_clipping is 5"),
    "DeepSpeed's optimizer": (
        "--deepspeed.config={folder}/adam.json",
        "adam.json: optimizer is what the recipe's",
    ),
    "DeepSpeed's offload": (
        "--deepspeed.config={folder}/offload.json --deepspeed.zero_stage=1",
        "offload.json: zero_optimization.offload_optimizer.device is 'cpu', but deepspeed.offload is none",
    ),
    "no set": ("--data.shards={folder}/none", "{folder}/none: no such shard set"),
    "empty val": ("--data.shards={folder}/unseen", "the split val holds no samples to evaluate on"),
    "other set": ("--data.digest=0123", "data.digest is 0123, but {folder}/set has digest "),
    "warm-up": ("--optim.warmup_steps=99", "optim.warmup_steps 99 leaves nothing of the run's 4 steps"),
    "no tags": ("--data.tokenizer=tags --model.text_tokens=8", "the shard set {folder}/set has none"),
    "offload": ("--deepspeed.offload=optimizer", "deepspeed.offload optimizer needs deepspeed.zero_stage"),
    "averages": ("--train.ema=0.9 --deepspeed.zero_stage=3", "train.ema needs whole parameters"),
    "channels": ("--train.channels_last=true", "train.channels_last is for CNNs"),
    "hub tag": ("--model.weights=hub:nonsense", "timm has no weights nonsense for vit_tiny_patch16"),
}
if importlib.util.find_spec("wandb") is None:
    REFUSED["wandb"] = ("--train.wandb_project=mine", "pip install wandb")
if not torch.cuda.is_available():
    REFUSED["fp16"] = ("--deepspeed.precision=fp16", "deepspeed.precision fp16 needs a GPU")
    REFUSED["tf32"] = ("--deepspeed.precision=tf32", "deepspeed.precision tf32 needs a GPU")
    REFUSED["data.device"] = ("--data.device=gpu", "data.device is gpu, but this machine has none")
    REFUSED["graphs"] = ("--model.compile=graphs", "model.compile graphs needs a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    write_shard_set(folder / "set", {"train": [16, 16]})
    write_shard_set(folder / "tagged", {"train": [16, 16]}, text=True)
    write_shard_set(folder / "unseen", {"train": [16, 16], "val": [0]})
    (folder / "old").mkdir()
    (folder / "old" / "metrics.jsonl").write_text("")
    (folder / "ds.json").write_text(json.dumps({"gradient_clipping": 5}))
    (folder / "adam.json").write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}))
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    (folder / "offload.json").write_text(json.dumps(offload))
    return folder


def words_of(folder: Path, options: str = "") -> list[str]:
    base = "--data.shards={folder}/set --data.image_size=32 --model.backbone=vit_tiny_patch16 --train.epochs=1 "
    return (base + "--train.batch_size=8 --train.run={folder}/run " + options).format(folder=folder).split()


@pytest.mark.parametrize("what", REFUSED)
def test_train_refuses_before_it_begins_with_the_first_of_the_problems_that_doctor_names(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, line = REFUSED[what]
    recipe, resume = parse_recipe(words_of(folder, options))
    named = [str(problem) for problem in problems(recipe, 2, resume=resume)]
    assert len(named) == 1 and line.format(folder=folder) in named[0] and "\n" not in named[0]

    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher says it; there is no other rank that could be met
    assert main(["train", *words_of(folder, options)]) == 2
    assert capsys.readouterr().err == f"error: {named[0]}\n"
    assert not (folder / "run").exists()


def test_what_can_be_has_no_problems_and_an_old_run_none_that_is_resumed(folder: Path) -> None:
    recipe, _ = parse_recipe(words_of(folder))
    assert not list(problems(recipe, 2, manifest=read_manifest(folder / "set")))
    recipe, resume = parse_recipe([*words_of(folder), f"--train.run={folder / 'old'}", "--resume=auto"])
    assert not list(problems(recipe, 2, resume=resume))


def test_doctor_names_all_problems_at_once_in_the_words_of_train(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together = [what for what in ("run", "streams", "no set", "wandb", "fp16", "data.device") if what in REFUSED]
    assert main(["doctor", *words_of(folder, " ".join(REFUSED[what][0] for what in together))]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert len(said) == len(together)
    for what in together:
        who = "this machine, data.shards" if what == "no set" else "recipe"
        assert any(line.startswith(f"fail {who}: ") and REFUSED[what][1].format(folder=folder) in line for line in said)


@pytest.mark.parametrize("what", ["backbone", "patch", "layers", "ranks", "micro-batch", "odd pairs", "offload"])
def test_a_step_is_refused_in_the_same_words_where_there_is_no_run(folder: Path, what: str) -> None:
    options, line = REFUSED[what]
    recipe, _ = parse_recipe(words_of(folder, f"{options} --data.shards={folder}/none --train.run={folder}/old"))
    with pytest.raises(UseError, match=re.escape(line.format(folder=folder))):
        check_step(recipe, 2, "cpu")


@pytest.mark.parametrize(
    ("options", "held", "written"),
    [
        ("", 100 * 4 + 10 * (4 + 4), 100 * 4 + 10 * 4),
        ("--optim.name=adamw --train.ema=0.9", 100 * (4 + 4) + 10 * (4 + 8), 100 * (4 + 4) + 10 * 8),
        ("--optim.momentum=0 --deepspeed.zero_stage=1", 100 * 4 + 10 * 4 + 10 * 4 / 2, 100 * 4),
        ("--deepspeed.zero_stage=2 --deepspeed.offload=optimizer", 100 * 4 + 10 * 4 / 2, 100 * 4 + 10 * 4),
        ("--deepspeed.zero_stage=3 --deepspeed.precision=bf16", (100 * 2 + 10 * (2 + 4 + 4)) / 2, 100 * 4 + 10 * 4),
    ],
)
def test_doctor_counts_gradients_and_optimizer_states_of_what_is_trained(
    options: str, held: float, written: float
) -> None:
    recipe, _ = parse_recipe(["--deepspeed.precision=float32", *options.split()])
    assert state_bytes(recipe, parameters=100, trained=10, ranks=2, on_gpu=True) == (held, written)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("options", ["float32 --optim.name=adamw", "bf16 --optim.name=sgd --model.freeze=6"])
def test_doctor_counts_as_the_memory_of_a_step_is_predicted(options: str, stage: int) -> None:
    """Which is held to what DeepSpeed takes, in test_memory.py."""
    small = "--model.backbone=vit_tiny_patch16 --data.image_size=32 --train.batch_size=4 --deepspeed.zero_stage="
    recipe, _ = parse_recipe([*f"{small}{stage} --deepspeed.precision={options}".split()])
    with torch.device("meta"):
        model, _ = build_model(recipe.model, recipe.data.image_size, 7)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    held, _ = state_bytes(recipe, sum(parameter.numel() for parameter in model.parameters()), trained, ranks=2)
    step = predict_step(recipe, outputs=7, world_size=2)
    assert held / 1e6 == pytest.approx(step.weights_mb + step.gradients_mb + step.optimizer_mb, abs=0.2)


def test_doctor_names_what_building_the_model_refuses_beside_all_else(folder: Path, capsys: Any) -> None:
    options = "--model.backbone=resnet34 --model.lora=8"
    assert main(["doctor", *words_of(folder, options)]) == 1
    said = capsys.readouterr().out
    assert "fail recipe: model.lora: resnet34 has no linear layers in blocks" in said and "ok   this machine: " in said


def test_the_folder_above_one_that_cannot_be_is_found(tmp_path: Path) -> None:
    assert probe.existing_folder(tmp_path / ("long" * 100) / "run") == tmp_path


def test_a_host_has_no_more_memory_than_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "available_memory", partial(available_memory, tmp_path))
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    for name, content in {"memory.max": "5000", "memory.current": "2000", "memory.stat": "inactive_file 0"}.items():
        (group / name).write_text(content)
    assert probe.describe_host("none", tmp_path, tmp_path)["memory_free"] == 3000


def test_the_digest_by_which_doctor_compares_hosts_is_of_all_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "dist_train"
    shutil.copytree(Path(probe.__file__).parents[1], other, ignore=shutil.ignore_patterns("recipes", "__pycache__"))
    here = probe.code_digest()
    monkeypatch.setattr(probe, "__file__", str(other / "cluster" / "probe.py"))
    assert probe.code_digest() == here
    with (other / "train" / "loop.py").open("a") as file:
        file.write("# another commit\n")
    assert probe.code_digest() != here


AT_ONCE = """
import ctypes, sys
from dist_train.cli import main
try:
    ctypes.CDLL("libcuda.so.1")
    of_devices = []
except OSError:
    of_devices = [["--deepspeed.precision=fp16"], ["--data.device=gpu"]]
for line in [*sys.argv[1:], *of_devices]:
    options = line if isinstance(line, list) else line.split()
    assert main(["train", *of_a_run, *options]) == 2, options
slow = {"torch", "timm", "deepspeed", "nvidia.dali", "transformers"} & set(sys.modules)
assert not slow, slow
"""


def test_what_is_wrong_is_told_before_the_slow_imports_and_before_the_hub_is_asked(folder: Path) -> None:
    # Whether a name that is not one of the paper's is a model, only timm knows.
    slow = ("backbone", "hub tag", "fp16", "tf32", "data.device", "graphs")
    options = [REFUSED[what][0] for what in REFUSED if what not in slow]
    asks_the_hub = "--model.weights=hub --optim.warmup_steps=99"
    lines = [one.format(folder=folder) for one in [*options, asks_the_hub, "--model.backbne=x", "--train.early_stop=3"]]
    script = AT_ONCE.replace("*of_a_run", f"*{words_of(folder)!r}")
    environment = {"PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script, *lines], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == done.stderr.count("\n") >= len(lines)


def test_every_key_of_the_data_section_augments_or_is_known_not_to() -> None:
    """A new one that augments and is not in the list would be ignored by data.feature_cache, without a word."""
    beside = {"crop_scale", "crop_ratio", "randaugment_ops", "randaugment_magnitude", "blur_sigma"}  # of the others
    where = {"shards", "cache", "cache_gb", "digest", "feature_cache", "streams", "shuffle_window", "device", "threads"}
    what = {"image_size", "eval_crop", "eval_crop_pct", "mean", "std", "tokenizer", "tag_order", "tag_vocabulary"}
    what |= {"tag_min_count", "labels", "prefetch", "max_bad_samples", "max_pixels"}
    keys = {key.name for key in fields(DataConfig)}
    assert keys == AUGMENTATION_OFF.keys() | beside | where | what
