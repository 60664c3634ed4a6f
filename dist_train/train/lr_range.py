"""`dist-train lr`: the learning-rate range test (Smith 2017, "Cyclical Learning Rates", section 3.3).

From the starting weights on, each step has a higher rate than the one before, by a constant factor, until the loss
diverges. Where it falls the rate is useful; where it rises the rate is too high.
"""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from dist_train.config import Recipe
from dist_train.errors import WorkError, written
from dist_train.files import write_atomically
from dist_train.machine import is_installed
from dist_train.train.ranks import mean_over_ranks
from dist_train.train.rehearsal import rehearsal
from dist_train.train.schedule import scaled_rate

log = logging.getLogger(__name__)

SMOOTHING = 0.9
"""Weight of what was before in the running mean of the losses."""
DIVERGED = 4.0
"""The loss has diverged when its running mean is this many times the lowest."""
BELOW_LOWEST = 10.0
"""The suggestion is the rate at which the running mean was lowest, divided by this: there the loss falls surely, and a
rate near the lowest point is at the edge of what diverges."""


@dataclass(frozen=True)
class RangeTest:
    """rates: the optim.lr of each step that was made. losses: what followed. smoothed: their running mean."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool

    @property
    def lowest(self) -> int:
        """The step of the lowest running mean."""
        return min(range(len(self.smoothed)), key=lambda step: self.smoothed[step])

    @property
    def suggestion(self) -> float:
        """An optim.lr to train with."""
        return self.rates[self.lowest] / BELOW_LOWEST

    def doubts(self) -> str:
        """Why the suggestion is to be doubted; empty where it is not."""
        if self.lowest < max(1, len(self.rates) // 10):
            return "the loss never fell: begin at a lower --low"
        if not self.diverged and self.lowest == len(self.rates) - 1:
            return "the loss still fell at the highest rate: raise --high"
        return ""


def ramp(low: float, high: float, steps: int) -> list[float]:
    """Rates from low to high, each a constant factor above the one before."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def running_means(losses: list[float]) -> list[float]:
    """Exponential running mean, corrected for its start at 0 (as Adam's moments, Kingma and Ba 2015)."""
    means, mean = [], 0.0
    for step, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING ** (step + 1)))
    return means


def range_test(recipe: Recipe, low: float, high: float, steps: int, output: Path) -> str:
    """Make the steps, write the table and, where matplotlib is installed, a picture. Returns what to tell the user.

    low, high: values of optim.lr. output: FILE.csv; the picture is FILE.png. Raises WorkError where not even the first
    losses are finite.
    """
    with written(output, "choose another --output"):  # before the steps, which may take long
        output.parent.mkdir(parents=True, exist_ok=True)
    result = _steps(recipe, ramp(low, high, steps))
    with written(output, "choose another --output"):
        write_atomically(output, _table(result).encode())
    files = [str(output)]
    if not is_installed("matplotlib"):
        log.info("no picture: pip install matplotlib")
    else:
        picture = output.with_suffix(".png")
        with written(picture, "choose another --output"):
            write_atomically(picture, _picture(result))
        files.append(str(picture))
    lines = [
        f"optim.lr {result.suggestion:.2g}: a tenth of {result.rates[result.lowest]:.2g}, where the smoothed loss was "
        f"lowest ({result.smoothed[result.lowest]:.3f}, at the start {result.smoothed[0]:.3f})"
    ]
    if doubts := result.doubts():
        lines.append(f"doubtful: {doubts}")
    return "\n".join([*lines, *files])


def _steps(recipe: Recipe, rates: list[float]) -> RangeTest:
    scale = scaled_rate(replace(recipe.optim, lr=1.0), recipe.train.batch_size)  # of the rate over optim.lr
    losses: list[float] = []
    diverged = False
    with rehearsal(recipe) as it:
        for step, rate in enumerate(rates):
            loss = mean_over_ranks(it.train_step(it.batches, rate * scale, step), it.place.world_size)
            if not math.isfinite(loss):
                diverged = True
                break
            losses.append(loss)
            means = running_means(losses)
            if step % 10 == 0:
                log.info("step %d  optim.lr %.3g  loss %.4f  smoothed %.4f", step + 1, rate, loss, means[-1])
            if means[-1] > DIVERGED * min(means):
                diverged = True
                break
    if len(losses) < 2:
        raise WorkError("the loss is not finite from the first steps on; begin at a lower --low")
    log.info("ended after step %d, %s", len(losses), "diverged" if diverged else "at the highest rate")
    return RangeTest(rates[: len(losses)], losses, running_means(losses), diverged)


def _table(result: RangeTest) -> str:
    lines = ["step,lr,loss,smoothed_loss"]
    for step, (rate, loss, smoothed) in enumerate(zip(result.rates, result.losses, result.smoothed, strict=True)):
        lines.append(f"{step + 1},{rate:.6g},{loss:.6g},{smoothed:.6g}")
    return "\n".join([*lines, ""])


def _picture(result: RangeTest) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(result.rates, result.losses, color="0.75", linewidth=1, label="loss of a step")
    axes.plot(result.rates, result.smoothed, label="running mean")
    axes.axvline(result.suggestion, color="C2", linestyle="--", label=f"suggestion {result.suggestion:.2g}")
    low, high = min(result.smoothed), max(result.smoothed[: result.lowest + 1])
    axes.set_ylim(low - 0.2 * (high - low + 0.01), high + 0.5 * (high - low + 0.01))
    axes.set_xscale("log")
    axes.set_xlabel("optim.lr")
    axes.set_ylabel("training loss")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
