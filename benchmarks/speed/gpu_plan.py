"""What the GPU suite measures, in order: correctness first, then what the targets and the comparisons need. (The run
through the command line takes over a minute, nearly all of it imports: it is made beside the other checks.)

Compiling takes half a minute for a whole ViT-L on one core, and a process may compile one thing at a time: while the
checks run, other processes compile what will be measured, into torch's cache on the disk. `seconds` of a point is what
it takes on an H100 after that, roughly; together they fit into the suite's time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_train.config import (
    DataConfig,
    DataDevice,
    DeepSpeedConfig,
    ModelConfig,
    Precision,
    Recipe,
    TrainConfig,
    ZeroStage,
)

RUN = "check: the command line trains, is stopped, goes on and evaluates"
PRODUCTS = "check: what matrix products are computed in"
LEFT_LIMIT_MB = 16.0
"""What a point may leave allocated by torch; more is held by something that should be gone."""


@dataclass(frozen=True)
class Scale:
    """How large the points are. batches: the largest first. turns: of the contestants of a point, of `steps` steps
    each. loaded_steps: of a turn that loads data. loader_batches: of a turn of a loader alone. run_backbone, run_batch:
    of the run through the command line."""

    large: str
    base: str
    image_size: int
    crop_margin: int
    batches: tuple[int, ...]
    text_tokens: int
    turns: int
    steps: int
    loaded_steps: int
    loader_batches: int
    run_backbone: str
    run_batch: int


FULL = Scale(
    large="vit_large_patch16",
    base="vit_base_patch16",
    image_size=128,
    crop_margin=32,
    batches=(256, 128, 64, 32, 16),
    text_tokens=32,
    turns=10,
    steps=5,
    loaded_steps=20,
    loader_batches=40,
    run_backbone="vit_small_patch16",
    run_batch=64,
)
SMOKE = Scale(
    large="vit_tiny_patch8",
    base="vit_tiny_patch16",
    image_size=32,
    crop_margin=8,
    batches=(8, 4),
    text_tokens=8,
    turns=2,
    steps=1,
    loaded_steps=2,
    loader_batches=2,
    run_backbone="vit_tiny_patch16",
    run_batch=8,
)


@dataclass(frozen=True)
class Point:
    """One row. what: its key. kind, arguments: what the worker measures. seconds: that it may take, as long as none of
    its `similar` ones has been measured. ahead: begun with the first point and waited for in its turn. smoke: whether
    the smoke run has it too."""

    what: str
    kind: str
    arguments: dict[str, Any]
    seconds: float = 5.0
    similar: str = ""
    needs_gpu: bool = False
    ahead: bool = False
    smoke: bool = False

    @property
    def takes_as(self) -> str:
        """The name that points which take about as long share."""
        return self.similar or self.what


def plan(scale: Scale, shards: str) -> list[Point]:
    """All points, the most wanted first."""
    large, base, first, last = scale.large, scale.base, scale.batches[0], scale.batches[-1]
    plain, blocks, whole = ({"bare": ("autocast", how)} for how in ("none", "blocks", "whole"))
    graphs = {"bare_graphs": ("autocast", "reduce-overhead")}
    both: dict[str, Any] = {"ifa": True, "record": True}
    compiled = [
        steps(scale, large, first, compile=True, bare=blocks, shards=shards, seconds=60, smoke=True, **both),
        steps(scale, base, first, compile=True, bare=whole, shards=shards, seconds=40, **both),
        steps(scale, base, last, compile=True, bare=graphs, seconds=25),
    ]
    pure = steps(
        scale, large, first, compile=True, precision="bf16", bare={"bare_pure": ("pure", "blocks")}, seconds=35
    )
    return [
        *checks(scale, shards),
        *(compile_ahead(points) for points in ([compiled[0]], [compiled[1]], [pure, compiled[2]])),
        steps(scale, large, first, bare=plain, seconds=30, smoke=True, **both),
        steps(scale, base, first, bare=plain, shards=shards, seconds=20, smoke=True, **both),
        loader(scale, shards, "gpu", smoke=True),
        *compiled,
        pure,
        # The smallest first: from the two ends of the scale one can guess what lies between.
        *(
            steps(scale, backbone, batch, record=True, turns=3, seconds=seconds, smoke=batch == 4)
            for batch in sorted(scale.batches[1:])
            for backbone, seconds in ((base, 4), (large, 6))
        ),
        steps(scale, base, first, text_tokens=scale.text_tokens, record=True, seconds=6, smoke=True),
        steps(scale, large, first, precision="bf16", zero_stage=1, turns=3, seconds=8, smoke=True),
        steps(scale, base, first, precision="bf16", bare={"bare_pure": ("pure", "none")}, turns=3, seconds=6),
        loader(scale, shards, "cpu", smoke=True),
        loader(scale, shards, "gpu", threads=4),
        steps(scale, base, first, precision="bf16", zero_stage=1, turns=3, seconds=6),
    ]


def checks(scale: Scale, shards: str) -> list[Point]:
    """What is right or wrong; the first of them also pays for the import of everything."""
    pixels = {"shards": shards, "batch": scale.batches[0], "image_size": scale.image_size}
    return [
        Point("check: loss and gradient against float64 on the CPU", "loss", {}, seconds=28, smoke=True),
        Point(
            "check: pixels of the device's pipeline against the CPU's",
            "pixels",
            pixels | {"crop_margin": scale.crop_margin},
            seconds=8,
            smoke=True,
        ),
        Point(
            "check: fp16 with ZeRO 1 trains",
            "training",
            {"precision": "fp16", "zero_stage": 1, "steps": 12},  # the loss scale begins too high and must come down
            needs_gpu=True,
            smoke=True,
        ),
        Point("check: a CUDA graph trains as its kernels do", "graphs", {"steps": 6}, needs_gpu=True, smoke=True),
        Point(PRODUCTS, "products", {}, smoke=True),
        Point(
            RUN,
            "run",
            pixels | {"backbone": scale.run_backbone, "crop_margin": scale.crop_margin, "batch": scale.run_batch},
            seconds=90,
            ahead=True,
            smoke=True,
        ),
    ]


def compile_ahead(points: list[Point]) -> Point:
    """Compiles in a process of its own what these points need; all that it leaves is in torch's cache."""
    what = "ahead: compiles " + " and ".join(point.what.removeprefix("step: ") for point in points)
    return Point(
        what, "compile", {"points": [point.arguments for point in points]}, seconds=100, needs_gpu=True, ahead=True
    )


def steps(
    scale: Scale,
    backbone: str,
    batch: int,
    *,
    text_tokens: int = 0,
    precision: Precision = "bf16_autocast",
    zero_stage: ZeroStage = 0,
    compile: bool = False,
    bare: dict[str, tuple[str, str]] | None = None,
    ifa: bool = False,
    record: bool | None = None,
    shards: str = "",
    turns: int | None = None,
    seconds: float = 5.0,
    smoke: bool = False,
) -> Point:
    """The steps of a model on one batch that stays on the device, in turns with whatever else is named.

    bare: plain loops by name, each autocast or pure, and what compiles it. ifa: the same model with the IFA head, too.
    record: afterwards as a CUDA graph, too (None: where it is compiled). shards: also on what is loaded from there.
    turns: fewer than the scale's.
    """
    model = ModelConfig(backbone=backbone, text_tokens=text_tokens, compile="kernels" if compile else "none")
    what = f"step: {backbone} {model.head} batch {batch}, {precision}"
    what += f", {text_tokens} text tokens" if text_tokens else ""
    what += f", ZeRO {zero_stage}" if zero_stage else ""
    what += ", compiled" if compile else ""
    arguments = {
        "recipe": asdict(recipe_of(scale, model, batch, precision, zero_stage, shards)),
        "bare": bare or {},
        "ifa": ifa,
        "record": compile if record is None else record,
        "loaded": bool(shards),
        "turns": min(turns or scale.turns, scale.turns),
        "steps": scale.steps,
        "loaded_steps": scale.loaded_steps,
    }
    # A CPU takes minutes to compile even a tiny model.
    return Point(what, "steps", arguments, seconds, needs_gpu=compile, smoke=smoke)


def loader(scale: Scale, shards: str, device: DataDevice, *, threads: int = 0, smoke: bool = False) -> Point:
    """The training loader in turns with DALI's usual pipeline on the same threads (0: all cores)."""
    batch = scale.batches[0]
    recipe = recipe_of(scale, ModelConfig(backbone=scale.base), batch, "bf16_autocast", 0, shards)
    recipe = replace(recipe, data=replace(recipe.data, device=device, threads=threads))
    what = f"loader: on the {device.upper()}, batch {batch}" + (f", {threads} threads" if threads else "")
    arguments = {"recipe": asdict(recipe), "turns": 3, "batches": scale.loader_batches}
    return Point(what, "loader", arguments, 10, f"loader {device}", device == "gpu", smoke=smoke)


def recipe_of(
    scale: Scale, model: ModelConfig, batch: int, precision: Precision, zero_stage: ZeroStage, shards: str
) -> Recipe:
    """The paper's image size and optimizer, one micro-batch a step."""
    shards = shards or DataConfig().shards  # the default's are not read
    return Recipe(
        data=DataConfig(shards=shards, image_size=scale.image_size, crop_margin=scale.crop_margin),
        model=model,
        train=TrainConfig(batch_size=batch),
        deepspeed=DeepSpeedConfig(precision=precision, zero_stage=zero_stage),
    )
