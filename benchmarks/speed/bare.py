"""The yardstick of a training step: timm's model in a plain PyTorch loop. Nothing of this project is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional


def bare_step(
    model: str,
    arguments: Mapping[str, Any],
    classes: int,
    images: Tensor,
    labels: Tensor,
    *,
    pure: bool = False,
    compile: str = "none",
) -> Callable[[], Tensor]:
    """A function that makes one training step on a batch and returns its loss.

    model, arguments: of `timm.create_model`. images: (B, 3, S, S) float32; labels: (B,). SGD with momentum, fused.
    pure: weights, optimizer and tokens in bf16; else torch's autocast to bf16 on float32 weights. compile: none, blocks
    (each block of a ViT by torch.compile), whole, or reduce-overhead (whole, in CUDA graphs, by torch's own means).
    """
    device = images.device
    with device:
        network: nn.Module = timm.create_model(model, num_classes=classes, **arguments)
    if pure:
        network = network.to(torch.bfloat16)
        images = images.to(torch.bfloat16)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, 0.9, fused=True)
    forward: Callable[[Tensor], Tensor] = network
    if compile == "blocks":
        for block in network.get_submodule("blocks").children():
            block.compile(dynamic=False)
    elif compile != "none":
        mode = "reduce-overhead" if compile == "reduce-overhead" else None
        forward = torch.compile(network, dynamic=False, mode=mode)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=not pure):
            logits = forward(images)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
