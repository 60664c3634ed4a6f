"""A fine-tuning recipe as one would write it with torch, torchvision, timm and webdataset alone: the contestant of the
benchmark `agreement`. Nothing here is shared with the trainer but the meaning of the recipe's keys, read from a
dictionary, so that an accuracy that both reach is not one mistake made twice.
"""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import timm
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

Settings = dict[str, dict[str, Any]]
Samples = list[tuple[bytes, int]]


def train_point(point: dict[str, Any]) -> dict[str, float]:
    """In the child: train by the settings of a recipe. point: recipe (sections of keys), splits (their tar files),
    classes. Returns top1 and test_loss on the test split, and train_loss, the mean of the last epoch.

    Knows recipes that fine-tune a timm ViT from a weights file by AdamW with layer-wise rates; images by
    random_resized crops, flips and jitter, in evaluation by the middle crop.
    """
    settings, seed = point["recipe"], point["recipe"]["train"]["seed"]
    random.seed(seed)
    torch.manual_seed(seed)
    splits = {split: read_samples(tars) for split, tars in point["splits"].items()}
    model = build(settings, point["classes"])
    train_loss = train(model, settings, splits["train"])
    top1, test_loss = evaluate(model, settings, splits["test"])
    return {"top1": top1, "test_loss": test_loss, "train_loss": train_loss}


def read_samples(tars: list[str]) -> Samples:
    """(encoded image, class) of every sample of WebDataset tars, in their order."""
    data = webdataset.WebDataset(tars, shardshuffle=False)
    image = ("jpg", "jpeg", "png", "webp")
    return [(next(sample[ending] for ending in image if ending in sample), int(sample["cls"])) for sample in data]


def build(settings: Settings, classes: int) -> VisionTransformer:
    """timm's model with the pretrained weights, positions resampled, and a zero classifier."""
    model, data = settings["model"], settings["data"]
    built = timm.create_model(
        model["backbone"].partition(".")[0], img_size=data["image_size"], num_classes=classes,
        drop_path_rate=model["drop_path"],
    )  # fmt: skip
    weights = load_file(Path(model["weights"]))
    grid = built.patch_embed.grid_size
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], list(grid), num_prefix_tokens=1)
    missing, unexpected = built.load_state_dict(weights, strict=False)
    assert set(missing) <= {"head.weight", "head.bias"} and not unexpected, (missing, unexpected)
    nn.init.zeros_(built.head.weight)
    nn.init.zeros_(built.head.bias)
    return built


def train(model: VisionTransformer, settings: Settings, samples: Samples) -> float:
    """Train to the end. Returns the mean loss of the last epoch."""
    optim, batch = settings["optim"], settings["train"]["batch_size"]
    transform = training_transform(settings["data"])
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), lr=optim["lr"], betas=tuple(optim["betas"]))
    steps = math.ceil(settings["train"]["epochs"] * len(samples) / batch)
    loss_of = nn.CrossEntropyLoss(label_smoothing=optim["label_smoothing"])
    freeze = int(settings["model"]["freeze"]) if settings["model"]["freeze"].isdecimal() else 0
    order: list[int] = []
    losses: list[float] = []
    for step in range(steps):
        if len(order) < batch:  # as an endless stream of epochs: what an epoch leaves over begins the next batch
            order += random.sample(range(len(samples)), len(samples))
        chosen, order = order[:batch], order[batch:]
        images, labels = batch_of([samples[i] for i in chosen], transform)
        rate = cosine(step, steps, optim["warmup_steps"])
        for group in optimizer.param_groups:
            group["lr"] = optim["lr"] * group["scale"] * rate
        model.train()
        if freeze:
            model.patch_embed.eval()
            for block in list(model.blocks)[:freeze]:
                block.eval()
        loss = loss_of(logits_of(model, settings, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-(len(samples) // batch) :]
    return sum(last) / len(last)


def cosine(step: int, steps: int, warm_up: int) -> float:
    """Share of the highest rate at a step: up from 0 by a line, then down to 0 by half a cosine."""
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - 1 - warm_up)))


def parameter_groups(model: VisionTransformer, settings: Settings) -> list[dict[str, Any]]:
    """AdamW's groups: rates that fall from the head to the embedding, decay for matrices alone, no frozen layers."""
    model_settings, optim = settings["model"], settings["optim"]
    freeze = int(model_settings["freeze"]) if model_settings["freeze"].isdecimal() else -1
    norm, last = len(model.blocks), len(model.blocks) + 1  # timm has the final norm in the last block's group
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = last if name.startswith("head") else norm if name.startswith("norm") else 0
        if layer <= freeze:
            parameter.requires_grad_(False)
            continue
        decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups.setdefault((layer, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": optim["layer_decay"] ** (last - layer),
            "weight_decay": optim["weight_decay"] if decayed else 0.0,
        }
        for (layer, decayed), parameters in groups.items()
    ]


@torch.no_grad()
def evaluate(model: VisionTransformer, settings: Settings, samples: Samples) -> tuple[float, float]:
    """(accuracy, mean cross-entropy)."""
    model.eval()
    transform = evaluation_transform(settings["data"])
    correct, loss = 0, 0.0
    for begin in range(0, len(samples), 64):
        images, labels = batch_of(samples[begin : begin + 64], transform)
        logits = logits_of(model, settings, images)
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(samples), loss / len(samples)


def logits_of(model: VisionTransformer, settings: Settings, images: Tensor) -> Tensor:
    """float32 logits, under torch.autocast where the recipe says bf16_autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=settings["deepspeed"]["precision"] == "bf16_autocast"):
        return model(images).float()


def training_transform(data: dict[str, Any]) -> v2.Transform:
    """torchvision's own random crops, flips and jitter."""
    size = data["image_size"]
    jitter = v2.ColorJitter(data["brightness"], data["contrast"], data["saturation"], data["hue"])
    crop = v2.RandomResizedCrop(size, tuple(data["crop_scale"]), tuple(data["crop_ratio"]), antialias=True)
    return v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip(), jitter, *normalisation(data)])


def evaluation_transform(data: dict[str, Any]) -> v2.Transform:
    """The middle of the image, its aspect kept, or all of it squashed."""
    size = data["image_size"]
    if data["eval_crop"] == "squash":
        return v2.Compose([v2.PILToTensor(), v2.Resize([size, size], antialias=True), *normalisation(data)])
    shorter = v2.Resize(math.floor(size / data["eval_crop_pct"]), antialias=True)
    return v2.Compose([v2.PILToTensor(), shorter, v2.CenterCrop(size), *normalisation(data)])


def normalisation(data: dict[str, Any]) -> list[v2.Transform]:
    """uint8 to normalised float32."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data["mean"], data["std"])]


def batch_of(samples: Samples, transform: v2.Transform) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B,)."""
    images = [transform(Image.open(io.BytesIO(content)).convert("RGB")) for content, _ in samples]
    return torch.stack(images), torch.tensor([label for _, label in samples])
