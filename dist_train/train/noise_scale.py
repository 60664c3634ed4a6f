"""The gradient noise scale: the batch size beyond which more samples in a step gain little, estimated as a run trains.

B = tr(S) / |G|^2, with G the gradient of the loss over all data and S the covariance of one sample's gradient
(McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, equation 2.9). To reach a loss,
training at batch size b takes 1 + B / b times as many steps as at the largest one, and 1 + b / B times as many samples
as at the smallest (their equation 2.11): at B twice of each. That holds for steps along the gradient, as SGD's; for
AdamW, which rescales it, B is a guide.

Two estimates. Both compare the gradient of few samples with that of the whole batch, whose expected squares differ by
noise alone (their appendix A.1, `separate`):
- of all parameters: the gradients of the micro-batches of all ranks, so there must be more than one a step;
- of the layer norms' parameters: the gradients of single samples, which cost next to nothing there (Gray et al. 2024,
  "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in Transformers", arXiv
  2411.00999). Their noise scale is another one, that the whole model's was found to move with.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from dist_train.place import Place

WINDOW = 100
"""Measured steps that an estimate is made of; the noise scale grows in the course of training."""
FEWEST = 20
"""Measured steps without which an estimate has no interval."""
_TOGETHER = 1 << 19
"""Elements of gradients from which their norms are taken, all in one call: a call costs more than a small norm."""
_QUANTILE = statistics.NormalDist().inv_cdf(0.975)


def separate(small: Tensor, large: Tensor, few: int, many: int) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of (tr(S), |G|^2) from the squared norms of mean gradients: of `few` samples, averaged over
    all such parts of a batch, and of the `many` samples of the batch.

    Equations A.2 and A.3 of McCandlish et al.; E[norm^2] of n samples is |G|^2 + tr(S) / n.
    """
    return (small - large) / (1 / few - 1 / many), (many * large - few * small) / (many - few)


@dataclass(frozen=True)
class Estimate:
    """A noise scale in samples, and its 95 % interval: infinite where the gradient cannot be told from noise, NaN where
    there are too few steps to say."""

    value: float
    low: float
    high: float


def ratio_of_means(traces: list[float], squares: list[float]) -> Estimate:
    """mean(traces) / mean(squares), with Fieller's interval at 95 %.

    The ratio of the means, as that of two single estimates has no mean. The interval (Fieller 1954, "Some Problems in
    Interval Estimation") takes the errors of both and what they have in common into account, and has no upper end
    where the mean of `squares` is not significantly above 0. Traces are not negative: neither is `low`.
    """
    count = len(traces)
    trace, square = math.fsum(traces) / count, math.fsum(squares) / count
    value = trace / square if square > 0 else math.inf
    if count < FEWEST:
        return Estimate(value, math.nan, math.nan)
    per_step = _QUANTILE**2 / count / (count - 1)
    of_trace = per_step * math.fsum((a - trace) ** 2 for a in traces)
    of_square = per_step * math.fsum((b - square) ** 2 for b in squares)
    shared = per_step * math.fsum((a - trace) * (b - square) for a, b in zip(traces, squares, strict=True))
    # The ratios R with (trace - R square)^2 <= quantile^2 var(trace - R square): a R^2 - 2 b R + c <= 0.
    a, b, c = square**2 - of_square, trace * square - shared, trace**2 - of_trace
    inside = b * b - a * c
    if a > 0:
        root = math.sqrt(max(inside, 0.0))
        return Estimate(value, max(0.0, (b - root) / a), max(0.0, (b + root) / a))
    if c <= 0 or inside < 0 or a == 0:  # no ratio can be left out
        return Estimate(value, 0.0, math.inf)
    return Estimate(value, max(0.0, (b - math.sqrt(inside)) / a), math.inf)


@dataclass
class NoiseMeter:
    """Estimates the noise scale from every `every`-th step of a run, at the first.

    All ranks call each method together. It only reads: what is trained is the same to the last bit, but where code is
    compiled, which a measured step does without. model: as the engine has it, on its device. batch_size: of all ranks.
    per_sample: whether to look at layer norms; a model that computes its blocks again cannot have it.
    """

    model: nn.Module
    every: int
    batch_size: int
    accumulation: int
    place: Place
    per_sample: bool = True
    _waiting: list[Tensor] = field(default_factory=list, init=False)  # gradients whose norms are not taken yet
    _elements: int = field(default=0, init=False)  # of those
    _squares: list[Tensor] = field(default_factory=list, init=False)  # of parameters, in this step
    _large: Tensor | None = field(default=None, init=False)
    # What single samples have added to the gradient of a norm's parameter in this micro-batch: (B, D), float32.
    _added: dict[nn.Parameter, Tensor] = field(default_factory=dict, init=False)
    _of_samples: list[Tensor] = field(default_factory=list, init=False)  # squared norms, (B,) of each micro-batch
    _sums: Tensor | None = field(default=None, init=False)  # the gradients of all norms, summed over samples
    _steps: list[Tensor] = field(default_factory=list, init=False)  # since the last figures: small, large, of norms too

    def __post_init__(self) -> None:
        self._window: deque[list[float]] = deque(maxlen=WINDOW)
        norms = [module for module in self.model.modules() if _is_read(module)] if self.per_sample else []
        self._read_norms = [norm for norm in norms if isinstance(norm, nn.LayerNorm)]
        self._parts = self.accumulation * self.place.world_size
        self._micro_batch = self.batch_size // self._parts

    @property
    def sees_nothing(self) -> bool:
        """Whether neither estimate can be made: a step has one part, and no layer norm that is read."""
        return self._parts == 1 and not (self._read_norms and self.batch_size > 1)

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) is measured."""
        return step % self.every == 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What happens inside are the passes of one optimizer step, with PyTorch's operators one by one."""
        # A step that was skipped may have left some.
        self._squares, self._of_samples, self._added = [], [], {}
        self._waiting, self._elements = [], 0
        self._large = self._sums = None
        with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
            if self._parts > 1:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        hooks.callback(parameter.register_hook(self._gradient).remove)
            for norm in self._read_norms:
                hooks.callback(norm.register_forward_hook(self._normed).remove)
            yield

    def micro_batch_done(self) -> None:
        """The backward pass of a micro-batch has ended."""
        self._take_norms()
        of_norms = (parameter for norm in self._read_norms for parameter in (norm.weight, norm.bias))
        gradients = [self._added.pop(parameter) for parameter in of_norms if parameter in self._added]
        if gradients:
            of_all = torch.cat(gradients, dim=1)
            self._of_samples.append(of_all.square().sum(dim=1))
            sums = of_all.sum(dim=0)
            self._sums = sums if self._sums is None else self._sums + sums

    def before_update(self, gradients: list[Tensor]) -> None:
        """Read the gradients of the step, the mean over the batch, where a rank has them whole (ZeRO 0)."""
        if self._parts > 1:
            norms = torch.stack(torch._foreach_norm(gradients))
            self._large = torch.linalg.vector_norm(norms).square()

    def step_done(self, norm: float | Tensor | None) -> None:
        """The step has ended. norm: of the batch's gradient, where `before_update` was not called."""
        if self._large is None and norm is not None and self._parts > 1:
            self._large = torch.as_tensor(norm, dtype=torch.float32).square()
        figures = [math.nan] * 4
        device = next((t.device for t in (*self._squares, *self._of_samples)), torch.device("cpu"))
        values = [torch.tensor(value, device=device) for value in figures]
        if self._squares and self._large is not None:
            # A micro-batch's loss is divided by the accumulation before its backward pass.
            total = torch.stack(self._squares).sum() * self.accumulation**2
            values[0], values[1] = total / self.accumulation, self._large.to(device)
        if self._sums is not None:
            # Of a sample's own loss: it is one of a mean over the micro-batch, which is divided by the accumulation.
            squares = torch.cat(self._of_samples) * (self._micro_batch * self.accumulation) ** 2
            sums = self._sums / self.place.world_size
            if self.place.world_size > 1:
                torch.distributed.all_reduce(sums)
            values[2], values[3] = squares.mean(), sums.square().sum()
        self._steps.append(torch.stack([value.float() for value in values]))
        self._squares, self._of_samples, self._sums, self._large = [], [], None, None

    def read(self) -> dict[str, float | None]:
        """Figures of the last `WINDOW` measured steps: noise_scale of all parameters, noise_scale_norms of the layer
        norms', each with _low and _high, the ends of its 95 % interval; None where one is infinite or not known."""
        if self._steps:
            steps = torch.stack(self._steps).double().cpu()
            self._steps = []
            if self.place.world_size > 1:
                # The squares of parts and samples differ from rank to rank, those of the batch do not.
                steps = _mean_over_ranks(steps, self.place.world_size)
            self._window.extend(row for row in steps.tolist() if not all(math.isnan(value) for value in row))
        figures: dict[str, float | None] = {}
        for name, first, few in (("noise_scale", 0, self._micro_batch), ("noise_scale_norms", 2, 1)):
            pairs = [row[first : first + 2] for row in self._window if all(map(math.isfinite, row[first : first + 2]))]
            if pairs and few < self.batch_size:
                small, large = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
                traces, squares = separate(small, large, few, self.batch_size)
                estimate = ratio_of_means(traces.tolist(), squares.tolist())
                ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
                figures |= {f"{name}{end}": _finite(value) for end, value in ends.items()}
        return figures

    def _gradient(self, gradient: Tensor) -> None:
        """Called with the gradient of a parameter of this micro-batch alone, before it is added to others or sent."""
        # Kept itself, no view of it: what another holds is copied, not taken, where gradients are added up in place.
        self._waiting.append(gradient)
        self._elements += gradient.numel()
        if self._elements >= _TOGETHER:
            self._take_norms()

    def _take_norms(self) -> None:
        if self._waiting:
            norms = torch.stack(torch._foreach_norm(self._waiting, dtype=torch.float32))
            self._squares.append(norms @ norms)
            self._waiting, self._elements = [], 0

    def _normed(self, norm: nn.LayerNorm, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._norm_gradient, norm, inputs[0].detach()))

    def _norm_gradient(self, norm: nn.LayerNorm, tokens: Tensor, gradient: Tensor) -> None:
        """tokens, gradient: (B, ..., D), of the input and the output of a layer norm."""
        gradient = gradient.detach().float()
        between = tuple(range(1, gradient.ndim - 1))

        def add(parameter: nn.Parameter, own: Tensor) -> None:
            own = own.sum(dim=between) if between else own
            self._added[parameter] = self._added[parameter] + own if parameter in self._added else own

        if norm.weight.requires_grad:
            normalised = functional.layer_norm(tokens.float(), norm.normalized_shape, eps=norm.eps)
            add(norm.weight, normalised.mul_(gradient))
        if norm.bias is not None and norm.bias.requires_grad:
            add(norm.bias, gradient)


def _is_read(module: nn.Module) -> bool:
    """Whether it is a layer norm over the last dimension, with something to learn."""
    if not isinstance(module, nn.LayerNorm) or isinstance(module, LayerNorm2d) or len(module.normalized_shape) != 1:
        return False
    return any(parameter.requires_grad for parameter in module.parameters())


def _mean_over_ranks(steps: Tensor, world_size: int) -> Tensor:
    shared = steps.to("cuda") if torch.distributed.get_backend() == "nccl" else steps
    torch.distributed.all_reduce(shared)
    return shared.cpu() / world_size


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
