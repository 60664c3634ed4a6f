"""Training with LoRA: against a loop written by hand, stopped and resumed, and what leaves such a run."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional

from dist_train.cli import main, parse_recipe, recipe_from_run
from dist_train.data.draws import random_bits
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.models.build import build_model
from dist_train.models.saved import list_checkpoints
from dist_train.models.weights import load_weights
from dist_train.place import Place
from dist_train.use.trained import load_trained
from tests import harness
from tests.harness import CLASSES, error_line, logged_steps, newest_weights, same, write_shard_set

LORA = {
    "model__lora": 3,
    "model__lora_alpha": 12,
    "model__head_init": "default",
    "optim__name": "adamw",
    "optim__lr": 0.003,
    "optim__weight_decay": 0.3,
    "optim__schedule": "constant",
    "train__batch_size": 8,
}
arguments, train = (partial(function, **LORA) for function in (harness.arguments, harness.train))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [16], "val": [7]}, baked=20)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at rates that fall by layer."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    assert train(shards, run, optim__layer_decay=0.7) == 0
    return run


def initial(options: list[str]) -> dict[str, torch.Tensor]:
    recipe, _ = parse_recipe(options)
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    return build_model(recipe.model, 16, CLASSES)[0].state_dict()


def layers_of(start: dict[str, torch.Tensor]) -> list[str]:
    """Names of the layers with adapters, as timm has them."""
    return [name.removesuffix(".lora_A.default.weight")[9:] for name in start if name.endswith("lora_A.default.weight")]


def test_it_follows_a_loop_on_timms_model_with_the_low_rank_change_written_out(shards: Path, run: Path) -> None:
    """Rates by block and decay of the adapters included; the backbone itself keeps its weights to the bit."""
    options = arguments(shards, run, optim__layer_decay=0.7)
    recipe, _ = parse_recipe(options)
    start = {name: tensor.clone() for name, tensor in initial(options).items()}
    layers = layers_of(start)
    assert len(layers) == 12 * 4

    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES)
    frozen = {name[9:].replace(".base_layer", ""): start[name] for name in start if ".lora_" not in name}
    head = {f"head.{name}": start[f"head.classifier.{name}"].requires_grad_() for name in ("weight", "bias")}
    frozen = {name: tensor for name, tensor in frozen.items() if name in model.state_dict() and name not in head}
    assert frozen.keys() | head.keys() == model.state_dict().keys()
    pairs = {
        layer: [start[f"backbone.{layer}.lora_{part}.default.weight"].requires_grad_() for part in "AB"]
        for layer in layers
    }
    assert all(b.count_nonzero() == 0 < a.count_nonzero() for a, b in pairs.values())
    groups: list[dict[str, Any]] = [
        {"params": pair, "lr": 0.003 * 0.7 ** (12 - int(layer.split(".")[1])), "weight_decay": 0.3}
        for layer, pair in pairs.items()
    ]
    groups += [
        {"params": [head["head.weight"]], "lr": 0.003, "weight_decay": 0.3},
        {"params": [head["head.bias"]], "lr": 0.003, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    batches = TrainLoader(recipe.data, read_manifest(shards), Place(), batch_size=8, micro_batch=8, seed=0)
    for entry, batch in zip(logged_steps(run), batches, strict=False):
        weights = {**frozen, **head}
        for layer, (a, b) in pairs.items():
            weights[f"{layer}.weight"] = frozen[f"{layer}.weight"] + 12 / 3 * (b @ a)
        loss = functional.cross_entropy(functional_call(model, weights, batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    trained = newest_weights(run)
    kept = {name[9:].replace(".base_layer", ""): tensor for name, tensor in trained.items() if ".lora_" not in name}
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items())
    for layer, (a, b) in pairs.items():
        for part, tensor in (("A", a), ("B", b)):
            torch.testing.assert_close(
                trained[f"backbone.{layer}.lora_{part}.default.weight"], tensor.detach(), rtol=1e-3, atol=2e-5
            )


@pytest.mark.parametrize(
    "more",
    [
        {"train__ema": 0.5, "model__dropout": 0.1, "model__drop_path": 0.1},
        {"deepspeed__precision": "bf16", "deepspeed__zero_stage": 1, "model__checkpoint_blocks": "true"},
    ],
    ids=["ema dropout", "bf16 zero 1"],
)
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(
    shards: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    assert train(shards, tmp_path / "whole", **more) == 0
    assert train(shards, tmp_path / "parts", train__stop_after_steps=3, **more) == 0
    assert train(shards, tmp_path / "parts", "auto", **more) == 0
    assert same(newest_weights(tmp_path / "whole"), newest_weights(tmp_path / "parts"))
    assert [step["loss"] for step in logged_steps(tmp_path / "whole")] == [
        step["loss"] for step in logged_steps(tmp_path / "parts")
    ]


@torch.no_grad()
def test_export_and_model_weights_give_merged_weights_and_the_run_evaluates_and_predicts(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "merged.safetensors"
    assert main(["export", str(run), str(file)]) == 0
    exported = load_file(file)
    merged = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES).eval()
    merged.load_state_dict(exported)
    trained = load_trained(run, recipe_from_run(run))
    batch = next(iter(EvalLoader(trained.recipe.data, read_manifest(shards), "val", trained.place, batch_size=7)))
    logits = trained.forward(batch)
    torch.testing.assert_close(merged(batch.images), logits, rtol=1e-5, atol=1e-5)
    base = newest_weights(run)["backbone.blocks.3.mlp.fc1.base_layer.weight"]
    assert (exported["blocks.3.mlp.fc1.weight"] - base).abs().max() > 1e-4

    # Another run that starts from the folder or the file has the merged weights, with adapters of its own or none.
    for source in (str(run), str(file)):
        for lora in (0, 2):
            options = arguments(shards, run, model__lora=lora, model__weights=source)
            model, report = build_model(parse_recipe(options)[0].model, 16, CLASSES)
            assert report.unused == [] and report.new == []
            model.eval()
            torch.testing.assert_close(model(batch.images), logits, rtol=1e-5, atol=1e-5)

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(harness.jpeg_bytes(1))
    assert main(["evaluate", str(run), "--split", "val"]) == 0
    assert main(["predict", str(run), str(photo)]) == 0


def test_averaged_weights_are_merged_too(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__ema=0.5) == 0
    averaged = load_trained(run, recipe_from_run(run), averaged=True).model
    file = tmp_path / "averaged.safetensors"
    assert main(["export", str(run), str(file), "--ema"]) == 0
    images = torch.randn(3, 3, 16, 16)
    own = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES)
    load_weights(own.state_dict(), f"{run}:ema", "vit_tiny_patch8", "timm")
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(images), averaged(images), rtol=1e-5, atol=1e-5)
    assert same(load_file(file), {name: tensor.clone() for name, tensor in own.state_dict().items()})


def test_rank_and_targets_must_stay_on_a_resume_and_a_change_of_alpha_is_told(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    assert len(list_checkpoints(copy)) == 2
    more = {"optim__layer_decay": 0.7, "train__epochs": 3}
    assert train(shards, copy, "auto", **more, model__lora=4) == 2
    assert "model.lora was 3, now it is 4" in error_line(capsys.readouterr().err)
    assert train(shards, copy, "auto", **more, model__lora_targets="attention") == 2
    assert "model.lora_targets was all, now it is attention" in error_line(capsys.readouterr().err)
    assert train(shards, copy, "auto", **more, model__lora_alpha=6) == 0
    assert "model.lora_alpha 12 -> 6" in (copy / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model__backbone": "resnet18"}, "model.lora: resnet18 has no transformer blocks"),
        ({"model__freeze": "backbone"}, "model.lora freezes the backbone but for its adapters"),
        ({"model__lora": -1}, "model.lora is -1"),
        ({"model__lora_targets": "mlp"}, "model.lora_targets"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], line: str
) -> None:
    assert train(shards, tmp_path / "run", **options) == 2
    assert line in error_line(capsys.readouterr().err)


def test_without_peft_one_line_says_what_to_install(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    assert train(shards, tmp_path / "run") == 2
    assert "pip install 'dist-train[lora]'" in error_line(capsys.readouterr().err)
