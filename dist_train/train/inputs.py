"""What a recipe's model reads: its shard set, and its tags as tokens; and what it predicts."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from torch import Tensor

from dist_train.config import Recipe
from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.plan import micro_batch_of
from dist_train.data.quarantine import QUARANTINE_NAME
from dist_train.data.targets import TagTargets
from dist_train.data.tokenizer import TagTokenizer
from dist_train.data.vocabulary import TAGS_NAME, WHOLE_TAGS, find_frequent_tags, read_frequent_tags, write_tags
from dist_train.errors import UseError
from dist_train.models.saved import read_class_names
from dist_train.place import Place
from dist_train.recipe import check_digest
from dist_train.train.ranks import from_rank_zero, gather


def read_shard_set(recipe: Recipe) -> Manifest:
    """The manifest of the recipe's shard set, checked against the digest that the recipe may name."""
    manifest = read_manifest(recipe.data.shards)
    check_digest(recipe.data, manifest)
    return manifest


def check_same_set(manifest: Manifest, shards: str, place: Place) -> None:
    """Raise UseError where some host has another shard set than the host of rank 0; all ranks call this together."""
    first, *others = gather((socket.gethostname(), manifest.digest), place)
    for host, digest in others:
        if digest != first[1]:
            raise UseError(
                f"data.shards {shards}: {host} has a set of digest {digest[:12]} there, {first[0]} one of "
                f"{first[1][:12]}; copy the same images, or the same set, to all hosts"
            )


def build_tokenizer(recipe: Recipe, run: Path) -> TagTokenizer | None:
    """The tokenizer of a model that reads tags, or None. Tags known by frequency are those of the run's folder."""
    if not recipe.model.text_tokens:
        return None
    tags = read_frequent_tags(run) if needs_frequent_tags(recipe) else []
    by_frequency = recipe.data.tag_order == "frequency"
    return TagTokenizer(recipe.data.tokenizer, recipe.model.text_tokens, tags, by_frequency)


def begin_tokenizer(recipe: Recipe, manifest: Manifest, place: Place, checkpoint: Path | None) -> TagTokenizer | None:
    """The same for training; all ranks call this together. Where the tags' frequency matters, rank 0 of a new run first
    counts them and writes them into the run folder; one that goes on from another run's checkpoint has that run's."""
    run = Path(recipe.train.run)

    def list_tags() -> None:
        if checkpoint is None:
            write_tags(run, find_frequent_tags(recipe.data, manifest))
        elif not (run / TAGS_NAME).exists():
            write_tags(run, read_frequent_tags(checkpoint.absolute().parents[1]))

    if needs_frequent_tags(recipe):
        from_rank_zero(list_tags, place)
    return build_tokenizer(recipe, run)


def begin_outputs(recipe: Recipe, manifest: Manifest, place: Place, checkpoint: Path | None) -> list[str]:
    """Names of what the model predicts, in the order of its outputs: the classes of the set, or tags.

    All ranks call this together. Rank 0 of a new run first counts the tags and writes them into the run folder; a
    resumed one has those of its checkpoint. Raises UseError where no tag is frequent enough.
    """
    if recipe.data.labels == "class":
        return manifest.class_names
    if checkpoint is not None:
        return from_rank_zero(lambda: read_class_names(checkpoint), place)
    return from_rank_zero(lambda: _count_tags(recipe, manifest), place)


def _count_tags(recipe: Recipe, manifest: Manifest) -> list[str]:
    tags = find_frequent_tags(recipe.data, manifest)
    if not tags:
        raise UseError(
            f"data.labels tags: no tag is on data.tag_min_count {recipe.data.tag_min_count} images of "
            f"{recipe.data.shards}'s train split; use a lower one"
        )
    write_tags(Path(recipe.train.run), tags)
    return tags


def tag_targets(recipe: Recipe, outputs: list[str]) -> TagTargets | None:
    """What gives the samples' targets where the model predicts tags; outputs: those tags."""
    return TagTargets(outputs) if recipe.data.labels == "tags" else None


def needs_frequent_tags(recipe: Recipe) -> bool:
    """Whether the tokenizer depends on how frequent the tags of the train split are."""
    by_tag = recipe.data.tokenizer == WHOLE_TAGS or recipe.data.tag_order == "frequency"
    return bool(recipe.model.text_tokens) and by_tag


def one_sample(recipe: Recipe) -> tuple[Tensor, ...]:
    """Inputs of the model for one sample, all zeros but for the mask."""
    size, tokens = recipe.data.image_size, recipe.model.text_tokens
    image = torch.zeros(1, 3, size, size)
    if not tokens:
        return (image,)
    return image, torch.zeros(1, tokens, dtype=torch.int64), torch.ones(1, tokens, dtype=torch.bool)


def train_loader(
    recipe: Recipe,
    manifest: Manifest,
    place: Place,
    tokenizer: TagTokenizer | None,
    samples_consumed: int = 0,
    targets: TagTargets | None = None,
) -> TrainLoader:
    """This rank's micro-batches from a position in the run on."""
    return TrainLoader(
        recipe.data,
        manifest,
        place,
        batch_size=recipe.train.batch_size,
        micro_batch=micro_batch_of(recipe.train.batch_size, place.world_size, recipe.train.micro_batch_size),
        seed=recipe.train.seed,
        samples_consumed=samples_consumed,
        tokenizer=tokenizer,
        quarantine=Path(recipe.train.run) / QUARANTINE_NAME,
        tag_targets=targets,
    )
