"""Training, from top to bottom."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.cluster.watch import Watch
from dist_train.config import Recipe
from dist_train.data.features import FeatureEvalLoader, FeatureStore
from dist_train.data.loader import Batch, EvalLoader, TrainLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.plan import micro_batch_of
from dist_train.data.quarantine import QUARANTINE_NAME
from dist_train.data.tokenizer import TagTokenizer
from dist_train.errors import UseError
from dist_train.models.saved import read_averaged_weights
from dist_train.place import Place
from dist_train.recipe import check
from dist_train.train.badsteps import BadSteps
from dist_train.train.checkpoint import (
    CheckpointWriter,
    RunState,
    checkpoint_to_resume,
    load_optimizer,
    load_weights,
    recipe_changes,
)
from dist_train.train.ema import WeightAverage
from dist_train.train.engine import Engine, init_process_group, torch_device
from dist_train.train.evaluate import Evaluation, Forward, evaluate
from dist_train.train.features import feature_eval_loader, feature_train_loader, prepare_features
from dist_train.train.inputs import begin_tokenizer
from dist_train.train.meters import StepTrace, device_name
from dist_train.train.precision import compute_dtype
from dist_train.train.ranks import (
    StopSignal,
    average_batch_statistics,
    from_rank_zero,
    gather,
    mean_over_ranks,
    warn_of_stragglers,
)
from dist_train.train.record import SUMMARY_NAME, RunRecord, read_summary, start_console_log
from dist_train.train.runfolder import held_run_folder
from dist_train.train.schedule import count_steps, learning_rate
from dist_train.train.setup import build_step, initial_model, without_auto
from dist_train.train.step import TrainStep

log = logging.getLogger(__name__)


def train(recipe: Recipe, resume: str = "none") -> None:
    """Run a recipe; every rank calls this. resume: none, auto (the newest complete checkpoint), or a checkpoint.

    Ends normally when the run is complete, when train.stop_after_steps is reached, or after SIGTERM, SIGUSR1 or SIGHUP,
    having saved a checkpoint; after Ctrl-C, having saved one too, by KeyboardInterrupt.
    """
    place = init_process_group(recipe.train.timeout_s)
    start_console_log(place.rank)
    done = False
    try:
        with StopSignal(recipe.train.timeout_s) as stop, Watch(place, recipe.train.timeout_s):
            manifest = read_manifest(recipe.data.shards)
            check(recipe, place.world_size, torch_device(place).type, manifest, resume)
            with held_run_folder(Path(recipe.train.run), place):
                _train(recipe, resume, place, manifest, stop)
        done = True
    finally:
        # NCCL has warnings for a group that is left behind. A rank that fails alone does not wait there for the others.
        if place.device_id is not None and (done or place.world_size == 1):
            torch.distributed.destroy_process_group()
    # So that a script does not begin its next command. Of several ranks only the first says so, which ends last.
    if stop.interrupted and place.rank == 0:
        raise KeyboardInterrupt


def _train(recipe: Recipe, resume: str, place: Place, manifest: Manifest, stop: StopSignal) -> None:
    """Build all that the run needs, or take it from a checkpoint; then make its steps."""
    # ------------------------------------------------------------------ where this process stands
    started = time.perf_counter()
    run = Path(recipe.train.run)
    recipe = without_auto(recipe, torch_device(place), place.world_size)  # so that the record says what `auto` was
    checkpoint = from_rank_zero(lambda: checkpoint_to_resume(run, resume), place)

    # ------------------------------------------------------------------ data
    if place.rank == 0 and (untrained := manifest.untrained_classes()):
        log.warning("%s: %s", recipe.data.shards, untrained)
    tokenizer = begin_tokenizer(recipe, manifest, place, resumed=checkpoint is not None)
    train_loader(recipe, manifest, place, tokenizer)  # says whether the cache has room before the model is built

    # ------------------------------------------------------------------ model
    # A resumed run has its weights in the checkpoint: those that it started from may be gone.
    start = recipe if checkpoint is None else replace(recipe, model=replace(recipe.model, weights="none"))
    model, report = initial_model(start, manifest.class_names, tokenizer.vocab_size if tokenizer else 0)
    described = report.summary() if checkpoint is None else "weights of the checkpoint"
    log.info("%s, %s head: %s", recipe.model.backbone, recipe.model.head, described)
    total_steps = count_steps(recipe.train.epochs, manifest.split("train").samples, recipe.train.batch_size)
    state = RunState.at_start(recipe, manifest, place.world_size)
    former_recipe: dict[str, Any] | None = None
    changes: list[str] = []
    if checkpoint is not None:
        state = load_weights(model, checkpoint, state, recipe)
        if nothing := from_rank_zero(lambda: nothing_to_do(run, state.step, total_steps, recipe), place):
            log.info("%s", nothing)
            return
        former_recipe, changes = recipe_changes(checkpoint, recipe)

    features = prepare_features(recipe, model, manifest, place) if recipe.data.feature_cache else None

    # ------------------------------------------------------------------ engine
    def names_at(step: int) -> list[str]:
        at_step = step * recipe.train.batch_size
        return train_loader(recipe, manifest, place, tokenizer, at_step).names_of_first_batch()

    bad_steps = BadSteps(recipe.train.skip_bad_steps, run, place, names_at)
    counts = [info.count for info in manifest.classes]
    train_step = build_step(model, recipe, place, counts, bad_steps)
    average = WeightAverage(train_step.engine.module, recipe.train.ema) if recipe.train.ema else None
    if checkpoint is not None:
        load_optimizer(train_step.engine, checkpoint)
        if average is not None:
            average.load(read_averaged_weights(checkpoint))

    # ------------------------------------------------------------------ steps and result
    with RunRecord(run, recipe, place.rank, state.step, former_recipe if changes else None) as record:
        if checkpoint is not None:
            log.info("resumed from %s: step %d of %d", checkpoint, state.step, total_steps)
        if changes and place.rank == 0:
            log.warning("from step %d on the recipe is another one: %s", state.step + 1, ", ".join(changes))
        if note := manifest.resize_note(recipe.data.image_size, recipe.data.crop_margin):
            log.info("%s: %s", recipe.data.shards, note)
        job = _Run(recipe, place, manifest, tokenizer, total_steps, state, train_step, average, record, stop, started)
        job.features = features
        complete = job.go()
    if complete:
        log.info("done: %s (tensorboard --logdir %s)", run / SUMMARY_NAME, run / "tensorboard")


@dataclass
class _Run:
    """The steps of a run, what is measured and saved between them, and its result."""

    recipe: Recipe
    place: Place
    manifest: Manifest
    tokenizer: TagTokenizer | None
    total_steps: int
    state: RunState
    train_step: TrainStep
    average: WeightAverage | None
    record: RunRecord
    stop: StopSignal
    started: float
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """The last of each split, of the averaged weights as SPLIT_ema."""
    throughput: list[float] = field(default_factory=list)
    eval_loaders: dict[str, EvalLoader | FeatureEvalLoader] = field(default_factory=dict)
    features: FeatureStore | None = None
    """What data.feature_cache has in the place of images."""

    def __post_init__(self) -> None:
        self.run = Path(self.recipe.train.run)
        self.meter = self.train_step.meter
        self.dtype = compute_dtype(self.recipe.deepspeed)
        self.samples = self.manifest.split("train").samples
        self.writer = CheckpointWriter(self.run, self.recipe, self.manifest.class_names)
        self.trace = StepTrace(self.recipe.train.profile_steps, self.run, self.place.rank)
        modules = self.train_step.engine.module.modules()
        self.has_batch_statistics = any(isinstance(module, _BatchNorm) for module in modules)
        self.hosts = gather(f"{socket.gethostname()}: {device_name(self.train_step.engine.device)}", self.place)

    def go(self) -> bool:
        """Make the steps that are left. Returns whether the run is complete, or was stopped."""
        recipe, state, writer = self.recipe, self.state, self.writer
        self.meter.measure_peak(self.dtype, self.place.world_size)
        consumed = state.samples_consumed
        if self.features is None:
            batches = iter(train_loader(recipe, self.manifest, self.place, self.tokenizer, consumed))
        else:
            batches = iter(feature_train_loader(self.features, recipe, self.manifest, self.place, consumed))
        loss_since_log = torch.zeros((), device=self.train_step.engine.device)
        self.meter.reset()
        while state.step < self.total_steps:
            epoch_before = state.samples_consumed // self.samples
            rate = learning_rate(recipe.optim, recipe.train.batch_size, state.step, self.total_steps, self.samples)
            loss_since_log += self.step(batches, rate)
            finished = state.step == self.total_steps
            stopping = self.stop.requested(self.place) or state.step == recipe.train.stop_after_steps
            if state.step % recipe.train.log_every == 0 or finished or stopping:
                self.log_steps(loss_since_log, rate)
            epoch = state.samples_consumed // self.samples
            due = finished or (epoch > epoch_before and epoch % recipe.train.eval_every == 0)
            # On features an epoch takes a second, and a checkpoint of the whole model as long.
            between = epoch > epoch_before and self.features is None
            if due or between or stopping:
                with self.meter.paused():
                    self.save(evaluated=due)
            writer.check()
            if stopping and not finished:
                writer.finish()
                log.info(
                    "stopped after step %d, which is saved; the same command with --resume auto continues", state.step
                )
                return False
        self.trace.close()
        self.finish()
        return True

    def step(self, batches: Iterator[Batch], rate: float) -> torch.Tensor:
        """Make one optimizer step. Returns this rank's mean loss, on the device."""
        state, batch_size = self.state, self.recipe.train.batch_size
        loss = self.train_step(batches, rate, state.step)
        if not self.throughput and self.meter.steps == 0:
            log.info("%s", self.train_step.products)
        if self.has_batch_statistics:
            average_batch_statistics(self.train_step.engine.module, self.place.world_size)
        state.step += 1
        state.samples_consumed += batch_size
        if self.average is not None:
            self.average.update(state.step)
        self.meter.step(batch_size)
        self.trace.step()
        return loss

    def log_steps(self, loss_sum: torch.Tensor, rate: float) -> None:
        """Record the mean loss and the cost of the steps since the last record, and begin the next. Ends the run where
        the loss is not finite."""
        state, bad_steps = self.state, self.train_step.bad_steps
        assert bad_steps is not None
        steps_counted = self.meter.steps - bad_steps.skipped_since_log
        loss = mean_over_ranks(loss_sum / steps_counted, self.place.world_size)
        figures = {
            "step": state.step,
            "epoch": round(state.samples_consumed / self.samples, 4),
            "samples": state.samples_consumed,
            "loss": loss,
            "lr": rate,
        } | self.meter.read()
        self.record.step(figures, self.total_steps, self.recipe.train.epochs)
        warn_of_stragglers(self.meter, self.place)
        self.throughput.append(figures["images_per_s"])
        if steps_counted and not math.isfinite(loss):
            bad_steps.end_run(state.step)
        loss_sum.zero_()
        bad_steps.logged()
        self.meter.reset()

    def save(self, evaluated: bool) -> None:
        """Write a checkpoint, evaluated on val first or not."""
        state = self.state
        if evaluated and "val" in self.manifest.splits:
            self.measure("val")
            if self.evaluations["val"].top1 > state.best_top1:
                state.best_top1, state.best_step = self.evaluations["val"].top1, state.step
        self.writer.save(self.train_step.engine, state, None if self.average is None else self.average.state())
        self.meter.measure_peak(self.dtype, self.place.world_size)

    def measure(self, split: str) -> None:
        """Evaluate the raw weights, and the averaged ones as SPLIT_ema; record both."""
        if split not in self.eval_loaders and self.features is not None:
            store, recipe = self.features, self.recipe
            self.eval_loaders[split] = feature_eval_loader(store, recipe, self.manifest, self.place, split)
        if split not in self.eval_loaders:  # for any number of evaluations in the run
            self.eval_loaders[split] = EvalLoader(
                self.recipe.data,
                self.manifest,
                split,
                self.place,
                batch_size=self.recipe.train.eval_batch_size,
                tokenizer=self.tokenizer,
                quarantine=self.run / QUARANTINE_NAME,
            )
        loader, step = self.eval_loaders[split], self.train_step
        result = self.evaluations[split] = evaluate_split(loader, step.engine, step.forward)
        self.record.evaluation(evaluation_figures(split, self.state.step, result))
        if self.average is not None:
            name = f"{split}_ema"
            with self.average.applied():
                result = self.evaluations[name] = evaluate_split(loader, step.engine, step.forward)
            self.record.evaluation(evaluation_figures(name, self.state.step, result))

    def finish(self) -> None:
        """Evaluate on test and write the summary."""
        recipe, state = self.recipe, self.state
        if not self.evaluations and "val" in self.manifest.splits:  # resumed where only the result was missing
            self.measure("val")
        if "test" in self.manifest.splits:
            self.measure("test")
        self.writer.finish()
        evaluations = self.evaluations.items()
        self.record.summary(
            {
                "run": str(self.run),
                "steps": state.step,
                "epochs": recipe.train.epochs,
                "samples": state.samples_consumed,
                "batch_size": recipe.train.batch_size,
                "world_size": self.place.world_size,
                "backbone": recipe.model.backbone,
                "head": recipe.model.head,
                "text_tokens": recipe.model.text_tokens,
                "parameters": self.train_step.parameters,
                "evaluations": {split: evaluation_figures(split, state.step, result) for split, result in evaluations},
                "best_val_top1": state.best_top1,
                "best_step": state.best_step,
                "seconds": round(time.perf_counter() - self.started, 1),
                "images_per_s": sorted(self.throughput)[len(self.throughput) // 2] if self.throughput else None,
                "peak_memory_mb": self.meter.highest_mb,
                "matrix_products": self.train_step.products,
                "hosts": self.hosts,
                "manifest_digest": self.manifest.digest,
            }
        )


def train_loader(
    recipe: Recipe, manifest: Manifest, place: Place, tokenizer: TagTokenizer | None, samples_consumed: int = 0
) -> TrainLoader:
    """This rank's micro-batches from a position in the run on."""
    return TrainLoader(
        recipe.data,
        manifest,
        place,
        batch_size=recipe.train.batch_size,
        micro_batch=micro_batch_of(recipe.train.batch_size, place.world_size, recipe.train.micro_batch_size),
        seed=recipe.train.seed,
        samples_consumed=samples_consumed,
        tokenizer=tokenizer,
        quarantine=Path(recipe.train.run) / QUARANTINE_NAME,
    )


def nothing_to_do(run: Path, step: int, total_steps: int, recipe: Recipe) -> str | None:
    """Why a run that stands at `step` has nothing to do, or None. Raises UseError where that is beyond its end."""
    if step >= total_steps and read_summary(run / SUMMARY_NAME).get("steps") == step:
        return (
            f"{run} is complete, step {step} of {total_steps}: nothing to do, nothing changed; its result is in "
            f"{run / SUMMARY_NAME}; a higher train.epochs trains on"
        )
    if step > total_steps:
        raise UseError(
            f"{run} is at step {step} already, and train.epochs {recipe.train.epochs} ends at step {total_steps}; "
            "set a higher train.epochs, or --resume an earlier checkpoint's folder"
        )
    if 0 < recipe.train.stop_after_steps <= step < total_steps:
        return (
            f"{run} is at step {step} already, and train.stop_after_steps is {recipe.train.stop_after_steps}: "
            "nothing to do, nothing changed; a higher one, or 0, trains on"
        )
    return None


def evaluate_split(loader: EvalLoader | FeatureEvalLoader, model: Engine, forward: Forward) -> Evaluation:
    """Evaluate the model on a loader's split, in eval mode."""
    model.eval()
    result = evaluate(forward, loader, loader.manifest.split(loader.split).samples)
    model.train()
    return result


def evaluation_figures(split: str, step: int, result: Evaluation) -> dict[str, Any]:
    """An evaluation as metrics.jsonl and summary.json hold it."""
    return {
        "split": split,
        "step": step,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "samples": result.samples,
        "bad_samples": result.bad_samples,
    }
