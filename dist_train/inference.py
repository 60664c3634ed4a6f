"""What one does with a finished run: evaluate, predict, look at a grid of predictions, export the weights."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_train.config import DeepSpeedConfig, Recipe
from dist_train.data.augment import no_augmentation
from dist_train.data.loader import Batch, EvalLoader, Place
from dist_train.data.manifest import read_manifest, write_atomically
from dist_train.data.pipeline import ImagePipeline
from dist_train.data.text import TagTokenizer
from dist_train.errors import UseError, WorkError, written
from dist_train.models.build import build_model, to_timm_state_dict
from dist_train.output import say
from dist_train.train.checkpoint import checkpoint_to_resume, read_averaged_weights, read_class_names, read_weights
from dist_train.train.engine import torch_device
from dist_train.train.evaluate import Evaluation, Forward, evaluate
from dist_train.train.inputs import build_tokenizer
from dist_train.train.step import make_forward


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a checkpoint, in eval mode, on this machine's device, in float32."""

    model: nn.Module
    forward: Forward
    tokenizer: TagTokenizer | None
    class_names: list[str]
    checkpoint: Path
    place: Place


def load_trained(run: Path, recipe: Recipe, which: str, averaged: bool) -> TrainedModel:
    """The model of a run. which: auto (the newest checkpoint), best, or a checkpoint folder. averaged: with train.ema's
    weights.

    Raises UseError where there is none, WorkError where it is damaged.
    """
    checkpoint = checkpoint_to_resume(run, which)
    if checkpoint is None:
        raise UseError(f"{run}: no complete checkpoint; train first")
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
    return TrainedModel(model, make_forward(model, float32, device), tokenizer, class_names, checkpoint, place)


def run_evaluate(options: argparse.Namespace, recipe: Recipe) -> int:
    """`dist-train evaluate`: top-1, top-5, class means, the most and least frequent classes, a per-class CSV.

    The result is said also where the CSV cannot be written: that is a warning, an error (exit 1) if --csv asks for it.
    """
    trained = load_trained(options.run, recipe, options.checkpoint, options.ema)
    shards = options.shards or recipe.data.shards
    manifest = read_manifest(shards)
    if manifest.class_names != trained.class_names:
        raise UseError(
            f"{shards} has {len(manifest.classes)} classes, {trained.checkpoint} was trained on "
            f"{len(trained.class_names)}{'' if len(manifest.classes) != len(trained.class_names) else ' others'}; "
            "evaluate on a set of the same classes"
        )
    loader = EvalLoader(
        replace(recipe.data, shards=shards),
        manifest,
        options.split,
        trained.place,
        batch_size=options.batch_size or recipe.train.eval_batch_size,
        tokenizer=trained.tokenizer,
    )
    result = evaluate(trained.forward, loader, manifest.split(options.split).samples)
    table = options.csv or options.run / f"evaluation_{options.split}.csv"
    counts = [info.count for info in manifest.classes]
    unwritten = None
    try:
        with written(table, "--csv FILE puts it elsewhere"):
            _write_class_table(table, result, trained.class_names, counts)
    except WorkError as error:
        unwritten = error
    csv_path = None if unwritten else str(table)
    figures = {"split": options.split, "checkpoint": str(trained.checkpoint)} | _describe(result, torch.tensor(counts))
    say(json.dumps(figures | {"csv": csv_path}, indent=1))
    if unwritten and options.csv:  # it was asked for
        raise unwritten
    if unwritten:
        print(f"warning: {unwritten}", file=sys.stderr)
    return 0


def run_predict(options: argparse.Namespace, recipe: Recipe) -> int:
    """`dist-train predict`: the first classes of each image with their probabilities; exit 1 if any file is bad."""
    trained = load_trained(options.run, recipe, options.checkpoint, options.ema)
    if options.tags and trained.tokenizer is None:
        raise UseError(f"--tags: the model of {options.run} reads no tags (model.text_tokens is 0)")
    bad = 0
    for path in options.images:
        try:
            probabilities = _predict_file(trained, recipe, path, options.tags)
        except WorkError as error:
            print(error, file=sys.stderr)
            bad += 1
            continue
        best = probabilities.topk(min(options.top, len(trained.class_names)))
        say(path)
        for probability, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            say(f"  {probability:.4f}  {trained.class_names[number]}")
    return 1 if bad else 0


def run_export(options: argparse.Namespace, recipe: Recipe) -> int:
    """`dist-train export`: weights that load into the timm model of the same name, and the rest beside them."""
    if options.file.suffix != ".safetensors":
        raise UseError(f"{options.file}: name the file .safetensors")
    trained = load_trained(options.run, recipe, options.checkpoint, options.ema)
    weights, extra = to_timm_state_dict(trained.model)
    metadata = {
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "image_size": str(recipe.data.image_size),
        "classes": json.dumps(trained.class_names),
    }
    with written(options.file, "choose another"):
        options.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.file.with_name(f".{options.file.name}.tmp")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in {**weights, **extra}.items()}
        save_file(tensors, temporary, metadata)
        temporary.replace(options.file)
    say(f"{options.file}: {len(weights)} tensors of timm's model, {len(extra)} beside them")
    return 0


def run_grid(options: argparse.Namespace, recipe: Recipe) -> int:
    """`dist-train grid`: a picture of 48 samples spread over the split, each with its prediction and its class."""
    from PIL import Image, ImageDraw

    trained = load_trained(options.run, recipe, options.checkpoint, options.ema)
    manifest = read_manifest(recipe.data.shards)
    loader = EvalLoader(recipe.data, manifest, options.split, trained.place, batch_size=48, tokenizer=trained.tokenizer)
    batch = next(iter(loader))
    with torch.no_grad():
        predicted = trained.forward(batch).argmax(dim=1).tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    pixels = ((batch.images.cpu() * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    columns, side, caption = 8, 128, 34
    grid = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * (side + caption)), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(pixels):
        x, y = i % columns * side, i // columns * (side + caption)
        grid.paste(Image.fromarray(image).resize((side, side)), (x, y))
        label = int(batch.labels[i])
        colour = "darkgreen" if predicted[i] == label else "crimson"
        draw.text((x + 3, y + side + 2), trained.class_names[predicted[i]][:20], fill=colour)
        draw.text((x + 3, y + side + 17), f"is {trained.class_names[label][:17]}", fill="grey")
    file = io.BytesIO()
    grid.save(file, "PNG")
    output = options.output or options.run / "predictions.png"
    with written(output, "--output FILE puts it elsewhere"):
        write_atomically(output, file.getvalue())
    say(output)
    return 0


@torch.no_grad()
def _predict_file(trained: TrainedModel, recipe: Recipe, path: Path, tags: str) -> Tensor:
    """(classes,) probabilities. Raises WorkError naming a file that is no readable image."""
    try:
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
        if not len(encoded):
            raise WorkError(f"{path}: empty file")
        pipeline = ImagePipeline(
            recipe.data, train=False, baked=None, batch_size=1, threads=1, device_id=trained.place.device_id, depth=1
        )
        pipeline.feed([encoded], no_augmentation(1))
        images = pipeline.take()
        pipeline.close()
    except OSError as error:
        raise WorkError(f"{path}: {error.strerror}") from None
    except RuntimeError:
        raise WorkError(f"{path}: not an image that can be decoded") from None
    ids, mask = trained.tokenizer([tags]) if trained.tokenizer else (None, None)
    none = torch.zeros(1, dtype=torch.int64)
    batch = Batch(images, none, torch.ones(1), _to(ids, images), _to(mask, images), none.numpy())
    return trained.forward(batch)[0].float().softmax(dim=0).cpu()


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.device)


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


def _write_class_table(path: Path, result: Evaluation, names: list[str], counts: list[int]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class_id", "class", "images_in_set", "samples", "correct", "top5_correct", "top1"])
    rows = zip(names, counts, result.seen.tolist(), result.correct.tolist(), result.top5_correct.tolist(), strict=True)
    for number, (name, count, seen, correct, top5) in enumerate(rows):
        writer.writerow([number, name, count, seen, correct, top5, f"{correct / seen:.4f}" if seen else ""])
    write_atomically(path, text.getvalue().encode())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
