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
    """The Hessian's largest eigenvalue. residual: |H v - value v| / |value| for the unit vector v that was reached, so
    that an eigenvalue lies within that share of the value; steps: products with the Hessian that it took."""

    value: float
    residual: float
    steps: int


def largest_eigenvalue(
    parameters: Sequence[tuple[str, nn.Parameter]],
    gradient: Callable[[], list[Tensor]],
    seed: int,
    tolerance: float = 0.01,
    most: int = 50,
) -> Eigenvalue:
    """By locally optimal power iteration (Knyazev 2001, doi 10.1137/S1064827500366124, without preconditioner), until
    the residual is at most `tolerance`.

    Each step takes the best vector in the span of the one before, of its residual and of the last move. Power iteration
    alone does not arrive where a negative eigenvalue has the same magnitude, as early in a training. A product with the
    Hessian is the central difference of two gradients along the vector: it takes any layer, also one whose gradient
    cannot be derived again (a fused attention's). parameters: float64, by name; gradient: of the loss with respect to
    them. The first vector is Gaussian, a function of the seed and the names. The weights are afterwards as they were.
    """
    weights = [parameter.detach().clone() for _, parameter in parameters]
    step = _DIFFERENCE * math.sqrt(sum(float(weight.square().sum()) for weight in weights))

    @torch.no_grad()
    def gradient_at(vector: Tensor, distance: float) -> Tensor:
        parts = vector.split([weight.numel() for weight in weights])
        for (_, parameter), weight, part in zip(parameters, weights, parts, strict=True):
            parameter.copy_(weight).add_(part.view_as(weight), alpha=distance)
        with torch.enable_grad():
            slopes = gradient()
        return torch.cat([slope.flatten() for slope in slopes])

    def product(vector: Tensor) -> Tensor:
        return (gradient_at(vector, step) - gradient_at(vector, -step)) / (2 * step)

    vector = torch.cat([gaussian(seed, 0, name, its.shape).to(its).flatten() for name, its in parameters])
    vector /= vector.norm()
    image, steps = product(vector), 1
    move: Tensor | None = None
    while True:
        value = float(vector @ image)
        rest = image - value * vector
        rest -= (vector @ rest) * vector  # rounding, which would grow
        length = float(rest.norm())
        residual = length / abs(value) if value else math.inf
        if steps + 2 > most or not tolerance < residual or not math.isfinite(length):
            break
        span = [vector, rest / length]
        if move is not None:
            beside = move - sum(((one @ move) * one for one in span), torch.zeros_like(move))
            if float(beside.norm()) > 1e-6 * float(move.norm()):  # else it is rounding alone
                span.append(beside / beside.norm())
        images = [image, *(product(one) for one in span[1:])]
        steps += len(span) - 1
        small = torch.stack([torch.stack([one @ other for other in images]) for one in span])
        shares = torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -1]
        move = torch.stack(span[1:], dim=1) @ shares[1:]
        vector, image = shares[0] * vector + move, torch.stack(images, dim=1) @ shares
        norm = vector.norm()  # 1, but for rounding
        vector, image = vector / norm, image / norm
    for (_, parameter), weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return Eigenvalue(value, residual, steps)


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
