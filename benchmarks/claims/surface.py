"""Loss surfaces around trained weights: directions, the losses on a plane and on a line, and how sharp they are.

The plane is that of Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913): trained weights
w, two random directions d1 and d2, and the loss of w + a d1 + b d2. Each direction is Gaussian and filter-normalised:
every filter of d has the norm of the same filter of w, so that a and b mean the same for networks whose weights are of
different size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_train.models.parameter_groups import is_decayed

Floats = NDArray[np.float64]
Point = tuple[float, float]

LINE_BEGIN, LINE_END = -0.2, 1.2
_CURVATURE_STEP = 1 / 20  # of the radius
_NEAR = 5  # points of the plane before its grid: the centre and its neighbours


# ---------------------------------------------------------------------- directions
def gaussian(seed: int, direction: int, name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 on the CPU: a function of seed, number of the direction and parameter's name.

    So models with different heads get the same numbers for what they have in common. No global generator is used.
    """
    digest = hashlib.sha256(f"{seed}/{direction}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def draw_direction(model: nn.Module, seed: int, direction: int) -> dict[str, Tensor]:
    """A filter-normalised direction by parameter name, on the model's device; what is not in it does not move.

    For each filter i, the i-th slice along the first axis of a weight (a convolution's filter, a linear layer's row, a
    word's embedding), d_i <- d_i |w_i| / |d_i| in the Frobenius norm (Li et al. 2018, section 4). Biases and norms do
    not move, as in Li's code, which takes what has one axis for such. Neither do the [CLS] token, the position
    embeddings and the token type: like biases they are added to what the filters give, and have no filters of their
    own. In all, what moves is what weight decay is meant for (`is_decayed`), of what is trained: weights that
    model.freeze holds are no solution of the run. A filter that is zero stays.
    """
    drawn = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_decayed(name, parameter):
            noise = gaussian(seed, direction, name, parameter.shape).to(parameter.device)
            scale = _filter_norms(parameter.detach()) / _filter_norms(noise)
            drawn[name] = noise * scale.view(-1, *[1] * (noise.ndim - 1))
    return drawn


def _filter_norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)


def move_on_plane(model: nn.Module, one: dict[str, Tensor], other: dict[str, Tensor]) -> Callable[[float, float], None]:
    """A function of (a, b) that puts w + a `one` + b `other` into the model, w being its parameters at this call."""
    moving = {name: parameter for name, parameter in model.named_parameters() if name in one}
    start = {name: parameter.detach().clone() for name, parameter in moving.items()}

    @torch.no_grad()
    def move(a: float, b: float) -> None:
        for name, parameter in moving.items():
            parameter.copy_(start[name]).add_(one[name], alpha=a).add_(other[name], alpha=b)

    return move


def move_on_line(model: nn.Module, initial: dict[str, Tensor]) -> Callable[[float], None]:
    """A function of t that puts (1 - t) w0 + t w1 into the model: `initial` at t = 0, its state at this call at t = 1.

    Interpolates all that is floating-point in the state, running statistics too, as at t = 0 they would else be those
    of the trained model; a running variance below 0, beyond the ends, is set to 0.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    start = {name: initial[name].to(tensor.device) for name, tensor in state.items()}
    end = {name: tensor.clone() for name, tensor in state.items()}

    @torch.no_grad()
    def move(t: float) -> None:
        for name, tensor in state.items():
            tensor.copy_(start[name]).mul_(1 - t).add_(end[name], alpha=t)
            if name.endswith("running_var"):
                tensor.clamp_(min=0)

    return move


# ---------------------------------------------------------------------- points
def grid(points: int, radius: float) -> Floats:
    """(points,) coordinates of the plane along one axis, from -radius to radius; `points` odd, exactly 0 amid them."""
    half = points // 2
    return radius * np.arange(-half, half + 1) / half


def line_positions(line_points: int) -> Floats:
    """(line_points,) positions t on the line."""
    return np.linspace(LINE_BEGIN, LINE_END, line_points)


def plane_points(points: int, radius: float) -> list[Point]:
    """(a, b) of what is measured on the plane: the centre, its four neighbours, and the grid, one row for each a."""
    h = _CURVATURE_STEP * radius
    axis = grid(points, radius).tolist()
    return [(0.0, 0.0), (h, 0.0), (-h, 0.0), (0.0, h), (0.0, -h), *((a, b) for a in axis for b in axis)]


def all_line_positions(line_points: int) -> list[float]:
    """What is measured on the line: its positions, and after them its two ends, which need not be among them."""
    return [*line_positions(line_points).tolist(), 0.0, 1.0]


def surface_arrays(plane: Floats, line: Floats, points: int, radius: float) -> dict[str, Floats]:
    """`a`, `b` (points,) the plane's coordinates, `loss`, `top1` (points, points) at [a, b], `t`, `line_loss` (line
    points,), both empty where no line was measured.

    plane, line: (loss, top-1) at each of `plane_points` and `all_line_positions`; the line without points if none.
    """
    axis = grid(points, radius)
    loss, top1 = plane[_NEAR:].reshape(points, points, 2).transpose(2, 0, 1)
    line_loss = line[:-2, 0]
    t = line_positions(len(line_loss))
    return {"a": axis, "b": axis, "loss": loss, "top1": top1, "t": t, "line_loss": line_loss}


# ---------------------------------------------------------------------- how sharp
def sharpness(plane: Floats, points: int, radius: float) -> dict[str, float]:
    """Three numbers for the plane; L is the loss, L0 that of the trained weights, r the radius.

    mean_excess_loss: the mean of L(a, b) - L0 over the grid's points with a^2 + b^2 <= r^2; the expected sharpness of
    Neyshabur et al. 2017 (arXiv 1706.08947), the expectation over a disc instead of a Gaussian.
    max_excess_loss_half_radius: the highest L(a, b) - L0 over the grid's points with a^2 + b^2 <= (r / 2)^2; the
    sharpness of Keskar et al. 2017 (arXiv 1609.04836) on the plane instead of a box, and not divided by 1 + L0.
    curvature: the mean over d in (d1, d2) of (L(h d) - 2 L0 + L(-h d)) / h^2, h = r / 20, at points of their own: the
    central difference for d^T H d, H the Hessian.
    """
    axis = grid(points, radius)
    distance = np.hypot(axis[:, None], axis[None, :]).ravel()
    centre, *neighbours = plane[:_NEAR, 0].tolist()
    excess = plane[_NEAR:, 0] - centre
    within = radius * (1 + 1e-9)  # points on the rim count, however they were rounded
    h = _CURVATURE_STEP * radius
    return {
        "mean_excess_loss": float(excess[distance <= within].mean()),
        "max_excess_loss_half_radius": float(excess[distance <= within / 2].max()),
        "curvature": (sum(neighbours) - 4 * centre) / (2 * h * h),
    }


def line_barrier(line: Floats) -> float | None:
    """The highest L(t) - ((1 - t) L(0) + t L(1)) over the positions t in [0, 1], the ends among them, so never below 0;
    None without a line. With its ends at two solutions it is the error barrier of Frankle et al. 2020 (arXiv
    1912.05671); from the initial weights, as in Goodfellow et al. 2015 (arXiv 1412.6544), above 0 only where the loss
    on the way is higher than a straight descent's.
    """
    if not len(line):
        return None
    *losses, first, last = line[:, 0].tolist()
    between = [(t, loss) for t, loss in zip(line_positions(len(losses)).tolist(), losses, strict=True) if 0 < t < 1]
    above = [loss - ((1 - t) * first + t * last) for t, loss in between]
    # A loss that is no number is no reason to call the way flat.
    return math.nan if any(map(math.isnan, [*above, first, last])) else max([0.0, *above])
