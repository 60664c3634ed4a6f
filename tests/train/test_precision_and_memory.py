"""What saves memory or time on two ranks trains as one process does in float32 that keeps everything."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig as ParsedSettings
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.own_step import synthetic_batch
from dist_train.config import Recipe
from dist_train.errors import UseError
from dist_train.models.build import build_model
from dist_train.models.names import VIT_SIZES
from dist_train.recipe import check_combination
from dist_train.train import settings as settings_module
from dist_train.train.engine import build_engine, init_process_group
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter
from dist_train.train.settings import deepspeed_settings
from dist_train.train.step import TrainStep, make_forward
from tests.harness import CLASSES, environment, write_shard_set
from tests.train.deepspeed_worker import BATCH, DEEPER, NARROW, losses_through_deepspeed, recipe_of

STEPS = 10
ADAMW = ["--optim.name=adamw", "--optim.lr=0.0005", "--optim.weight_decay=0.05"]
IFA = ["--model.head=ifa"]
LAYERS = ["--optim.layer_decay=0.5", "--model.freeze=1"]
LORA = ["--model.lora=2", "--optim.layer_decay=0.5", "--optim.name=adamw", "--optim.lr=0.005"]
DEEP = ["--model.backbone=vit_small_patch16", *ADAMW]
TIMM = ["--model.backbone=test_vit", "--model.head=ifa", *ADAMW]
MIXED = ["--data.mixup=0.4", "--data.cutmix=1.0", "--optim.label_smoothing=0.1", "--optim.class_weights=effective"]

# What one process trains, in float32 under ZeRO 0; and, of that, what two ranks train in another way.
ALONE = {
    "adamw": ADAMW,
    "ifa": [*IFA, *ADAMW],
    "layers": [*LAYERS, *ADAMW],
    "head": ["--model.freeze=backbone", *ADAMW],
    "lora": LORA,
    "deep": DEEP,
    "deep-ifa": [*DEEP, *IFA],
    "deep-layers": [*DEEP, *IFA, "--model.freeze=2"],
    "deep-lora": [*DEEP, *LORA],
    "deep-vilt": [*DEEP, "--model.text_tokens=4"],
    "timm": TIMM,
    "timm-layers": [*TIMM, "--model.freeze=2"],
    "mixed": [*MIXED, *ADAMW],
}
SAME = {
    **{f"adamw offload optimizer zero {stage}": ["--deepspeed.offload=optimizer"] for stage in (1, 2, 3)},
    "adamw offload parameters zero 3": ["--deepspeed.offload=parameters"],
    **{f"ifa checkpoint_blocks zero {stage}": ["--model.checkpoint_blocks=true"] for stage in (0, 1, 2, 3)},
    **{f"ifa compile zero {stage}": ["--model.compile=kernels"] for stage in (0, 1, 2)},
    **{f"layers decayed and frozen zero {stage}": [] for stage in (0, 1, 2, 3)},
    # DeepSpeed before 0.19.3 raised CheckpointError for frozen layers with the first of these and ZeRO 3.
    **{
        f"{name} checkpoint_blocks zero {stage}": ["--model.checkpoint_blocks=true"]
        for name in ("layers", "head", "lora")
        for stage in (2, 3)
    },
    **{f"head zero {stage}": [] for stage in (0, 3)},
    **{f"lora zero {stage}": [] for stage in (0, 1, 2, 3)},
    **{
        f"{name} {way} zero 3": options
        for name in ("deep", "deep-ifa", "deep-layers", "deep-lora", "deep-vilt", "timm", "timm-layers")
        for way, options in (("at once", []), ("checkpoint_blocks", ["--model.checkpoint_blocks=true"]))
    },
    "deep-ifa in micro-batches of 2 zero 3": ["--train.micro_batch_size=2"],
    **{f"mixed in micro-batches of {size} zero 0": [f"--train.micro_batch_size={size}"] for size in (2, 4)},
}
NEAR = {f"ifa bf16 zero {stage}": ["--deepspeed.precision=bf16"] for stage in (0, 1, 2, 3)}
BETWEEN = (
    "adamw offload optimizer zero 2",
    *(f"ifa checkpoint_blocks zero {stage}" for stage in (1, 2)),
    *(f"ifa compile zero {stage}" for stage in (0, 2)),
    *(f"layers decayed and frozen zero {stage}" for stage in (1, 2)),
    *(f"{name} checkpoint_blocks zero 2" for name in ("layers", "head", "lora")),
    *(f"lora zero {stage}" for stage in (1, 2)),
    *(f"ifa bf16 zero {stage}" for stage in (1, 2)),
    *(f"{name} at once zero 3" for name in ("deep", "deep-ifa", "deep-vilt", "timm")),
    *(f"{name} checkpoint_blocks zero 3" for name in ("deep", "deep-layers", "deep-lora", "deep-vilt", "timm-layers")),
    "deep-ifa in micro-batches of 2 zero 3",
)
"""Ways whose neighbours are in the usual run of the tests."""


def named(ways: dict[str, list[str]]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in BETWEEN else name for name in ways]


@pytest.fixture(scope="module")
def losses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By name, of one process and of two; of what the tests that were asked for compare."""
    folder = tmp_path_factory.mktemp("precision")
    shards = write_shard_set(folder / "set", {"train": [11, 8, 5]}, baked=36, text=True)
    asked = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    names = {call.params["name"] for call in asked if "name" in call.params}
    divided = {
        name: [*ALONE[name.split()[0]], *options, f"--deepspeed.zero_stage={name[-1]}"]
        for name, options in {**SAME, **NEAR}.items()
        if name in names
    }
    alone = losses_through_deepspeed(shards, ALONE, 1, folder, STEPS)
    return alone | losses_through_deepspeed(shards, divided, 2, folder, STEPS)


@pytest.mark.launch
@pytest.mark.parametrize("name", named(SAME))
def test_two_ranks_have_the_losses_of_one_process(losses: dict[str, list[float]], name: str) -> None:
    assert losses[name] == pytest.approx(losses[name.split()[0]], rel=1e-4 if "compile" in name else 1e-5)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        (DEEP, [0, 1, 2, 3, 4]),
        ([*DEEP, "--model.freeze=2"], [0, 1, 3, 4]),
        ([*DEEP, "--model.freeze=backbone"], [0, 1, 2, 3, 4]),
        (TIMM, [0, 1, 2, 3, 4]),
    ],
)
def test_zero_3_gathers_blocks_as_wholes(options: list[str], whole: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's hooks on every layer are most of what it takes of the host's time."""
    monkeypatch.setitem(VIT_SIZES, "small", DEEPER)
    recipe = recipe_of(Path(), [*options, "--deepspeed.zero_stage=3"])
    engine = build_engine(build_model(recipe.model, 32, CLASSES, 0)[0], recipe, init_process_group(), BATCH)
    blocks = engine.module.backbone.blocks
    assert [number for number, block in enumerate(blocks) if not block.attn.qkv._forward_hooks] == whole
    assert all(block._forward_hooks for block in blocks)
    engine.destroy()


@pytest.mark.launch
@pytest.mark.parametrize("name", named(NEAR))
def test_bf16_stays_near_float32(losses: dict[str, list[float]], name: str) -> None:
    expected = losses[name.split()[0]]
    assert losses[name] == pytest.approx(expected, rel=0.05) and losses[name] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_scales_the_loss_and_follows_overflows(stage: int) -> None:
    """The settings as DeepSpeed understands them; the run needs a GPU."""
    recipe = recipe_of(Path(), ["--deepspeed.precision=fp16", f"--deepspeed.zero_stage={stage}"])
    settings = ParsedSettings(deepspeed_settings(recipe, 1, BATCH, 10_000))
    assert settings.float16_config.enabled and not settings.bfloat16_config.enabled
    assert settings.float16_config.loss_scale == 0 and settings.float16_config.initial_scale_power == 16
    check_combination(recipe, "cuda")


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_starts_whatever_number_of_parameters_a_model_has(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses buckets of an odd size, which a tenth of a ViT-L's parameters was."""
    monkeypatch.setattr(settings_module, "_SMALLEST_BUCKET", 1)
    recipe = recipe_of(Path(), [f"--deepspeed.zero_stage={stage}"])
    for parameters in range(40):
        buckets = deepspeed_settings(recipe, 1, BATCH, 303_301_000 + parameters)["zero_optimization"]
        assert buckets["reduce_bucket_size"] % 2 == buckets["allgather_bucket_size"] % 2 == 0
    started = 0
    for classes in range(CLASSES, CLASSES + 10):  # each adds as many parameters as the model has channels, and one
        model, _ = build_model(recipe.model, 32, classes, 0)
        if sum(parameter.numel() for parameter in model.parameters()) // 10 % 2:
            build_engine(model, recipe, init_process_group(), BATCH)
            started += 1
            break
    assert started


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--deepspeed.offload=optimizer"], "deepspeed.offload optimizer needs deepspeed.zero_stage 1, 2 or 3"),
        (
            ["--deepspeed.offload=parameters", "--deepspeed.zero_stage=2"],
            "deepspeed.offload parameters needs deepspeed.zero_stage 3, not 2",
        ),
        (["--train.ema=0.9", "--deepspeed.zero_stage=3"], "train.ema needs whole parameters"),
        (["--model.compile=kernels", "--deepspeed.zero_stage=3"], "model.compile"),
        (["--train.channels_last=true"], "train.channels_last is for CNNs; with vit_tiny_patch16 use false"),
        (["--deepspeed.precision=fp16"], "fp16 needs a GPU"),
        (
            ["--model.backbone=resnet18", "--deepspeed.precision=bf16", "--deepspeed.zero_stage=1"],
            "resnet18 has batch norms, whose float32 statistics DeepSpeed's bf16 cannot take",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(arguments: list[str], line: str) -> None:
    recipe: Recipe = recipe_of(Path(), arguments)
    with pytest.raises(UseError) as error:
        check_combination(recipe, "cpu")
    assert line in str(error.value) and "\n" not in str(error.value)


def small_step(options: list[str]) -> tuple[TrainStep, Callable[[], None]]:
    """A trainer of a small model with one step behind it, and what makes another."""
    recipe = recipe_of(Path(), [*options, "--model.head=ifa"])
    device = torch.device("cpu")
    model, _ = build_model(recipe.model, 32, CLASSES, 0)
    engine = build_engine(model, recipe, init_process_group(), BATCH)
    objective = Objective(recipe.optim, [1] * CLASSES, device)
    step = TrainStep(engine, make_forward(engine, recipe, device), objective, recipe, 1, 0, StepMeter(device, 1, 1))
    batches = repeat(synthetic_batch(recipe, BATCH, CLASSES, device))
    step(batches, 0.01, 0)
    return step, lambda: step(batches, 0.01, 1)


class Operators(TorchDispatchMode):
    """Counts operators that compute something, while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_sharding_costs_a_copy_for_each_parameter_and_neither_norms_nor_looks_for_overflows(
    monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    """DeepSpeed's defaults are 14 operators a parameter and step more, which a GPU waits for the host to launch."""
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)
    counts = {}
    for zero in (0, stage):
        step, again = small_step([f"--deepspeed.precision={precision}", f"--deepspeed.zero_stage={zero}"])
        with Operators() as operators:
            again()
        counts[zero] = operators.count
    parameters = sum(1 for _ in step.engine.module.parameters())
    # Under autocast ZeRO 0 casts each weight matrix; the sharded weights are bf16 already.
    assert counts[stage] - counts[0] <= parameters + 20


@pytest.mark.parametrize("options", [[], ["--deepspeed.zero_stage=1"], ["--deepspeed.zero_stage=2"]], ids=str)
def test_a_finished_engine_holds_nothing(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several can be measured after each other in one process. (ZeRO 3 keeps its parameters in a global.)"""
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)
    step, again = small_step(options)
    again()
    parameter = weakref.ref(next(step.engine.module.parameters()))
    step.engine.destroy()
    del step, again
    gc.collect()
    assert parameter() is None


def test_a_step_at_zero_0_calls_nothing_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine took two fifths of a small step's time on the host."""
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)
    called: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            called.add(frame.f_code.co_filename)

    for options, used in (([], False), (["--deepspeed.zero_stage=1"], True)):
        _, again = small_step(options)
        called.clear()
        sys.setprofile(note)
        try:
            again()
        finally:
            sys.setprofile(None)
        assert any(f"{os.sep}deepspeed{os.sep}" in name for name in called) == used


# In a process of its own: what other tests have left may be collected, and its memory given back, at any moment.
MEMORY_OF_STEPS = """
import numpy as np, torch
from dist_train.train.meters import StepMeter

def take():
    np.ones(300_000_000, np.uint8)

meter = StepMeter(torch.device("cpu"), 1.0, 1.0)
take()
meter.reset()
meter.step(1)
with meter.paused():
    take()
quiet = meter.read()["memory_mb"]
meter.reset()
take()
meter.step(1)
with meter.paused():
    pass
print(quiet, meter.read()["memory_mb"], meter.highest_mb)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone lets a process forget its peak")
def test_memory_figures_are_those_of_the_steps_and_not_of_what_came_before_or_in_between() -> None:
    """300 MB that are gone when the steps begin, and 300 MB in a pause, are in no figure; 300 MB in a step are."""
    command = [sys.executable, "-c", MEMORY_OF_STEPS]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    quiet, busy, highest = map(float, done.stdout.split())
    assert busy - quiet > 250 and highest == busy
