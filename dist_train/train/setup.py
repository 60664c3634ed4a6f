"""What the steps of a recipe need, built once for runs, benchmarks and tests alike: first the model, then the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dist_train.config import Recipe
from dist_train.data.draws import Draw, random_bits
from dist_train.data.manifest import Manifest
from dist_train.data.plan import micro_batch_of
from dist_train.models.build import Classifier, build_model
from dist_train.models.pretrained import normalisation
from dist_train.models.saved import read_document
from dist_train.models.weights import LoadReport
from dist_train.place import Place
from dist_train.train.badsteps import BadSteps
from dist_train.train.engine import build_engine, compile_mode, torch_device
from dist_train.train.inputs import one_sample
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter, device_name, training_flops_per_sample
from dist_train.train.noise_scale import NoiseMeter
from dist_train.train.settings import precision_of
from dist_train.train.step import TrainStep, make_forward


def without_auto(recipe: Recipe, device: torch.device, world_size: int, checkpoint: Path | None = None) -> Recipe:
    """The recipe with what `auto` is here, in model.compile, deepspeed.precision, data.mean and data.std."""
    recipe = with_normalisation(recipe, checkpoint)
    return replace(
        recipe,
        model=replace(recipe.model, compile=compile_mode(recipe, device, world_size)),
        deepspeed=replace(recipe.deepspeed, precision=precision_of(recipe.deepspeed)),
    )


def with_normalisation(recipe: Recipe, checkpoint: Path | None = None) -> Recipe:
    """The recipe with numbers for data.mean and data.std `auto`, as loaders need them: those of the weights that it
    starts from, or of the checkpoint that it goes on from."""
    data = recipe.data
    if "auto" not in (data.mean, data.std):
        return recipe
    if checkpoint is None:
        mean, std = normalisation(recipe.model, data.image_size)
    else:
        mean, std = (tuple(read_document(checkpoint)["recipe"]["data"][key]) for key in ("mean", "std"))
    data = replace(data, mean=mean if data.mean == "auto" else data.mean, std=std if data.std == "auto" else data.std)
    return replace(recipe, data=data)


def run_in_a_line(recipe: Recipe, manifest: Manifest, place: Place) -> str:
    """What a run is, for the first line of its log: device, ranks, precision, classes, samples, run folder."""
    hosts = place.world_size // place.local_world_size
    ranks = "1 process" if place.world_size == 1 else f"{place.world_size} ranks"
    where = f"{ranks}{f' on {hosts} hosts' if hosts > 1 else ''}, {device_name(torch_device(place))}"
    counts = ", ".join(f"{info.samples:,} {split}" for split, info in manifest.splits.items())
    return (
        f"{where}; {recipe.deepspeed.precision}, ZeRO {recipe.deepspeed.zero_stage}; "
        f"{len(manifest.classes):,} classes, {counts} samples; run folder {recipe.train.run}"
    )


def initial_model(recipe: Recipe, class_names: Sequence[str], vocab_size: int = 0) -> tuple[Classifier, LoadReport]:
    """The model that a run of the recipe begins with, and an account of its weights; see `build_model`.

    Sets the seed of torch's global generator to the recipe's.
    """
    torch.manual_seed(int(random_bits(recipe.train.seed, Draw.WEIGHTS) >> 1))
    return build_model(recipe.model, recipe.data.image_size, len(class_names), vocab_size, class_names)


def build_step(
    model: Classifier,
    recipe: Recipe,
    place: Place,
    class_counts: Sequence[int],
    bad_steps: BadSteps | None = None,
    graphs: bool | None = None,
) -> TrainStep:
    """What makes the optimizer steps of the recipe, with its engine around the model, on this rank.

    All ranks build it together. class_counts: images of each class, by id. graphs: whether forward and backward pass
    are a CUDA graph; None: as the recipe says. Raises UseError for settings that do not go together.
    """
    device = torch_device(place)
    if graphs is None:
        graphs = compile_mode(recipe, device, place.world_size) == "graphs"
    micro_batch = micro_batch_of(recipe.train.batch_size, place.world_size, recipe.train.micro_batch_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = one_sample(recipe) if model.feature_shape is None else (torch.zeros(1, *model.feature_shape),)
    if recipe.model.checkpoint_blocks:
        model.recompute_blocks(False)
    flops = training_flops_per_sample(model, *inputs)
    if recipe.model.checkpoint_blocks:
        model.recompute_blocks(True)
    engine = build_engine(model, recipe, place, micro_batch)
    accumulation = recipe.train.batch_size // (place.world_size * micro_batch)
    noise = None
    if recipe.train.noise_every:
        per_sample = not recipe.model.checkpoint_blocks  # whose outputs are made twice
        noise = NoiseMeter(
            engine.module, recipe.train.noise_every, recipe.train.batch_size, accumulation, place, per_sample
        )
    return TrainStep(
        engine,
        make_forward(engine, recipe, device),
        Objective(recipe.optim, class_counts, device),
        recipe,
        accumulation,
        place.rank,
        StepMeter(device, flops),
        bad_steps,
        noise,
        graphs,
        parameters,
    )
