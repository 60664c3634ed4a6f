"""Training, from top to bottom."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dist_train.config import Recipe
from dist_train.data.draws import random_bits
from dist_train.data.loader import Batch, EvalLoader, Place, TrainLoader
from dist_train.data.manifest import Manifest, read_manifest, write_atomically
from dist_train.data.plan import rank_batch
from dist_train.data.quarantine import QUARANTINE_NAME
from dist_train.data.text import TAGS_NAME, WHOLE_TAGS, TagTokenizer, find_frequent_tags, read_frequent_tags
from dist_train.errors import UseError, WorkError
from dist_train.models.build import build_model
from dist_train.train.checkpoint import (
    RunState,
    checkpoint_to_resume,
    load_checkpoint,
    read_averaged_weights,
    save_checkpoint,
)
from dist_train.train.ema import WeightAverage
from dist_train.train.engine import (
    build_engine,
    compute_dtype,
    init_process_group,
    precision_context,
    torch_device,
    uses_autocast,
)
from dist_train.train.evaluate import Evaluation, Forward, evaluate
from dist_train.train.losses import Objective
from dist_train.train.meters import (
    StepMeter,
    StepTrace,
    device_name,
    device_peak,
    peak_memory_mb,
    training_flops_per_sample,
)
from dist_train.train.mixing import check_mixing, mix_neighbours
from dist_train.train.ranks import StopSignal, average_batch_statistics, gather, mean_over_ranks, warn_of_stragglers
from dist_train.train.record import RunRecord, check_run_folder, start_console_log
from dist_train.train.schedule import check_schedule, learning_rate

log = logging.getLogger(__name__)

_DROPOUT, _WEIGHTS = 4, 5  # first counters of draws: dropout masks, initial weights (data has 1 to 3 and 6; mixing 7)


def train(recipe: Recipe, resume: str = "none") -> None:
    """Run a recipe; every rank calls this. resume: none, auto (the newest complete checkpoint), or a checkpoint.

    Ends normally when the run is complete, when train.stop_after_steps is reached, or after SIGTERM or SIGUSR1, having
    saved a checkpoint.
    """
    # ------------------------------------------------------------------ where this process stands
    started = time.perf_counter()
    run = Path(recipe.train.run)
    place = init_process_group()
    start_console_log(place.rank)
    device = torch_device(place)
    check_run_folder(run, resume)
    torch.distributed.barrier()  # all ranks have looked before rank 0 begins to write
    stop = StopSignal()
    for key in ("epochs", "batch_size", "eval_batch_size", "eval_every", "log_every", "keep_checkpoints"):
        if getattr(recipe.train, key) < 1:
            raise UseError(f"train.{key} must be at least 1, not {getattr(recipe.train, key)}")

    # ------------------------------------------------------------------ data
    manifest = read_shard_set(recipe)
    train_samples = manifest.split("train").samples
    share = rank_batch(recipe.train.batch_size, place.world_size)
    micro_batch = recipe.train.micro_batch_size or share
    checkpoint = checkpoint_to_resume(run, resume)
    if needs_frequent_tags(recipe) and checkpoint is None:
        if place.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            tags = find_frequent_tags(recipe.data, manifest)
            write_atomically(run / TAGS_NAME, "".join(f"{tag}\n" for tag in tags).encode())
        torch.distributed.barrier()
    tokenizer = build_tokenizer(recipe, run)
    total_steps = math.ceil(recipe.train.epochs * train_samples / recipe.train.batch_size)
    check_schedule(recipe.optim, total_steps)
    check_mixing(recipe, micro_batch)

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

    train_loader(0)  # says what is wrong with the recipe before the model is built

    # ------------------------------------------------------------------ model and engine
    torch.manual_seed(int(random_bits(recipe.train.seed, _WEIGHTS) >> 1))
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    model, report = build_model(recipe.model, recipe.data.image_size, len(manifest.classes), vocab_size)
    log.info("%s, %s head: %s", recipe.model.backbone, recipe.model.head, report.summary())
    flops = training_flops_per_sample(model, *one_sample(recipe))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    has_batch_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    engine = build_engine(model, recipe, place, micro_batch)
    forward = make_forward(engine, recipe, device)
    objective = Objective(recipe.optim, [info.count for info in manifest.classes], device)
    average = WeightAverage(engine.module, recipe.train.ema) if recipe.train.ema else None

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
    if checkpoint is not None:
        state = load_checkpoint(engine, checkpoint, expected=state)
        if average is not None:
            average.load(read_averaged_weights(checkpoint))
        log.info("resumed from %s: step %d of %d", checkpoint, state.step, total_steps)

    dtype = compute_dtype(recipe.deepspeed)
    meter = StepMeter(device, flops, device_peak(device, dtype) * place.world_size)
    throughput: list[float] = []

    hosts = gather(f"{socket.gethostname()}: {device_name(device)}", place)
    with RunRecord(run, recipe, place.rank, state.step) as record:
        # -------------------------------------------------------------- steps
        trace = StepTrace(recipe.train.profile_steps, run, place.rank)
        batches = iter(train_loader(state.samples_consumed))
        loss_since_log = torch.zeros((), device=device)
        last: dict[str, Evaluation] = {}

        def measure(split: str) -> None:
            """Evaluate the raw weights, and the averaged ones as SPLIT_ema; record both."""
            last[split] = evaluate_split(split, recipe, manifest, place, tokenizer, engine, forward)
            record.evaluation(evaluation_figures(split, state.step, last[split]))
            if average is not None:
                name = f"{split}_ema"
                with average.applied():
                    last[name] = evaluate_split(split, recipe, manifest, place, tokenizer, engine, forward)
                record.evaluation(evaluation_figures(name, state.step, last[name]))

        meter.reset()
        while state.step < total_steps:
            rate = learning_rate(recipe.optim, recipe.train.batch_size, state.step, total_steps, train_samples)
            loss_since_log += optimizer_step(
                engine, forward, objective, batches, meter, rate, share // micro_batch, recipe, state.step, place.rank
            )
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
                loss = mean_over_ranks(loss_since_log / meter.steps, place.world_size)
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
                if not math.isfinite(loss):
                    raise WorkError(
                        f"the loss is {loss} at step {state.step}; lower optim.lr, set optim.clip_norm or raise "
                        "deepspeed.precision, then --resume auto"
                    )
                loss_since_log.zero_()
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
                    save_checkpoint(engine, run, state, recipe, manifest.class_names, average and average.state())
                    # Other work on the machine can only lower a measured peak: the highest counts.
                    meter.peak = max(meter.peak, device_peak(device, dtype) * place.world_size)
            if stopping and not finished:
                log.info("stopped after step %d; --resume auto continues", state.step)
                return

        # -------------------------------------------------------------- result
        trace.close()
        if "test" in manifest.splits:
            measure("test")
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
                "peak_memory_mb": round(peak_memory_mb(device), 1),
                "hosts": hosts,
                "manifest_digest": manifest.digest,
            }
        )
    log.info("done: %s (tensorboard --logdir %s)", run / "summary.json", run / "tensorboard")


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    forward: Forward,
    objective: Objective,
    batches: Iterator[Batch],
    meter: StepMeter,
    rate: float,
    accumulation: int,
    recipe: Recipe,
    step: int,
    rank: int,
) -> Tensor:
    """One optimizer step over `accumulation` micro-batches. Returns this rank's mean loss, on the device."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
    total = torch.zeros((), device=engine.device)
    engine.train()
    for micro in range(accumulation):
        batch = meter.wait(lambda: next(batches))
        position = (rank * accumulation + micro) * len(batch.labels)
        batch, mix = mix_neighbours(recipe.data, batch, recipe.train.seed, step, position)
        torch.manual_seed(int(random_bits(recipe.train.seed, _DROPOUT, step, micro, rank) >> 1))
        with meter.in_forward():
            logits = forward(batch).float()
        loss = objective(logits, batch.labels, batch.weights, mix)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / accumulation
    return total


def make_forward(model: nn.Module, recipe: Recipe, device: torch.device) -> Forward:
    """A function from batch to logits in the recipe's precision."""
    config = recipe.deepspeed
    dtype = torch.float32 if uses_autocast(config) else compute_dtype(config)
    # Activations take the images' layout; weights keep theirs, as DeepSpeed refuses or flattens any other.
    layout = torch.channels_last if recipe.train.channels_last else torch.preserve_format

    def forward(batch: Batch) -> Tensor:
        images = batch.images.to(dtype, memory_format=layout)
        with precision_context(config, device):
            return model(images) if batch.text_ids is None else model(images, batch.text_ids, batch.text_mask)

    return forward


def evaluate_split(
    split: str,
    recipe: Recipe,
    manifest: Manifest,
    place: Place,
    tokenizer: TagTokenizer | None,
    model: nn.Module,
    forward: Forward,
) -> Evaluation:
    """Evaluate the model on a split, in eval mode."""
    loader = EvalLoader(
        recipe.data,
        manifest,
        split,
        place,
        batch_size=recipe.train.eval_batch_size,
        tokenizer=tokenizer,
        quarantine=Path(recipe.train.run) / QUARANTINE_NAME,
    )
    model.eval()
    result = evaluate(forward, loader, manifest.split(split).samples)
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


def read_shard_set(recipe: Recipe) -> Manifest:
    """The manifest of the recipe's shard set, checked against the digest that the recipe may name."""
    manifest = read_manifest(recipe.data.shards)
    if recipe.data.digest not in (None, manifest.digest):
        raise UseError(
            f"data.digest is {recipe.data.digest}, but {recipe.data.shards} has digest {manifest.digest}; "
            "it is another shard set"
        )
    return manifest


def build_tokenizer(recipe: Recipe, run: Path) -> TagTokenizer | None:
    """The tokenizer of a model that reads tags, or None. Tags known by frequency are those of the run's folder."""
    if not recipe.model.text_tokens:
        return None
    tags = read_frequent_tags(run) if needs_frequent_tags(recipe) else []
    by_frequency = recipe.data.tag_order == "frequency"
    return TagTokenizer(recipe.data.tokenizer, recipe.model.text_tokens, tags, by_frequency)


def needs_frequent_tags(recipe: Recipe) -> bool:
    """Whether the tokenizer depends on how frequent the tags of the train split are."""
    by_tag = recipe.data.tokenizer == WHOLE_TAGS or recipe.data.tag_order == "frequency"
    return bool(recipe.model.text_tokens) and by_tag


def one_sample(recipe: Recipe) -> tuple[Tensor, ...]:
    """Inputs of the model for one sample, all zeros but for the mask."""
    size, tokens = recipe.data.image_size, recipe.model.text_tokens
    image = torch.zeros(1, 3, size, size)
    if not tokens:
        return (image,)
    return image, torch.zeros(1, tokens, dtype=torch.int64), torch.ones(1, tokens, dtype=torch.bool)
