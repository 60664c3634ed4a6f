"""Steps with the CLS head, others and IFA in the reference's way: the child's end of the benchmark `ifa`.

Models with the same backbone take turns at training steps on the same batch: the CLS head; our IFA head, which takes
each block's [CLS] as it comes; other heads; and `stacked`, the reference's way, which first stacks all tokens of all
blocks, (B, S, D, L), and then takes token 0. Peak memory is the allocator's own account of one step, in a process for
each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.step import SYNTHETIC_VOCABULARY
from dist_train.config import DeepSpeedConfig, Head, ModelConfig
from dist_train.models.build import Classifier, build_model
from dist_train.models.vilt import keep_padding_out
from dist_train.train.meters import synchronize, training_flops_per_sample
from dist_train.train.precision import set_arithmetic


class StackedIFA(nn.Module):
    """The IFA model as the reference has it: all tokens of all blocks are stacked before the [CLS] tokens are taken."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """As `Classifier.forward`."""
        autocast = self.model.autocast
        with nullcontext() if autocast is None else torch.autocast(images.device.type, autocast):
            return self._logits(images, text_ids, text_mask)

    def _logits(self, images: Tensor, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        backbone: Any = self.model.backbone
        embed_text: Any = self.model.text
        mask = None
        tokens = backbone._pos_embed(backbone.patch_embed(images))
        if text_ids is not None and text_mask is not None:
            mask = keep_padding_out(text_mask, image_tokens=tokens.shape[1])
            tokens = torch.cat([tokens, embed_text(text_ids)], dim=1)
        if backbone.token_dtype is not None:
            tokens = tokens.to(backbone.token_dtype)
        after_block = []
        for block in backbone.blocks:
            tokens = block(tokens, attn_mask=mask)
            after_block.append(tokens)
        return self.model.head(torch.stack(after_block, dim=-1)[:, 0])


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one contestant's memory, or the seconds of all contestants' steps in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "memory_of" in point:
        model = make_model(point, point["memory_of"], device)
        step = training_step(model, point, device)
        step()  # allocates gradients and momentum
        shape: Any = model.model.backbone if isinstance(model, StackedIFA) else model.backbone
        return {
            "peak_bytes": peak_bytes(step, device),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops": training_flops_per_sample(model, *(value[:1] for value in inputs(point, device))),
            "bdl": point["batch"] * shape.embed_dim * len(shape.blocks),
        }
    heads = point["heads"]
    steps = {which: training_step(make_model(point, which, device), point, device) for which in heads}
    turns: dict[str, list[float]] = {which: [] for which in heads}
    for number in range(1 + point["pairs"]):
        for which in heads if number % 2 else heads[::-1]:
            begin = time.perf_counter()
            steps[which]()
            synchronize(device)
            turns[which].append(time.perf_counter() - begin)
    return {which: its[1:] for which, its in turns.items()}  # the first step allocates


def make_model(point: dict[str, Any], which: str, device: torch.device) -> nn.Module:
    """A contestant; the same weights for all, but for what only its head has."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=point["backbone"],
        head=cast(Head, "ifa" if which == "stacked" else which),
        text_tokens=point["text_tokens"],
    )
    config = replace(config, head_init="default")
    model, _ = build_model(config, point["size"], point["classes"], SYNTHETIC_VOCABULARY if point["text_tokens"] else 0)
    set_arithmetic(model, DeepSpeedConfig(precision=point.get("precision", "float32")))
    return (StackedIFA(model) if which == "stacked" else model).to(device)


def inputs(point: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Images, and text if the model reads it."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(point["batch"], 3, point["size"], point["size"], generator=generator)]
    if point["text_tokens"]:
        ids = torch.randint(1000, 2000, (point["batch"], point["text_tokens"]), generator=generator)
        values += [ids, torch.ones_like(ids, dtype=torch.bool)]
    return [value.to(device) for value in values]


def training_step(model: nn.Module, point: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """One step of SGD with momentum; gradients are freed before the forward pass."""
    values = inputs(point, device)
    labels = torch.arange(point["batch"], device=device) % point["classes"]
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(*values)
        functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step
