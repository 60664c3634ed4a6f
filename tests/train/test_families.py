"""Runs of twelve families of timm: trained, resumed, evaluated, exported, and sharded by ZeRO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dist_train.cli import main, parse_recipe
from dist_train.parse import recipe_from_run
from dist_train.train.setup import without_auto
from dist_train.use.trained import load_trained
from tests.harness import error_line, logged_steps, newest_weights, same, train, write_shard_set
from tests.models.timm_families import FAMILIES
from tests.train.family_worker import train_families
from tests.train.forked_ranks import run_on

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [24], "val": [7], "test": [5]}
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, size=(72, 72))


def options_of(name: str) -> dict[str, object]:
    return {
        "model__backbone": name,
        "model__head_init": "default",
        "data__image_size": FAMILIES[name].image_size,
        "train__batch_size": 8,
        "optim__lr": 0.01,
    }


FIRST = ("tiny_dinov3", "tiny_mobilenetv4")  # one of each kind is in the default tests


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_run_is_resumed_evaluated_and_exported_to_timms_model(
    name: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed, options = tmp_path / "whole", tmp_path / "resumed", options_of(name)
    assert train(small, whole, **options) == 0
    assert train(small, resumed, train__stop_after_steps=4, **options) == 0
    assert train(small, resumed, "auto", **options) == 0
    assert same(newest_weights(whole), newest_weights(resumed)) and len(logged_steps(whole)) == 6
    assert main(["evaluate", str(whole), "--split", "test"]) == 0
    assert main(["export", str(whole), str(tmp_path / "w.safetensors")]) == 0
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        described = json.loads(file.metadata()["timm"])
    reference = timm.create_model(described.pop("model"), **described)
    reference.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    trained = load_trained(whole, recipe_from_run(whole))
    side = FAMILIES[name].image_size
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(trained.model(images), reference.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_losses_are_the_same_at_every_stage_of_zero(small: Path, tmp_path: Path) -> None:
    jobs: dict[str, tuple[str, list[str]]] = {}
    for name, family in FAMILIES.items():
        heads = ("cls", "ifa") if family.per_block else ("cls",)
        for head in heads:
            for stage in STAGES:
                more = [f"--deepspeed.zero_stage={stage}", f"--model.head={head}"]
                jobs[f"{name} {head} {stage}"] = (name, more)
    for name in ("tiny_dinov2", "tiny_dinov3", "tiny_deit3", "tiny_beit"):
        for stage in (2, 3):
            more = [f"--deepspeed.zero_stage={stage}", "--model.head=ifa", "--model.checkpoint_blocks=true"]
            jobs[f"{name} recomputed {stage}"] = (name, more)
        if name == "tiny_beit":  # the CPU has no fused attention with a trained bias but in float32
            continue
        jobs[f"{name} bf16 1"] = (name, ["--deepspeed.zero_stage=1", "--deepspeed.precision=bf16", "--model.head=ifa"])
        jobs[f"{name} bf16 0"] = (name, ["--deepspeed.precision=bf16", "--model.head=ifa"])
    run_on(2, tmp_path, train_families, small, jobs, tmp_path / "losses.json")
    losses = json.loads((tmp_path / "losses.json").read_text())
    for job, values in losses.items():
        name, kind, _ = job.split()
        tolerance = 0.05 if kind == "bf16" else 1e-4
        head = "ifa" if kind in ("bf16", "recomputed") else kind
        assert values == pytest.approx(losses[f"{name} {head} 0"], rel=tolerance), job
        assert len({round(value, 6) for value in values}) == 3, job


# ---------------------------------------------------------------- mean and deviation
def test_auto_mean_and_deviation_are_those_of_the_weights_and_stand_in_the_record(small: Path, tmp_path: Path) -> None:
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "w.safetensors"
    options = options_of("tiny_vit") | {"train__epochs": 1, "data__std": "auto"}
    own = {"data__mean": "[0.1,0.2,0.3]", "data__std": "[0.4,0.5,0.6]"}
    assert train(small, first, **(options | own)) == 0
    assert main(["export", str(first), str(file)]) == 0
    for weights in (first, file):
        run = tmp_path / weights.name.replace(".", "-of-")
        if weights is first:
            run = second
        assert train(small, run, model__weights=weights, data__mean="auto", **options) == 0
        data = recipe_from_run(run).data
        assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    # The weights that it started from are not asked again.
    (first / "recipe.yaml").rename(first / "gone.yaml")
    assert (
        train(small, second, "auto", model__weights=first, data__mean="auto", **(options | {"train__epochs": 2})) == 0
    )
    assert recipe_from_run(second).data.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("backbone", "weights", "mean"),
    [
        ("resnet18", "hub", (0.485, 0.456, 0.406)),
        ("vit_base_patch16", "hub", (0.5, 0.5, 0.5)),
        ("vit_small_patch14_dinov2.lvd142m", "hub", (0.485, 0.456, 0.406)),
        ("vit_base_patch16_clip_224", "hub:openai", (0.48145466, 0.4578275, 0.40821073)),
        ("resnet18", "none", (0.5, 0.5, 0.5)),
    ],
)
def test_auto_mean_of_the_hubs_weights_is_what_their_publisher_used(
    tmp_path: Path, backbone: str, weights: str, mean: tuple[float, ...]
) -> None:
    words = [f"--model.backbone={backbone}", f"--model.weights={weights}", "--data.mean=auto", "--data.image_size=224"]
    recipe = without_auto(parse_recipe(words)[0], torch.device("cpu"), 1)
    assert recipe.data.mean == pytest.approx(mean)
    assert recipe.data.std == (0.5, 0.5, 0.5)


# ---------------------------------------------------------------- the list
def test_models_lists_what_fits_a_pattern_with_what_goes_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "tiny_d*"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["backbone", "parameters", "pixels", "ifa", "text", "weights"]
    rows = {line.split()[0]: line.split() for line in lines}
    for name in ("tiny_deit3", "tiny_dinov2", "tiny_dinov3"):
        family = FAMILIES[name]
        assert rows[name][4:6] == ["yes" if family.per_block else "no", "yes" if family.text else "no"]
        parameters = sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
        assert rows[name][1] == f"{parameters / 1e6:.1f}"
    assert main(["models", "tiny_eff*"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[4:6] == ["no", "no"]
    assert main(["models", "no_such_thing"]) == 2
    assert "no backbone's name fits" in error_line(capsys.readouterr().err)
