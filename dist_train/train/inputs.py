"""What a recipe's model reads: its shard set, and its tags as tokens."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from torch import Tensor

from dist_train.config import Recipe
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.tokenizer import TagTokenizer
from dist_train.data.vocabulary import TAGS_NAME, WHOLE_TAGS, find_frequent_tags, read_frequent_tags
from dist_train.errors import UseError
from dist_train.files import write_atomically
from dist_train.place import Place
from dist_train.recipe import check_digest
from dist_train.train.ranks import gather


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


def begin_tokenizer(recipe: Recipe, manifest: Manifest, place: Place, resumed: bool) -> TagTokenizer | None:
    """The same for training; all ranks call this together. Rank 0 of a new run first counts the tags, where their
    frequency matters, and writes them into the run folder."""
    if needs_frequent_tags(recipe) and not resumed:
        if place.rank == 0:
            run = Path(recipe.train.run)
            run.mkdir(parents=True, exist_ok=True)
            tags = find_frequent_tags(recipe.data, manifest)
            write_atomically(run / TAGS_NAME, "".join(f"{tag}\n" for tag in tags).encode())
        torch.distributed.barrier()
    return build_tokenizer(recipe, Path(recipe.train.run))


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
