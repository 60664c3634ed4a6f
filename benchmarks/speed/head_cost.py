"""What a head adds to a training step beside the CLS head, counted on paper: FLOPs, bytes, and time on a GPU.

FLOPs are those of matrix products, 2 for a multiply-add, as torch counts them. Bytes are what passes over the GPU's
memory where each operator reads and writes its tensors once. torch.compile can fuse the backward half of the averages
into what follows it, so that of their three passes over the tokens one remains.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.models.heads import HEADS, LAST_BLOCKS

TRAINING = 3
"""Products of a training step for each of the forward pass: the backward pass of a product is two of its size."""
AVERAGE_PASSES = {"eager": 3, "compiled": 1}
"""Times that the patches' tokens pass over the memory for their average: read in the forward pass; read and written
where its gradient is added to theirs."""
FEATURE_PASSES = 14
"""Times that a head's features do: taken and stacked (4), transposed (2), normalised (2), multiplied (1), and as often
but once in the backward pass."""
WEIGHT_BYTES = 36
"""Of a weight in a step: read in 16 bits by the forward and the backward pass (4), its float32 gradient written (4),
and AdamW's four reads and three writes in float32 (28)."""
STEP_SECONDS = {"eager": 35.6e-3, "compiled": 27.0e-3}
"""Of a training step of ViT-B/16 at batch 256 and 128 px in bf16 autocast on an H100, in a CUDA graph
(benchmarks/results/gpu/nvidia-h100.json): it gives the FLOPs that a second is worth."""
GPU_BYTES = 0.85 * 3.35e12
"""Of a second: what streaming kernels reach of an H100's data sheet."""


@dataclass(frozen=True)
class Size:
    """Of a step: images, patches of an image, channels, blocks, classes, side of a patch, tokens of text. As ViT-B/16
    at 128 px."""

    batch: int = 256
    patches: int = 64
    dim: int = 768
    depth: int = 12
    classes: int = 1000
    patch: int = 16
    text: int = 0


@dataclass(frozen=True)
class Cost:
    """Of a training step. flops: of all its images."""

    flops: int
    bytes: int


def features_of(head: str, size: Size) -> tuple[int, int]:
    """(numbers of an image that the head normalises or mixes, numbers that its classifier reads)."""
    dim, depth = size.dim, size.depth
    last = min(LAST_BLOCKS, depth) * dim
    return {
        "cls": (dim, dim),
        "mean": (depth * dim, dim),
        "ifa": (depth * dim, dim),
        "last_n": (last, last),
        "all_layers": (2 * depth * dim, 2 * depth * dim),
        "attentive": (2 * depth * dim, dim),
    }[head]


def weights_of(head: str, size: Size) -> int:
    """Weights of the head's products."""
    own = {"ifa": size.depth, "attentive": size.dim * attention_heads(size.dim) + 2 * size.dim**2}
    return features_of(head, size)[1] * size.classes + own.get(head, 0)


def attention_heads(dim: int) -> int:
    """Of the attentive head, of 64 channels each."""
    return max(1, dim // 64)


def products_of(head: str, size: Size) -> int:
    """FLOPs of a head's forward pass for one image."""
    dim, depth = size.dim, size.depth
    classifier = 2 * features_of(head, size)[1] * size.classes
    if head == "ifa":
        return classifier + 2 * depth * dim
    if head == "attentive":  # scores, averages, values, projection
        return classifier + 2 * 2 * 2 * depth * dim * attention_heads(dim) + 2 * 2 * dim**2
    return classifier


def head_cost(head: str, size: Size, how: str = "eager") -> Cost:
    """All that a head does in a training step, and what the backbone does for it between the blocks. how: a key of
    AVERAGE_PASSES. `stacked` is IFA as the reference computes it: every block's tokens are stacked, and the gradient of
    the stack is made of zeros, filled, and given back in parts that are added to the tokens'."""
    kind = "ifa" if head == "stacked" else head
    features, _ = features_of(kind, size)
    moved = FEATURE_PASSES * 2 * size.batch * features + WEIGHT_BYTES * weights_of(kind, size)
    token = 2 * size.batch * size.dim * size.depth  # bytes of one in 16 bits, of all images and blocks
    if HEADS[kind].reads == "cls_and_average":
        moved += AVERAGE_PASSES[how] * size.patches * token
    if head == "stacked":  # stacked: 2; zeros: 1; given back: 2; added: 3
        moved += 8 * (size.patches + size.text) * token
    return Cost(TRAINING * size.batch * products_of(kind, size), moved)


def step_flops(size: Size) -> int:
    """FLOPs of a training step of the vision transformer with the CLS head, for all images."""
    tokens, dim = 1 + size.patches + size.text, size.dim
    block = 2 * 12 * tokens * dim**2 + 4 * tokens**2 * dim
    embedding = 2 * size.patches * dim * 3 * size.patch**2
    # Nothing is propagated to the pixels: of the patches' embedding there is the gradient of its weights alone.
    return size.batch * (TRAINING * (size.depth * block + products_of("cls", size)) + 2 * embedding)


def share_of_step(head: str, size: Size, how: str = "eager") -> float:
    """What a head adds to the time of a step with the CLS head on a GPU, as a share of it, where nothing overlaps."""
    mine, cls = head_cost(head, size, how), head_cost("cls", size, how)
    rate = step_flops(Size()) / STEP_SECONDS[how]
    return ((mine.flops - cls.flops) / rate + (mine.bytes - cls.bytes) / GPU_BYTES) / (step_flops(size) / rate)
