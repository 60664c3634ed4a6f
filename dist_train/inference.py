"""What one does with a finished run: evaluate, predict, look at a grid of predictions, export the weights."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dist_train.config import DataConfig, DeepSpeedConfig, Recipe
from dist_train.data.images import BadImage
from dist_train.data.loader import Batch, EvalLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.reader import ImageReader
from dist_train.data.tags import tag_line
from dist_train.data.tokenizer import TagTokenizer
from dist_train.errors import UseError, WorkError, written
from dist_train.files import write_atomically
from dist_train.models.backbones import timm_name, vit_shape
from dist_train.models.build import Classifier, build_model, to_timm_state_dict
from dist_train.models.saved import choose_checkpoint, read_averaged_weights, read_class_names, read_weights
from dist_train.place import Place
from dist_train.train.checkpoint import read_state
from dist_train.train.engine import torch_device
from dist_train.train.evaluate import Evaluation, Forward
from dist_train.train.evaluate import evaluate as evaluate_batches
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
        raise WorkError(f"{checkpoint}: its weights are not of the recipe's model ({_one_line(error)})") from None
    place = Place(device_id=0 if torch.cuda.is_available() else None)
    device = torch_device(place)
    model.to(device).eval()
    float32 = replace(recipe, deepspeed=DeepSpeedConfig(precision="float32"))
    forward = make_forward(model, float32, device)
    return TrainedModel(run, recipe, model, forward, tokenizer, class_names, checkpoint, averaged, place)


def evaluate(
    trained: TrainedModel, split: str = "test", shards: str | None = None, batch_size: int | None = None
) -> tuple[dict[str, Any], str]:
    """How good a model is on a split: the figures that `dist-train evaluate` prints, and a CSV table of the classes.

    shards: another set of the same classes; None: the run's. batch_size: samples of one pass; None: the run's.
    """
    data, manifest = _set_to_look_at(trained, shards)
    if note := manifest.resize_note(data.image_size, data.crop_margin):
        print(f"{data.shards}: {note}", file=sys.stderr)
    batch_size = batch_size or trained.recipe.train.eval_batch_size
    loader = EvalLoader(data, manifest, split, trained.place, batch_size=batch_size, tokenizer=trained.tokenizer)
    result = evaluate_batches(trained.forward, loader, manifest.split(split).samples)
    counts = [info.count for info in manifest.classes]
    chosen = {"checkpoint": str(trained.checkpoint), "step": read_state(trained.checkpoint).step}
    figures = {"split": split, **chosen, **_describe(result, torch.tensor(counts))}
    return figures, _class_table(result, trained.class_names, counts)


def _set_to_look_at(trained: TrainedModel, other: str | None) -> tuple[DataConfig, Manifest]:
    """The run's set, or another that was asked for, which must have the run's classes. Raises UseError where the run's
    own is not the one any more that the model was trained on."""
    asked_for = other is not None
    shards = other if other is not None else trained.recipe.data.shards
    manifest = read_manifest(shards)
    ours, theirs = len(trained.class_names), len(manifest.classes)
    if asked_for and manifest.class_names != trained.class_names:
        raise UseError(
            f"{shards} has {theirs} classes, {trained.checkpoint} was trained on "
            f"{ours}{'' if theirs != ours else ' others'}; evaluate on a set of the same classes"
        )
    trained_on = read_state(trained.checkpoint).manifest_digest
    data = replace(trained.recipe.data, shards=shards)
    if manifest.digest == trained_on:
        return data, manifest
    digests = f"its manifest's digest is {manifest.digest[:12]}, that of the run's set was {trained_on[:12]}"
    if not asked_for:
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


def predict(
    trained: TrainedModel, images: Iterable[Path], tags: str = "", top: int = 5
) -> Iterator[tuple[Path, list[tuple[str, float]] | WorkError]]:
    """Each image file with its `top` most probable classes and their probabilities, or with why it has none.

    tags: of all the images, for a model that reads them.
    """
    if tags and trained.tokenizer is None:
        raise UseError(f"--tags: the model of {trained.run} reads no tags (model.text_tokens is 0)")
    tags = _known_tags(trained, tags)
    reader = ImageReader(trained.recipe.data, trained.place.device_id)
    for path in images:
        try:
            best = _predict_file(trained, reader, path, tags).topk(min(top, len(trained.class_names)))
        except WorkError as error:
            yield path, error
            continue
        names = [trained.class_names[number] for number in best.indices.tolist()]
        yield path, list(zip(names, best.values.tolist(), strict=True))


def _known_tags(trained: TrainedModel, text: str) -> str:
    """--tags as the model reads them; says on stderr where the model is left without any."""
    tags = tag_line(text)
    if trained.tokenizer is None:
        return tags
    if not tags:
        print("warning: the model reads tags and is given none; say them with --tags", file=sys.stderr)
    elif trained.tokenizer.without_known_tags([tags], trained.tokenizer([tags])[0]):
        print(f"warning: the model knows none of the tags '{tags}'", file=sys.stderr)
    return tags


def export(trained: TrainedModel, file: Path) -> str:
    """Write weights that load into timm's model, the rest beside them, and in the file's metadata what one needs to use
    them. Returns how they are loaded, in words. file: FILE.safetensors.
    """
    recipe = trained.recipe
    weights, extra = to_timm_state_dict(trained.model)
    name, arguments = timm_name(recipe.model.backbone, recipe.data.image_size)
    arguments |= {"num_classes": len(trained.class_names) if recipe.model.head == "cls" else 0}
    tensors = {key: tensor.cpu().contiguous() for key, tensor in {**weights, **extra}.items()}
    metadata = {
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "text_tokens": recipe.model.text_tokens,
        "timm": {"model": name, **arguments},
        "classes": trained.class_names,
        "image_size": recipe.data.image_size,
        "resize": "the whole image, squashed to a square",
        "mean": recipe.data.mean,
        "std": recipe.data.std,
        "norm_eps": recipe.model.norm_eps if vit_shape(recipe.model.backbone) else None,
        "weights": "averaged" if trained.averaged else "raw",
        "step": read_state(trained.checkpoint).step,
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with written(file, "choose another"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(tensors, texts))
    call = f"timm.create_model({', '.join([repr(name), *(f'{key}={value}' for key, value in arguments.items())])})"
    if not extra:
        return f"{file}: {len(weights)} tensors that load into {call}"
    missing = "" if recipe.model.head != "ifa" else "; timm's own final norm stays untrained, as IFA does without it"
    return (
        f"{file}: the {len(weights)} tensors of the backbone load into {call} with strict=False{missing}. "
        f"timm has no place for the other {len(extra)} ({', '.join(sorted(extra))}): for the classes take "
        "dist-train predict, or this file as model.weights"
    )


def grid(trained: TrainedModel, split: str = "test", shards: str | None = None, output: Path | None = None) -> Path:
    """Draw 48 samples spread over the split, each with its prediction and its class. Returns the picture's file.

    output: a PNG file; None: RUN/predictions.png. The others are as for `evaluate`.
    """
    from PIL import Image, ImageDraw

    data, manifest = _set_to_look_at(trained, shards)
    loader = EvalLoader(data, manifest, split, trained.place, batch_size=48, tokenizer=trained.tokenizer)
    batch = next(iter(loader))
    with torch.no_grad():
        predicted = trained.forward(batch).argmax(dim=1).tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = ((batch.images.cpu() * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    columns, side, caption = 8, 128, 34
    picture = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * (side + caption)), "white")
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(pixels):
        x, y = i % columns * side, i // columns * (side + caption)
        picture.paste(Image.fromarray(image).resize((side, side)), (x, y))
        label = int(batch.labels[i])
        colour = "darkgreen" if predicted[i] == label else "crimson"
        draw.text((x + 3, y + side + 2), trained.class_names[predicted[i]][:20], fill=colour)
        draw.text((x + 3, y + side + 17), f"is {trained.class_names[label][:17]}", fill="grey")
    file = io.BytesIO()
    picture.save(file, "PNG")
    output = output or trained.run / "predictions.png"
    with written(output, "--output FILE puts it elsewhere"):
        write_atomically(output, file.getvalue())
    return output


@torch.no_grad()
def _predict_file(trained: TrainedModel, reader: ImageReader, path: Path, tags: str) -> Tensor:
    """(classes,) probabilities. Raises WorkError naming a file that is no readable image."""
    try:
        images = reader.read(path.read_bytes())
    except OSError as error:
        raise WorkError(f"{path}: {error.strerror}") from None
    except BadImage as problem:
        raise WorkError(f"{path}: not an image that can be used ({problem})") from None
    ids = mask = None
    if trained.tokenizer is not None:
        ids, mask = (part.to(images.device) for part in trained.tokenizer([tags]))
    none = torch.zeros(1, dtype=torch.int64)
    batch = Batch(images, none, torch.ones(1), ids, mask, none.numpy())
    return trained.forward(batch)[0].float().softmax(dim=0).cpu()


def _describe(result: Evaluation, class_counts: Tensor) -> dict[str, Any]:
    tenth = max(1, len(class_counts) // 10)
    by_count = class_counts.argsort(descending=True, stable=True)
    return {
        "samples": result.samples,
        "bad_samples": result.bad_samples,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "class_mean_top1": result.class_mean(),
        "most_frequent_tenth_of_classes_top1": result.class_mean(by_count[:tenth]),
        "least_frequent_tenth_of_classes_top1": result.class_mean(by_count[-tenth:]),
    }


def _class_table(result: Evaluation, names: list[str], counts: list[int]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class_id", "class", "images_in_set", "samples", "correct", "top5_correct", "top1"])
    rows = zip(names, counts, result.seen.tolist(), result.correct.tolist(), result.top5_correct.tolist(), strict=True)
    for number, (name, count, seen, correct, top5) in enumerate(rows):
        writer.writerow([number, name, count, seen, correct, top5, f"{correct / seen:.4f}" if seen else ""])
    return text.getvalue()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
