"""Training, from top to bottom."""

from __future__ import annotations

import logging
import math
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.cluster.watch import Watch
from dist_train.config import Recipe
from dist_train.data.draws import Draw, random_bits
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import Manifest
from dist_train.data.quarantine import QUARANTINE_NAME
from dist_train.data.tokenizer import TagTokenizer
from dist_train.data.vocabulary import TAGS_NAME, find_frequent_tags
from dist_train.errors import UseError
from dist_train.files import write_atomically
from dist_train.models.build import build_model
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
from dist_train.train.engine import build_engine, compile_mode, init_process_group, torch_device
from dist_train.train.evaluate import Evaluation, Forward, evaluate
from dist_train.train.inputs import build_tokenizer, needs_frequent_tags, one_sample, read_shard_set
from dist_train.train.losses import Objective
from dist_train.train.meters import (
    StepMeter,
    StepTrace,
    device_name,
    device_peak,
    training_flops_per_sample,
)
from dist_train.train.precision import compute_dtype, precision_of
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
from dist_train.train.step import TrainStep, make_forward

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
            manifest = read_shard_set(recipe)
            check(recipe, place.world_size, torch_device(place).type, manifest, resume)
            with held_run_folder(Path(recipe.train.run), place, resume):
                _train(recipe, resume, place, manifest, stop)
        done = True
    finally:
        # NCCL has warnings for a group that is left behind. A rank that fails alone does not wait there for the others.
        if place.device_id is not None and (done or place.world_size == 1):
            torch.distributed.destroy_process_group()
    # What follows the command in a script shall not begin. Of several ranks only the first says so, the last to end.
    if stop.interrupted and place.rank == 0:
        raise KeyboardInterrupt


def _train(recipe: Recipe, resume: str, place: Place, manifest: Manifest, stop: StopSignal) -> None:
    # ------------------------------------------------------------------ where this process stands
    started = time.perf_counter()
    run = Path(recipe.train.run)
    device = torch_device(place)
    # What `auto` is here goes into the record of the run.
    recipe = replace(
        recipe,
        model=replace(recipe.model, compile=compile_mode(recipe, device, place.world_size)),
        deepspeed=replace(recipe.deepspeed, precision=precision_of(recipe.deepspeed)),
    )

    # ------------------------------------------------------------------ data
    train_samples = manifest.split("train").samples
    if place.rank == 0 and (untrained := manifest.untrained_classes()):
        log.warning("%s: %s", recipe.data.shards, untrained)
    share = recipe.train.batch_size // place.world_size
    micro_batch = recipe.train.micro_batch_size or share
    checkpoint = from_rank_zero(lambda: checkpoint_to_resume(run, resume), place)
    if needs_frequent_tags(recipe) and checkpoint is None:
        if place.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            tags = find_frequent_tags(recipe.data, manifest)
            write_atomically(run / TAGS_NAME, "".join(f"{tag}\n" for tag in tags).encode())
        torch.distributed.barrier()
    tokenizer = build_tokenizer(recipe, run)
    total_steps = count_steps(recipe.train.epochs, train_samples, recipe.train.batch_size)

    def train_loader(samples_consumed: int) -> TrainLoader:
        return TrainLoader(
            recipe.data,
            manifest,
            place,
            batch_size=recipe.train.batch_size,
            micro_batch=micro_batch,
            seed=recipe.train.seed,
            samples_consumed=samples_consumed,
            tokenizer=tokenizer,
            quarantine=run / QUARANTINE_NAME,
        )

    bad_steps = BadSteps(
        recipe.train.skip_bad_steps,
        run,
        place,
        lambda step: train_loader(step * recipe.train.batch_size).names_of_first_batch(),
    )
    train_loader(0)  # says whether the cache has room before the model is built

    # ------------------------------------------------------------------ model and engine
    torch.manual_seed(int(random_bits(recipe.train.seed, Draw.WEIGHTS) >> 1))
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    # A run that goes on has its weights in the checkpoint: those that it started from may be gone.
    config = recipe.model if checkpoint is None else replace(recipe.model, weights="none")
    classes = manifest.class_names
    model, report = build_model(config, recipe.data.image_size, len(classes), vocab_size, classes)
    start = report.summary() if checkpoint is None else "weights of the checkpoint"
    log.info("%s, %s head: %s", recipe.model.backbone, recipe.model.head, start)
    flops = training_flops_per_sample(model, *one_sample(recipe))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    has_batch_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    objective = Objective(recipe.optim, [info.count for info in manifest.classes], device)

    # ------------------------------------------------------------------ resume
    state = RunState(
        step=0,
        samples_consumed=0,
        seed=recipe.train.seed,
        batch_size=recipe.train.batch_size,
        world_size=place.world_size,
        zero_stage=recipe.deepspeed.zero_stage,
        precision=recipe.deepspeed.precision,
        num_classes=len(manifest.classes),
        manifest_digest=manifest.digest,
    )
    former_recipe, changes = None, []
    if checkpoint is not None:
        state = load_weights(model, checkpoint, state, recipe)
        nothing = from_rank_zero(lambda: nothing_to_do(run, state.step, total_steps, recipe), place)
        if nothing:
            log.info("%s", nothing)
            return
        former_recipe, changes = recipe_changes(checkpoint, recipe)
    engine = build_engine(model, recipe, place, micro_batch)
    average = WeightAverage(engine.module, recipe.train.ema) if recipe.train.ema else None
    if checkpoint is not None:
        load_optimizer(engine, checkpoint)
        if average is not None:
            average.load(read_averaged_weights(checkpoint))
    writer = CheckpointWriter(run, recipe, manifest.class_names)
    forward = make_forward(engine, recipe, device)

    dtype = compute_dtype(recipe.deepspeed)
    meter = StepMeter(device, flops, device_peak(device, dtype) * place.world_size)
    graphs = recipe.model.compile == "graphs"
    accumulation = share // micro_batch
    train_step = TrainStep(engine, forward, objective, recipe, accumulation, place.rank, meter, bad_steps, graphs)
    throughput: list[float] = []

    hosts = gather(f"{socket.gethostname()}: {device_name(device)}", place)
    with RunRecord(run, recipe, place.rank, state.step, former_recipe if changes else None) as record:
        if checkpoint is not None:
            log.info("resumed from %s: step %d of %d", checkpoint, state.step, total_steps)
        if changes and place.rank == 0:
            log.warning("from step %d on the recipe is another one: %s", state.step + 1, ", ".join(changes))
        if note := manifest.resize_note(recipe.data.image_size, recipe.data.crop_margin):
            log.info("%s: %s", recipe.data.shards, note)
        # -------------------------------------------------------------- steps
        trace = StepTrace(recipe.train.profile_steps, run, place.rank)
        batches = iter(train_loader(state.samples_consumed))
        loss_since_log = torch.zeros((), device=device)
        last: dict[str, Evaluation] = {}
        eval_loaders: dict[str, EvalLoader] = {}

        def measure(split: str) -> None:
            """Evaluate the raw weights, and the averaged ones as SPLIT_ema; record both."""
            if split not in eval_loaders:
                eval_loaders[split] = eval_loader(split, recipe, manifest, place, tokenizer)
            loader = eval_loaders[split]
            last[split] = evaluate_split(loader, engine, forward)
            record.evaluation(evaluation_figures(split, state.step, last[split]))
            if average is not None:
                name = f"{split}_ema"
                with average.applied():
                    last[name] = evaluate_split(loader, engine, forward)
                record.evaluation(evaluation_figures(name, state.step, last[name]))

        meter.reset()
        while state.step < total_steps:
            rate = learning_rate(recipe.optim, recipe.train.batch_size, state.step, total_steps, train_samples)
            loss_since_log += train_step(batches, rate, state.step)
            if not throughput and meter.steps == 0:
                log.info("%s", train_step.products)
            if has_batch_statistics:
                average_batch_statistics(engine.module, place.world_size)
            epoch_before = state.samples_consumed // train_samples
            state.step += 1
            state.samples_consumed += recipe.train.batch_size
            if average is not None:
                average.update(state.step)
            meter.step(recipe.train.batch_size)
            trace.step()
            finished = state.step == total_steps
            stopping = stop.requested(place) or state.step == recipe.train.stop_after_steps

            if state.step % recipe.train.log_every == 0 or finished or stopping:
                steps_counted = meter.steps - bad_steps.skipped_since_log
                loss = mean_over_ranks(loss_since_log / steps_counted, place.world_size)
                figures = {
                    "step": state.step,
                    "epoch": round(state.samples_consumed / train_samples, 4),
                    "samples": state.samples_consumed,
                    "loss": loss,
                    "lr": rate,
                } | meter.read()
                record.step(figures, total_steps, recipe.train.epochs)
                warn_of_stragglers(meter, place)
                throughput.append(figures["images_per_s"])
                if steps_counted and not math.isfinite(loss):
                    bad_steps.end_run(state.step)
                loss_since_log.zero_()
                bad_steps.logged()
                meter.reset()

            # ---------------------------------------------------------- end of an epoch
            epoch = state.samples_consumed // train_samples
            if epoch > epoch_before or finished or stopping:
                with meter.paused():
                    due = finished or (epoch > epoch_before and epoch % recipe.train.eval_every == 0)
                    if due and "val" in manifest.splits:
                        measure("val")
                        if last["val"].top1 > state.best_top1:
                            state.best_top1, state.best_step = last["val"].top1, state.step
                    writer.save(engine, state, average and average.state())
                    # Other work on the machine can only lower a measured peak: the highest counts.
                    meter.peak = max(meter.peak, device_peak(device, dtype) * place.world_size)
            writer.check()
            if stopping and not finished:
                writer.finish()
                log.info(
                    "stopped after step %d, which is saved; the same command with --resume auto continues", state.step
                )
                return

        # -------------------------------------------------------------- result
        trace.close()
        if not last and "val" in manifest.splits:  # resumed where only the result was missing
            measure("val")
        if "test" in manifest.splits:
            measure("test")
        writer.finish()
        record.summary(
            {
                "run": str(run),
                "steps": state.step,
                "epochs": recipe.train.epochs,
                "samples": state.samples_consumed,
                "batch_size": recipe.train.batch_size,
                "world_size": place.world_size,
                "backbone": recipe.model.backbone,
                "head": recipe.model.head,
                "text_tokens": recipe.model.text_tokens,
                "parameters": parameters,
                "evaluations": {split: evaluation_figures(split, state.step, result) for split, result in last.items()},
                "best_val_top1": state.best_top1,
                "best_step": state.best_step,
                "seconds": round(time.perf_counter() - started, 1),
                "images_per_s": sorted(throughput)[len(throughput) // 2] if throughput else None,
                "peak_memory_mb": meter.highest_mb,
                "matrix_products": train_step.products,
                "hosts": hosts,
                "manifest_digest": manifest.digest,
            }
        )
    log.info("done: %s (tensorboard --logdir %s)", run / "summary.json", run / "tensorboard")


def nothing_to_do(run: Path, step: int, total_steps: int, recipe: Recipe) -> str | None:
    """Why a run that stands at `step` has nothing to do, or None. Raises UseError where it cannot do what it shall."""
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


def eval_loader(
    split: str, recipe: Recipe, manifest: Manifest, place: Place, tokenizer: TagTokenizer | None
) -> EvalLoader:
    """The batches of a split, for any number of evaluations in the run."""
    return EvalLoader(
        recipe.data,
        manifest,
        split,
        place,
        batch_size=recipe.train.eval_batch_size,
        tokenizer=tokenizer,
        quarantine=Path(recipe.train.run) / QUARANTINE_NAME,
    )


def evaluate_split(loader: EvalLoader, model: nn.Module, forward: Forward) -> Evaluation:
    """Evaluate the model on a loader's split, in eval mode."""
    model.eval()
    result = evaluate(forward, loader, loader.fetcher.split.samples)
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
