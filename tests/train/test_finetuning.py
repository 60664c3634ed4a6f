"""Fine-tuning: rates by layer, frozen layers, class weights, averaged weights, each against its definition."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from torch.nn import functional

from dist_train.cli import main, parse_recipe
from dist_train.data.draws import random_bits
from dist_train.data.loader import Batch, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.models.build import build_model, to_timm_state_dict
from dist_train.models.saved import list_checkpoints, read_averaged_weights, read_weights
from dist_train.place import Place
from dist_train.train.step import make_forward
from tests import harness
from tests.harness import CLASSES, error_line, evaluations, logged_steps, newest_weights, write_shard_set

SCRATCH = {
    "model__backbone": "vit_tiny_patch16",
    "model__head_init": "default",
    "optim__lr": 0.01,
    "optim__schedule": "constant",
    "train__batch_size": 8,
}
arguments, train = (partial(function, **SCRATCH) for function in (harness.arguments, harness.train))
COUNTS = [6, 6, 6, 5]  # of each class among 23 samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [16], "val": [7]}, baked=20)


def test_layer_decay_frozen_layers_and_class_weights_follow_a_plain_loop_on_timms_model(
    shards: Path, tmp_path: Path
) -> None:
    """The rates and decays by parameter are timm's own; weights n / (classes x count) are written out."""
    options = {
        "optim__name": "adamw",
        "optim__lr": 0.0001,
        "optim__weight_decay": 0.5,
        "optim__layer_decay": 0.7,
        "optim__class_weights": "inverse",
        "optim__label_smoothing": 0.1,
        "model__freeze": 3,
    }
    assert train(shards, tmp_path / "run", **options) == 0
    recipe, _ = parse_recipe(arguments(shards, tmp_path / "run", **options))
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    start, _ = to_timm_state_dict(build_model(recipe.model, 16, CLASSES)[0])
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=CLASSES)
    model.load_state_dict(start)
    start = {name: tensor.clone() for name, tensor in start.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        # The final norm learns as the head does (BEiT, MAE); timm counts it to the last block.
        {"params": [p], "lr": 0.0001 * (1 if names[id(p)].startswith("norm.") else g["lr_scale"])}
        | {"weight_decay": g["weight_decay"]}
        for g in param_groups_layer_decay(model, weight_decay=0.5, layer_decay=0.7)
        for p in g["params"]
    ]
    frozen = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1.", "blocks.2.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    optimizer = torch.optim.AdamW(groups)
    class_weights = torch.tensor([23 / (4 * count) for count in COUNTS])
    batches = TrainLoader(recipe.data, read_manifest(shards), Place(), batch_size=8, micro_batch=8, seed=0)
    model.train()
    for entry, batch in zip(logged_steps(tmp_path / "run"), batches, strict=False):
        losses = functional.cross_entropy(model(batch.images), batch.labels, reduction="none", label_smoothing=0.1)
        loss = (class_weights[batch.labels] * losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    trained = build_model(recipe.model, 16, CLASSES)[0]
    trained.load_state_dict(newest_weights(tmp_path / "run"))
    ours, _ = to_timm_state_dict(trained)
    for name, tensor in model.state_dict().items():
        if name.startswith(frozen):
            assert (ours[name] == start[name]).all()
        else:
            assert (ours[name] != start[name]).any()
        if not name.endswith("qkv.bias"):  # the keys' part has no gradient but noise, which AdamW blows up
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16"])
def test_a_frozen_backbone_keeps_weights_and_running_statistics_while_the_head_learns(
    shards: Path, tmp_path: Path, backbone: str
) -> None:
    options = {"model__freeze": "backbone", "model__backbone": backbone}
    recipe, _ = parse_recipe(arguments(shards, tmp_path / "run", **options))
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    model, _ = build_model(recipe.model, 16, CLASSES)
    assert train(shards, tmp_path / "run", train__stop_after_steps=2, **options) == 0
    weights = newest_weights(tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert (weights[name] == tensor).all() != name.startswith("head."), name


def test_averaged_weights_follow_their_formula_survive_stops_and_are_evaluated_and_exported(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, options = tmp_path / "run", {"train__ema": 0.3, "train__keep_checkpoints": 9}
    for step in (1, 2, 3):
        assert train(shards, run, "auto" if step > 1 else "none", train__stop_after_steps=step, **options) == 0
    assert train(shards, run, "auto", **options) == 0
    recipe, _ = parse_recipe(arguments(shards, run))
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    average = build_model(recipe.model, 16, CLASSES)[0].state_dict()
    checkpoints = list_checkpoints(run)
    assert len(checkpoints) == 4
    for decay, checkpoint in zip((2 / 11, 3 / 12, 0.3, 0.3), checkpoints, strict=True):
        weights, saved = read_weights(checkpoint), read_averaged_weights(checkpoint)
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * weights[name]
            torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-7)
    logged = {entry["split"]: entry for entry in evaluations(run)}
    assert logged["val"]["loss"] != logged["val_ema"]["loss"]
    capsys.readouterr()
    for flags, split in ((["--checkpoint", "last"], "val"), (["--ema"], "val_ema")):
        assert main(["evaluate", str(run), "--split", "val", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(logged[split]["loss"], rel=1e-5)
    assert main(["export", str(run), str(tmp_path / "ema.safetensors"), "--ema"]) == 0
    exported = load_file(tmp_path / "ema.safetensors")
    torch.testing.assert_close(exported["head.weight"], average["head.classifier.weight"], rtol=1e-5, atol=1e-7)
    without = tmp_path / "without"
    assert train(shards, without, train__stop_after_steps=1) == 0
    capsys.readouterr()
    assert train(shards, without, "auto", train__ema=0.3) == 2
    assert "holds no averaged weights" in capsys.readouterr().err
    assert main(["evaluate", str(without), "--split", "val", "--ema"]) == 2


def test_channels_last_gives_the_same_losses_and_reaches_every_layer(shards: Path, tmp_path: Path) -> None:
    logged = []
    for value in ("false", "true"):
        options = {"model__backbone": "resnet18", "train__channels_last": value, "train__stop_after_steps": 3}
        assert train(shards, tmp_path / value, **options) == 0
        logged.append([entry["loss"] for entry in logged_steps(tmp_path / value)])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and len(logged[0]) == 3
    recipe, _ = parse_recipe(arguments(shards, tmp_path, model__backbone="resnet18", train__channels_last="true"))
    model, _ = build_model(recipe.model, 64, CLASSES)
    seen: list[bool] = []
    for module in model.backbone.layer4.modules():
        module.register_forward_hook(
            lambda module, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    batch = Batch(torch.rand(2, 3, 64, 64), torch.zeros(2), torch.ones(2), None, None, np.arange(2))
    make_forward(model, recipe, torch.device("cpu"))(batch)
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"data__mixup": 0.2, "train__micro_batch_size": 1}, "which has an odd 1"),
        ({"data__cutmix": -1}, "data.cutmix is -1.0"),
        ({"model__freeze": 13}, "model.freeze is '13'; use none, backbone or a number of blocks from 0 to 12"),
        ({"model__freeze": "some"}, "model.freeze is 'some'"),
        ({"model__freeze": 9, "model__backbone": "resnet18"}, "use none, backbone or a number of layers from 0 to 8"),
        ({"model__checkpoint_blocks": "true", "model__backbone": "resnet18"}, "model.checkpoint_blocks"),
        ({"model__drop_path": 1}, "model.drop_path"),
        ({"optim__class_weights_beta": 1}, "optim.class_weights_beta is 1.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], line: str
) -> None:
    assert train(shards, tmp_path / "run", **options) == 2
    assert line in error_line(capsys.readouterr().err)
