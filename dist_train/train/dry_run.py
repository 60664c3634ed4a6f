"""`dist-train train --dry-run`: a few real steps, and what the whole run will take by them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch

from dist_train.config import Recipe
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import Manifest
from dist_train.output import say
from dist_train.train.memory import predict_step
from dist_train.train.meters import synchronize
from dist_train.train.ranks import from_rank_zero, gather
from dist_train.train.rehearsal import Rehearsal, rehearsal
from dist_train.train.schedule import learning_rate

_MOST_STEPS, _MOST_S = 10, 5.0  # measured, whichever comes first, but one step at least
_EVAL_BATCHES = 2


@dataclass(frozen=True)
class Estimate:
    """What was measured, and what follows for the run. memory_mb: of the rank that took most. device_gb: what its GPU
    has; None on the CPU. eval_images_per_s: over all ranks; None where no split is evaluated."""

    ranks: int
    steps_measured: int
    batch_size: int
    memory_mb: float
    device_mb: float | None
    images_per_s: float
    step_ms: float
    data_wait_ms: float
    eval_images_per_s: float | None
    steps: int
    eval_images: int
    cached: bool = False
    """Whether the backbone sees each image once (data.feature_cache): eval_images are all images, and the steps, of the
    head alone, are not measured."""
    price_per_hour: float | None = None
    predicted_mb: float | None = None
    """Of a step alone (`memory.predict_step`); None with a cache, whose steps are of the head."""

    @property
    def training_s(self) -> float:
        """Seconds of all steps."""
        return 0.0 if self.cached else self.steps * self.step_ms / 1000

    @property
    def evaluation_s(self) -> float:
        """Seconds of all evaluations."""
        return self.eval_images / self.eval_images_per_s if self.eval_images_per_s else 0.0

    def __str__(self) -> str:
        total = self.training_s + self.evaluation_s
        of_device = f" of the GPU's {self.device_mb:,.0f} MB" if self.device_mb else ""
        rank = "the process" if self.ranks == 1 else f"each of {self.ranks} ranks"
        predicted = f"; {self.predicted_mb:,.0f} MB predicted for the step alone" if self.predicted_mb else ""
        lines = [
            f"measured   {self.steps_measured} steps of {self.batch_size} samples",
            f"memory     {self.memory_mb:,.0f} MB{of_device}, at most, for {rank}{predicted}",
            f"speed      {self.images_per_s:,.1f} images/s: {self.step_ms:,.0f} ms a step, {self.data_wait_ms:,.0f} ms "
            "of it waiting for data",
            f"time       {_duration(total)}: {self.steps:,} steps in {_duration(self.training_s)}, evaluations in "
            f"{_duration(self.evaluation_s)}; the start and checkpoints come on top",
        ]
        if self.cached:
            lines[-1] = (
                f"time       {_duration(total)}: {self.eval_images:,} images once through the frozen backbone; the "
                f"head's {self.steps:,} steps, the start and checkpoints come on top"
            )
        if self.price_per_hour is not None:
            lines.append(f"cost       {self.price_per_hour * total / 3600:,.2f} at {self.price_per_hour:g} an hour")
        return "\n".join(lines)


def dry_run(recipe: Recipe, price_per_hour: float | None = None, resume: str = "none") -> None:
    """Make a few steps and say what the whole run will take; all ranks call this together. Leaves nothing behind."""
    cached = bool(recipe.data.feature_cache)
    with rehearsal(recipe) as it:
        estimate = _measure(it, cached, price_per_hour)
        if it.place.rank == 0:
            say(estimate)
            if resume != "none":
                say("--resume   takes nothing off: these are of the whole run, from its first step")


def _measure(it: Rehearsal, cached: bool, price_per_hour: float | None) -> Estimate:
    recipe, place, step = it.recipe, it.place, it.train_step
    samples, batch_size = it.manifest.split("train").samples, recipe.train.batch_size

    def make_step(number: int) -> None:
        rate = learning_rate(recipe.optim, batch_size, number, it.total_steps, samples)
        step(it.batches, rate, number)
        step.meter.step(batch_size)

    # The first step has its operators looked at, the second is compiled or recorded, the third is as all others.
    warm_up = 1 if recipe.model.compile == "none" else 3
    for number in range(warm_up):
        make_step(number)
    synchronize(step.engine.device)
    step.meter.read()  # its memory counts
    step.meter.reset()
    started = time.perf_counter()

    def is_enough() -> bool:
        return step.meter.steps == _MOST_STEPS or time.perf_counter() - started > _MOST_S

    make_step(warm_up)
    while not from_rank_zero(is_enough, place):
        make_step(warm_up + step.meter.steps)
    steps = step.meter.steps
    figures = step.meter.read()
    device = step.engine.device
    # With the cache every image of every split is looked at once, and then none again.
    splits = dict.fromkeys(it.manifest.splits, 1) if cached else count_evaluations(recipe, it.manifest, it.total_steps)
    return Estimate(
        ranks=place.world_size,
        steps_measured=steps,
        batch_size=batch_size,
        memory_mb=max(gather(step.meter.highest_mb, place)),
        device_mb=torch.cuda.mem_get_info(device)[1] / 1e6 if device.type == "cuda" else None,
        images_per_s=figures["images_per_s"],
        step_ms=figures["step_ms"],
        data_wait_ms=figures["data_wait_ms"],
        eval_images_per_s=_evaluation_rate(it, next(iter(splits))) if splits else None,
        steps=min(it.total_steps, recipe.train.stop_after_steps or it.total_steps),
        eval_images=sum(times * it.manifest.split(split).samples for split, times in splits.items()),
        cached=cached,
        price_per_hour=price_per_hour,
        predicted_mb=None if cached else _predicted_mb(it),
    )


def _predicted_mb(it: Rehearsal) -> float:
    vocabulary = it.tokenizer.vocab_size if it.tokenizer else 0
    on_gpu = it.train_step.engine.device.type == "cuda"
    return predict_step(it.recipe, len(it.outputs), vocabulary, it.place.world_size, on_gpu).peak_mb


def count_evaluations(recipe: Recipe, manifest: Manifest, total_steps: int) -> dict[str, int]:
    """How often a run evaluates each split until it comes to its end, or to train.stop_after_steps."""
    config = recipe.train

    def at_ends_of_epochs(steps: int) -> int:  # a batch larger than the split passes several at once
        return min(steps, steps * config.batch_size // manifest.split("train").samples // config.eval_every)

    times = {"val": at_ends_of_epochs(total_steps - 1) + 1, "test": 1}
    if 0 < config.stop_after_steps < total_steps:
        times = {"val": at_ends_of_epochs(config.stop_after_steps)}
    weights = 2 if config.ema else 1  # the averaged ones too
    return {split: weights * count for split, count in times.items() if count and split in manifest.splits}


def _evaluation_rate(it: Rehearsal, split: str) -> float:
    """Images a second in evaluation over all ranks, by the last of a few batches."""
    step = it.train_step
    loader = EvalLoader(
        it.recipe.data,
        it.manifest,
        split,
        it.place,
        batch_size=it.recipe.train.eval_batch_size,
        tokenizer=it.tokenizer,
        quarantine=None,
    )
    step.engine.eval()
    seconds, images = 0.0, 0
    with torch.no_grad():
        batches = iter(loader)
        for _ in range(min(_EVAL_BATCHES, len(loader))):
            started = time.perf_counter()
            batch = next(batches)
            step.forward(batch)
            synchronize(step.engine.device)
            seconds, images = time.perf_counter() - started, len(batch.labels)
    step.engine.train()
    everyone = gather((seconds, images), it.place)
    return sum(images for _, images in everyone) / max(seconds for seconds, _ in everyone)


def _duration(seconds: float) -> str:
    """As people say it: 42 s, 0:12:30 or 1 day, 3:00:00."""
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))
