"""Training, from top to bottom."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.cluster.watch import Watch
from dist_train.config import Recipe
from dist_train.data.features import FeatureEvalLoader, FeatureStore
from dist_train.data.loader import Batch, EvalLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.quarantine import QUARANTINE_NAME
from dist_train.data.tokenizer import TagTokenizer
from dist_train.models.saved import read_averaged_weights
from dist_train.place import Place
from dist_train.recipe import check
from dist_train.train.badsteps import BadSteps
from dist_train.train.checkpoint import (
    CheckpointWriter,
    RunState,
    checkpoint_to_resume,
    leave_later_past,
    load_optimizer,
    load_weights,
    recipe_changes,
)
from dist_train.train.confusion import ConfusionCounts
from dist_train.train.ema import WeightAverage
from dist_train.train.engine import init_process_group, leave_process_group, torch_device
from dist_train.train.evaluate import Evaluation
from dist_train.train.evaluations import evaluate_split, evaluation_figures
from dist_train.train.features import feature_eval_loader, feature_train_loader, prepare_features
from dist_train.train.inputs import begin_outputs, begin_tokenizer, check_same_set, tag_targets, train_loader
from dist_train.train.meters import StepTrace, device_name
from dist_train.train.micro_batch import with_micro_batch
from dist_train.train.monitor import monitored, note_evaluation, out_of_patience, why_ended
from dist_train.train.multilabel import TagEvaluation, thresholds_to_keep
from dist_train.train.pictures import MOST_CLASSES
from dist_train.train.precision import compute_dtype
from dist_train.train.ranks import (
    StopSignal,
    average_batch_statistics,
    from_rank_zero,
    gather,
    mean_over_ranks,
    warn_of_stragglers,
)
from dist_train.train.record import SUMMARY_NAME, RunRecord, start_console_log
from dist_train.train.runfolder import held_run_folder, nothing_to_do
from dist_train.train.schedule import count_steps, learning_rate
from dist_train.train.setup import build_step, initial_model, run_in_a_line, without_auto
from dist_train.train.step import TrainStep

log = logging.getLogger(__name__)


def train(recipe: Recipe, resume: str = "none") -> int | None:
    """Run a recipe; every rank calls this. resume: none, auto (the newest complete checkpoint), or a checkpoint.

    Ends normally when the run is complete, when train.stop_after_steps is reached, or after SIGTERM, SIGUSR1 or SIGHUP,
    having saved a checkpoint; after Ctrl-C, having saved one too, by KeyboardInterrupt. Returns the signal that has
    come to this process meanwhile, if any.
    """
    place = init_process_group(recipe.train.timeout_s)
    start_console_log(place.rank)
    done = False
    try:
        with StopSignal(recipe.train.timeout_s) as stop, Watch(place, recipe.train.timeout_s):
            manifest = read_manifest(recipe.data.shards)
            check_same_set(manifest, recipe.data.shards, place)
            check(recipe, place.world_size, torch_device(place).type, manifest, resume)
            with held_run_folder(Path(recipe.train.run), place):
                _train(recipe, resume, place, manifest, stop)
        done = True
    finally:
        # NCCL has warnings for a group that is left behind. A rank that fails alone does not wait there for the others.
        if place.device_id is not None and (done or place.world_size == 1):
            leave_process_group()
    # So that a script does not begin its next command. Of several ranks only the first says so, which ends last.
    if stop.interrupted and place.rank == 0:
        raise KeyboardInterrupt
    return stop.received


def _train(recipe: Recipe, resume: str, place: Place, manifest: Manifest, stop: StopSignal) -> None:
    """Build all that the run needs, or take it from a checkpoint; then make its steps."""
    # ------------------------------------------------------------------ where this process stands
    started = time.perf_counter()
    run = Path(recipe.train.run)
    checkpoint = from_rank_zero(lambda: checkpoint_to_resume(run, resume), place)
    # So that the record says what `auto` was.
    recipe = without_auto(recipe, torch_device(place), place.world_size, checkpoint)
    log.info("%s", run_in_a_line(recipe, manifest, place))

    # ------------------------------------------------------------------ data
    if place.rank == 0 and (untrained := manifest.untrained_classes()):
        log.warning("%s: %s", recipe.data.shards, untrained)
    tokenizer = begin_tokenizer(recipe, manifest, place, checkpoint)
    outputs = begin_outputs(recipe, manifest, place, checkpoint)
    recipe = with_micro_batch(recipe, place, len(outputs), tokenizer.vocab_size if tokenizer else 0, checkpoint)
    train_loader(recipe, manifest, place, tokenizer)  # says whether the cache has room before the model is built

    # ------------------------------------------------------------------ model
    # A resumed run has its weights in the checkpoint: those that it started from may be gone.
    start = recipe if checkpoint is None else replace(recipe, model=replace(recipe.model, weights="none"))
    model, report = initial_model(start, outputs, tokenizer.vocab_size if tokenizer else 0)
    described = report.summary() if checkpoint is None else "weights of the checkpoint"
    log.info("%s, %s head: %s", recipe.model.backbone, recipe.model.head, described)
    total_steps = count_steps(recipe.train.epochs, manifest.split("train").samples, recipe.train.batch_size)
    state = RunState.at_start(recipe, manifest, place.world_size)
    former_recipe: dict[str, Any] | None = None
    changes: list[str] = []
    if checkpoint is not None:
        state = load_weights(model, checkpoint, state, recipe)
        if nothing := from_rank_zero(lambda: nothing_to_do(run, state, total_steps, recipe), place):
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
    if train_step.noise is not None and train_step.noise.sees_nothing and place.rank == 0:
        log.warning(
            "train.noise_every measures nothing: a step is one micro-batch on one rank, and there is no layer norm "
            "that is trained and can be looked at; set a smaller train.micro_batch_size"
        )
    average = WeightAverage(train_step.engine.module, recipe.train.ema) if recipe.train.ema else None
    if checkpoint is not None:
        load_optimizer(train_step.engine, checkpoint)
        if average is not None:
            average.load(read_averaged_weights(checkpoint))

    # ------------------------------------------------------------------ steps and result
    if checkpoint is not None and resume != "auto" and place.rank == 0:
        leave_later_past(run, state.step)
    with RunRecord(run, recipe, place.rank, state.step, former_recipe if changes else None) as record:
        if checkpoint is not None:
            log.info("resumed from %s: step %d of %d", checkpoint, state.step, total_steps)
        if changes and place.rank == 0:
            log.warning("from step %d on the recipe is another one: %s", state.step + 1, ", ".join(changes))
        if note := manifest.resize_note(recipe.data):
            log.info("%s: %s", recipe.data.shards, note)
        job = _Run(
            recipe, place, manifest, tokenizer, outputs, total_steps, state, train_step, average, record, stop, started
        )
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
    outputs: list[str]
    """Names of the classes, or of the tags that are predicted."""
    total_steps: int
    state: RunState
    train_step: TrainStep
    average: WeightAverage | None
    record: RunRecord
    stop: StopSignal
    started: float
    evaluations: dict[str, Evaluation | TagEvaluation] = field(default_factory=dict)
    """The last of each split, of the averaged weights as SPLIT_ema."""
    throughput: list[float] = field(default_factory=list)
    eval_loaders: dict[str, EvalLoader | FeatureEvalLoader] = field(default_factory=dict)
    features: FeatureStore | None = None
    """What data.feature_cache has in the place of images."""

    def __post_init__(self) -> None:
        self.run = Path(self.recipe.train.run)
        self.started -= self.state.seconds  # of the processes before this one
        self.meter = self.train_step.meter
        self.dtype = compute_dtype(self.recipe.deepspeed)
        self.samples = self.manifest.split("train").samples
        self.tag_targets = tag_targets(self.recipe, self.outputs)
        self.writer = CheckpointWriter(self.run, self.recipe, self.outputs)
        self.trace = StepTrace(self.recipe.train.profile_steps, self.run, self.place.rank)
        modules = self.train_step.engine.module.modules()
        self.has_batch_statistics = any(isinstance(module, _BatchNorm) for module in modules)
        self.hosts = gather(f"{socket.gethostname()}: {device_name(self.train_step.engine.device)}", self.place)

    def go(self) -> bool:
        """Make the steps that are left. Returns whether the run is complete, or was stopped."""
        recipe, state, writer = self.recipe, self.state, self.writer
        self.meter.measure_peak(self.dtype, self.place.world_size)
        if state.evaluation_due:
            self.evaluate()
        consumed = state.samples_consumed
        batches: Iterator[Batch]
        if self.features is None:
            batches = iter(train_loader(recipe, self.manifest, self.place, self.tokenizer, consumed, self.tag_targets))
        else:
            batches = iter(feature_train_loader(self.features, recipe, self.manifest, self.place, consumed))
        if state.step == 0:
            first = next(batches)
            self.record.first_batch(first, recipe.data, self.manifest.class_names)
            batches = chain([first], batches)
        loss_since_log = torch.zeros((), device=self.train_step.engine.device)
        rate = 0.0
        self.meter.reset()
        while state.step < self.total_steps and not out_of_patience(state, recipe.train):
            epoch_before = state.samples_consumed // self.samples
            rate = learning_rate(recipe.optim, recipe.train.batch_size, state.step, self.total_steps, self.samples)
            loss_since_log += self.step(batches, rate)
            finished = state.step == self.total_steps
            interrupted = self.stop.requested(self.place)
            stopping = interrupted or state.step == recipe.train.stop_after_steps
            epoch = state.samples_consumed // self.samples
            every = recipe.train.eval_every  # a batch larger than the split may pass several epochs' ends
            due = finished or epoch // every > epoch_before // every
            # On features an epoch takes a second, and a checkpoint of the whole model as long.
            between = epoch > epoch_before and self.features is None
            saving = due or between or stopping
            logging_is_due = state.step % recipe.train.log_every == 0 or finished or stopping
            if logging_is_due or (saving and self.lost(loss_since_log)):
                self.log_steps(loss_since_log, rate)
            if saving:
                state.evaluation_due = due and "val" in self.manifest.splits
                with self.meter.paused():  # asked to stop, there may be no time to evaluate: then when it is resumed
                    self.save(evaluate=finished or not interrupted)
            writer.check()
            if stopping and not finished:
                writer.finish()
                log.info(
                    "stopped after step %d, which is saved; the same command with --resume auto continues", state.step
                )
                return False
        if self.meter.steps:  # the last since the last record, where patience has ended the run
            self.log_steps(loss_since_log, rate)
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
        figures: dict[str, Any] = {
            "step": state.step,
            "epoch": round(state.samples_consumed / self.samples, 4),
            "samples": state.samples_consumed,
            "loss": loss,
            "lr": rate,
        } | self.meter.read()
        if self.train_step.noise is not None:
            figures |= self.train_step.noise.read()
        self.record.step(figures, self.total_steps, self.recipe.train.epochs)
        warn_of_stragglers(self.meter, self.place)
        self.throughput.append(figures["images_per_s"])
        if steps_counted and not math.isfinite(loss):
            bad_steps.end_run(state.step)
        loss_sum.zero_()
        bad_steps.logged()
        self.meter.reset()

    def lost(self, loss_sum: torch.Tensor) -> bool:
        """Whether a loss since the last record was not finite: what would be saved now would take the place of weights
        that can still be trained, and --resume auto would go on from it."""
        return not math.isfinite(mean_over_ranks(loss_sum.clone(), self.place.world_size))

    def save(self, evaluate: bool) -> None:
        """Write a checkpoint, and evaluate on val where that is asked for: in this order, as that may take long."""
        state = self.state
        averaged = None if self.average is None else self.average.state()
        state.seconds = round(time.perf_counter() - self.started, 1)
        self.writer.save(self.train_step.engine, state, averaged)
        if evaluate and state.evaluation_due:
            self.evaluate()
        self.meter.measure_peak(self.dtype, self.place.world_size)

    def evaluate(self) -> None:
        """Evaluate on val, and let the state and its checkpoint know."""
        state = self.state
        self.measure("val")
        result = self.evaluations["val"]
        # All ranks end at one step: they go by one number, to the last bit.
        value = from_rank_zero(lambda: monitored(result, state.monitor), self.place)
        note_evaluation(state, value, result.score)
        self.writer.note_evaluation(state, thresholds_to_keep(self.evaluations))

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
                tag_targets=self.tag_targets,
            )
        self._measure(split, split, self.eval_loaders[split])
        if self.average is not None:
            with self.average.applied():
                self._measure(split, f"{split}_ema", self.eval_loaders[split])

    def _measure(self, split: str, name: str, loader: EvalLoader | FeatureEvalLoader) -> None:
        """Evaluate the weights that the model has; at the end of the run with the confusion matrix of its classes."""
        step, names = self.train_step, self.manifest.class_names
        confusion = None
        last = self.state.step == self.total_steps or split == "test"  # which a run is measured on but once
        if last and self.tag_targets is None and len(names) <= MOST_CLASSES:
            confusion = ConfusionCounts(len(names))
        of_val = self.evaluations.get(name.replace(split, "val", 1))
        each = None if confusion is None else confusion.add
        result = evaluate_split(loader, step.engine, step.forward, self.recipe.train.threshold, of_val, each)
        self.evaluations[name] = result
        counts = None if confusion is None else confusion.over_ranks()
        self.record.evaluation(evaluation_figures(name, self.state.step, result), counts, names)

    def finish(self) -> None:
        """Evaluate on test and write the summary."""
        recipe, state = self.recipe, self.state
        if not self.evaluations and "val" in self.manifest.splits:  # resumed where only the result was missing
            self.measure("val")
        if "test" in self.manifest.splits:
            self.measure("test")
        self.writer.finish()
        evaluations = self.evaluations.items()
        ended = why_ended(state, recipe.train, self.total_steps)
        if state.step < self.total_steps:
            log.info("ended after step %d of %d by %s", state.step, self.total_steps, ended)
        self.record.summary(
            {
                "run": str(self.run),
                "steps": state.step,
                "epochs": recipe.train.epochs,
                "ended_by": ended,
                "samples": state.samples_consumed,
                "batch_size": recipe.train.batch_size,
                "micro_batch_size": recipe.train.micro_batch_size,
                "world_size": self.place.world_size,
                "backbone": recipe.model.backbone,
                "head": recipe.model.head,
                "text_tokens": recipe.model.text_tokens,
                "parameters": self.train_step.parameters,
                "evaluations": {split: evaluation_figures(split, state.step, result) for split, result in evaluations},
                f"best_val_{'top1' if self.tag_targets is None else 'map'}": state.best_top1,
                "best_step": state.best_step,
                "monitor": state.monitor,
                "best_value": state.best_value,
                "seconds": round(time.perf_counter() - self.started, 1),
                "images_per_s": sorted(self.throughput)[len(self.throughput) // 2] if self.throughput else None,
                "peak_memory_mb": self.meter.highest_mb,
                "matrix_products": self.train_step.products,
                "hosts": self.hosts,
                "manifest_digest": self.manifest.digest,
            }
        )
