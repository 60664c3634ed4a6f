"""A finished run's model, loaded to be used, and the set that it is used on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_train.config import DataConfig, DeepSpeedConfig, Recipe
from dist_train.data.manifest import Manifest, check_has_tags, read_manifest
from dist_train.data.tokenizer import TagTokenizer
from dist_train.errors import UseError, WorkError
from dist_train.models.build import Classifier, build_model
from dist_train.models.saved import choose_checkpoint, read_averaged_weights, read_class_names, read_weights
from dist_train.place import Place
from dist_train.train.checkpoint import read_state
from dist_train.train.engine import torch_device
from dist_train.train.evaluate import Forward
from dist_train.train.inputs import build_tokenizer
from dist_train.train.step import make_forward


@dataclass(frozen=True)
class TrainedModel:
    """A run's model with the weights of a checkpoint, in eval mode, on this machine's device, in float32."""

    run: Path
    recipe: Recipe
    model: Classifier
    forward: Forward
    tokenizer: TagTokenizer | None
    class_names: list[str]
    """Of the model's outputs, in order; with data.labels tags these are tags."""
    checkpoint: Path
    averaged: bool
    """Whether it has the averaged weights of train.ema."""
    place: Place


def load_trained(run: Path, recipe: Recipe, which: str = "auto", averaged: bool = False) -> TrainedModel:
    """The model of a run, by the checkpoint that `choose_checkpoint` takes for `which` (auto, best, last, a step or a
    folder); says on stderr which that is.

    averaged: with train.ema's weights; as the best is that of the raw ones, `auto` then means the last. Raises UseError
    where there is none, WorkError where it is damaged.
    """
    chosen = choose_checkpoint(run, "last" if averaged and which == "auto" else which)
    checkpoint = chosen.checkpoint
    print(f"{chosen}{', averaged weights' if averaged else ''}", file=sys.stderr)
    class_names = read_class_names(checkpoint)
    tokenizer = build_tokenizer(recipe, run)
    model_config = replace(recipe.model, weights="none")
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    model, _ = build_model(model_config, recipe.data.image_size, len(class_names), vocab_size)
    try:
        model.load_state_dict((read_averaged_weights if averaged else read_weights)(checkpoint))
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise WorkError(f"{checkpoint}: its weights are not of the recipe's model ({why})") from None
    place = Place(device_id=0 if torch.cuda.is_available() else None)
    if recipe.data.device == "gpu" and place.device_id is None:  # that was of the machine that trained
        recipe = replace(recipe, data=replace(recipe.data, device="auto"))
    device = torch_device(place)
    model.to(device).eval()
    float32 = replace(recipe, deepspeed=DeepSpeedConfig(precision="float32"))
    forward = make_forward(model, float32, device)
    return TrainedModel(run, recipe, model, forward, tokenizer, class_names, checkpoint, averaged, place)


def set_to_look_at(trained: TrainedModel, other: str | None) -> tuple[DataConfig, Manifest]:
    """The run's set, or another that was asked for, which must have the run's classes, or tags if the run predicts
    those. Raises UseError where the run's own is not the one any more that the model was trained on."""
    shards = trained.recipe.data.shards if other is None else other
    data, manifest = replace(trained.recipe.data, shards=shards), read_manifest(shards)
    ours, theirs = len(trained.class_names), len(manifest.classes)
    if trained.recipe.data.labels == "tags":
        check_has_tags(data, manifest)
    elif other is not None and manifest.class_names != trained.class_names:
        raise UseError(
            f"{shards} has {theirs} classes, {trained.checkpoint} was trained on "
            f"{ours}{'' if theirs != ours else ' others'}; evaluate on a set of the same classes"
        )
    trained_on = read_state(trained.checkpoint).manifest_digest
    if manifest.digest == trained_on:
        return data, manifest
    digests = f"its manifest's digest is {manifest.digest[:12]}, that of the run's set was {trained_on[:12]}"
    if other is None:
        raise UseError(
            f"{shards} is not the set any more that {trained.checkpoint} was trained on: {digests}; images of its "
            f"splits may have been trained on; put the set back, or say --shards {shards}"
        )
    print(
        f"warning: {shards} is not the set that {trained.checkpoint} was trained on: {digests}; images of its splits "
        "may have been trained on",
        file=sys.stderr,
    )
    return data, manifest
