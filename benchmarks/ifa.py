"""What the IFA head costs over the CLS head, and what it would cost computed as the reference does.

Three models with the same backbone take turns at training steps on the same batch: the CLS head; our IFA head, which
takes each block's [CLS] as it comes; and `stacked`, the reference's way, which first stacks all tokens of all blocks,
(B, S, D, L), and then takes token 0. Peak memory is the allocator's own account of one step, in a process for each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.result import write_result
from benchmarks.tables import describe_row
from dist_train.config import DeepSpeedConfig, ModelConfig
from dist_train.errors import WorkError
from dist_train.models.build import Classifier, build_model
from dist_train.models.vilt import keep_padding_out
from dist_train.output import say
from dist_train.train.meters import synchronize, training_flops_per_sample
from dist_train.train.precision import set_arithmetic

CONTESTANTS = ("cls", "ifa", "stacked")
PAPER_SAMPLES = 322_947  # of DAF's train split, an epoch
PAPER = {
    "what": "ViT-B/16, batch 256, 128 px, DAF, float32, on one GPU",
    "cls_minutes_per_epoch": 18,
    "ifa_minutes_per_epoch": 19,
    "cls_gb": 13.1,
    "ifa_gb": 14.4,
    "why": "the reference stacks all tokens of all blocks, (B, S, D, L), then takes token 0: 0.61 GB in float32 for "
    "S = 65, D = 768, L = 12, and as much for its gradient. Taking token 0 first needs (B, D, L), 9.4 MB",
}
"""What the paper says of the IFA head's cost, and where it comes from."""
VOCABULARY = 30522


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
        backbone, mask = self.model.backbone, None
        tokens = backbone._pos_embed(backbone.patch_embed(images))
        if text_ids is not None:
            mask = keep_padding_out(text_mask, image_tokens=tokens.shape[1])
            tokens = torch.cat([tokens, self.model.text(text_ids)], dim=1)
        if backbone.token_dtype is not None:
            tokens = tokens.to(backbone.token_dtype)
        after_block = []
        for block in backbone.blocks:
            tokens = block(tokens, attn_mask=mask)
            after_block.append(tokens)
        return self.model.head(torch.stack(after_block, dim=-1)[:, 0])


def measure_ifa(
    backbones: list[str],
    text_tokens: list[int],
    batch: int,
    size: int,
    classes: int,
    pairs: int,
    precision: str,
    name: str,
) -> Path:
    """Measure every backbone with every number of text tokens, print a line of each row and write the result; returns
    its path.

    precision: float32, bf16 or bf16_autocast, as a recipe's deepspeed.precision at ZeRO 0.
    """
    rows = []
    for backbone in backbones:
        for tokens in text_tokens:
            point = {"backbone": backbone, "text_tokens": tokens, "batch": batch, "size": size, "classes": classes}
            point["precision"] = precision
            memory = {which: _in_process(point | {"memory_of": which}) for which in CONTESTANTS}
            turns = _in_process(point | {"pairs": pairs})
            found = [row(point, which, memory, turns) for which in CONTESTANTS]
            for one in found:
                say(describe_row(one, f"{backbone} {one['head']}, {tokens} text tokens, batch {batch}"))
            rows += found
    parameters = {"batch_size": batch, "image_size": size, "classes": classes, "pairs": pairs, "precision": precision}
    return write_result("ifa", name, parameters | {"epoch_samples": PAPER_SAMPLES, "paper": PAPER}, rows)


def row(point: dict[str, Any], which: str, memory: dict[str, Any], turns: dict[str, list[float]]) -> dict[str, Any]:
    """One contestant beside the CLS head: ratios are medians over the pairs, memory is the excess over CLS."""
    ratios = [mine / cls for mine, cls in zip(turns[which], turns["cls"], strict=True)]
    excess = memory[which]["peak_bytes"] - memory["cls"]["peak_bytes"]
    own = memory[which]["parameters"] - memory["cls"]["parameters"]
    return {
        "backbone": point["backbone"],
        "text_tokens": point["text_tokens"],
        "head": which,
        "step_ms": round(1000 * statistics.median(turns[which]), 1),
        "epoch_minutes": round(statistics.median(turns[which]) * PAPER_SAMPLES / point["batch"] / 60, 1),
        "time_over_cls": round(statistics.median(ratios), 4),
        "time_over_cls_lowest": round(min(ratios), 4),
        "time_over_cls_highest": round(max(ratios), 4),
        "peak_mb": round(memory[which]["peak_bytes"] / 1e6, 2),
        "peak_over_cls_mb": round(excess / 1e6, 3),
        "peak_over_cls_in_bdl": round(excess / (4 * memory[which]["bdl"]), 3),
        "parameters": memory[which]["parameters"],
        "parameters_over_cls": own,
        "gflops_per_image": round(memory[which]["flops"] / 1e9, 4),
    }


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one contestant's memory, or the seconds of all contestants' steps in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "memory_of" in point:
        model = make_model(point, point["memory_of"], device)
        step = training_step(model, point, device)
        step()  # allocates gradients and momentum
        shape = model.model.backbone if isinstance(model, StackedIFA) else model.backbone
        return {
            "peak_bytes": peak_bytes(step, device),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops": training_flops_per_sample(model, *(value[:1] for value in inputs(point, device))),
            "bdl": point["batch"] * shape.embed_dim * len(shape.blocks),
        }
    steps = {which: training_step(make_model(point, which, device), point, device) for which in CONTESTANTS}
    turns: dict[str, list[float]] = {which: [] for which in CONTESTANTS}
    for number in range(1 + point["pairs"]):
        for which in CONTESTANTS if number % 2 else CONTESTANTS[::-1]:
            begin = time.perf_counter()
            steps[which]()
            synchronize(device)
            turns[which].append(time.perf_counter() - begin)
    return {which: its[1:] for which, its in turns.items()}  # the first step allocates


def make_model(point: dict[str, Any], which: str, device: torch.device) -> nn.Module:
    """A contestant; the same weights for all, but for what only IFA has."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=point["backbone"], head="cls" if which == "cls" else "ifa", text_tokens=point["text_tokens"]
    )
    config = replace(config, head_init="default")
    model, _ = build_model(config, point["size"], point["classes"], VOCABULARY if point["text_tokens"] else 0)
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


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most memory that a step allocates beyond what is there before it, by the allocator's own account."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        step()
    now = peak = 0
    for event in traced.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _in_process(point: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ifa", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"{point}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
