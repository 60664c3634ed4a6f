"""How sharp the loss is around trained weights, by two measures that do not depend on one plane.

The mean excess loss over many random directions, with what it owes to the directions and to the samples; and the
largest eigenvalue of the Hessian. Both are of the parameters that the run trained, on the samples that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.claims.surface import Floats, draw_direction, gaussian, move_on_plane
from dist_train.data.loader import Batch

FIRST_DIRECTION = 3  # 1 and 2 span the plane
SHARES = (0.25, 0.75)  # of the disc's area within the two radii: exact for a loss that is quadratic
_DIFFERENCE = 1e-5  # of the weights' norm, in float64: 1e-10 of the third derivative, 1e-11 of the gradient's digits


# ---------------------------------------------------------------------- over many directions
def excess_losses(model: nn.Module, losses: Callable[[], Floats], seed: int, directions: int, radius: float) -> Floats:
    """(directions, samples): by how much each sample's loss is higher around the weights than at them, along a
    filter-normalised direction.

    The mean over both senses of the direction and the radii within which lie 1/4 and 3/4 of the area of a disc of
    `radius`: an estimate of the mean over the disc from directions of their own (see `surface.sharpness`).
    losses: (samples,) with the model's weights as they are.
    """
    centre = losses()
    excess = np.empty((directions, len(centre)))
    for i in range(directions):
        one = draw_direction(model, seed, FIRST_DIRECTION + i)
        move = move_on_plane(model, one, one)
        around = []
        for distance in (radius * math.sqrt(share) for share in SHARES):
            for sense in (distance, -distance):
                move(sense, 0.0)
                around.append(losses())
        move(0.0, 0.0)
        excess[i] = np.mean(around, axis=0) - centre
    return excess


def mean_excess(excess: Floats) -> dict[str, float | None]:
    """The mean of `excess_losses` and its 95 % intervals: over the directions (of other samples the same), and over the
    samples. None where there is one of a kind alone."""
    found: dict[str, float | None] = {"expected_excess_loss": float(excess.mean())}
    for name, axis in (("directions", 1), ("samples", 0)):
        found[f"expected_excess_loss_error_{name}"] = _interval(excess.mean(axis=axis))
    return found


def _interval(values: Floats) -> float | None:
    """Half of the 95 % interval of a mean of independent values."""
    from scipy.stats import t

    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


# ---------------------------------------------------------------------- the Hessian
@dataclass(frozen=True)
class Eigenvalue:
    """The Hessian's eigenvalue of the largest magnitude. residual: |H v - value v| / |value| for the unit vector v that
    was reached; steps: of the power iteration."""

    value: float
    residual: float
    steps: int


def largest_eigenvalue(
    parameters: Sequence[tuple[str, nn.Parameter]],
    gradient: Callable[[], list[Tensor]],
    seed: int,
    tolerance: float = 0.002,
    most: int = 50,
) -> Eigenvalue:
    """By power iteration until the Rayleigh quotient changes by less than `tolerance` of itself twice in a row.

    A product with the Hessian is the central difference of two gradients along the vector: it takes any layer, also one
    whose gradient cannot be derived again (a fused attention's). parameters: float64, by name; gradient: of the loss
    with respect to them. The first vector is Gaussian, a function of the seed and the names. The weights are afterwards
    as they were.
    """
    weights = [parameter.detach().clone() for _, parameter in parameters]
    step = _DIFFERENCE * _norm(weights)

    @torch.no_grad()
    def put(vector: list[Tensor], distance: float) -> None:
        for (_, parameter), weight, part in zip(parameters, weights, vector, strict=True):
            parameter.copy_(weight).add_(part, alpha=distance)

    def product(vector: list[Tensor]) -> list[Tensor]:
        put(vector, step)
        ahead = gradient()
        put(vector, -step)
        return [(one - other) / (2 * step) for one, other in zip(ahead, gradient(), strict=True)]

    vector = [gaussian(seed, 0, name, parameter.shape).to(parameter) for name, parameter in parameters]
    vector = _scaled(vector, 1 / _norm(vector))
    value, close, steps, residual = 0.0, 0, 0, math.inf
    while steps < most and close < 2:
        image = product(vector)
        former, value = value, float(sum((a * b).sum() for a, b in zip(vector, image, strict=True)))
        length = _norm(image)
        steps += 1
        if not (math.isfinite(length) and length > 0):
            break
        # |H v - value v|^2 = |H v|^2 - value^2 for a unit vector
        residual = math.sqrt(max(0.0, length**2 - value**2)) / abs(value) if value else math.inf
        close = close + 1 if abs(value - former) <= tolerance * abs(value) else 0
        vector = _scaled(image, 1 / length)
    put(vector, 0.0)
    return Eigenvalue(value, residual, steps)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _scaled(tensors: Sequence[Tensor], by: float) -> list[Tensor]:
    return [tensor * by for tensor in tensors]


# ---------------------------------------------------------------------- of a model on samples
@torch.no_grad()
def sample_losses(forward: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> Floats:
    """(samples,) cross-entropies, the softmax in float64."""
    parts = [functional.cross_entropy(forward(one).double(), one.labels, reduction="none") for one in batches]
    return torch.cat(parts).cpu().numpy()


def hessian_eigenvalue(model: nn.Module, batches: Sequence[Batch], seed: int, most: int = 50) -> Eigenvalue:
    """`largest_eigenvalue`, in at most so many steps, of the mean cross-entropy over what is trained of a model in
    evaluation mode, in float64. The model is float32 before and afterwards, its weights the same."""
    model.double()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    count = sum(len(batch.labels) for batch in batches)

    def gradient() -> list[Tensor]:
        sums = [torch.zeros_like(parameter) for _, parameter in trained]
        for batch in batches:
            texts = () if batch.text_ids is None else (batch.text_ids, batch.text_mask)
            logits = model(batch.images.double(), *texts)
            loss = functional.cross_entropy(logits, batch.labels, reduction="sum") / count
            parts = torch.autograd.grad(loss, [its for _, its in trained], allow_unused=True)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:  # the head may read nothing of it
                    total += part
        return sums

    try:
        return largest_eigenvalue(trained, gradient, seed, most=most)
    finally:
        model.float()
