"""What a recipe asks for that cannot be, refused before a model is built or anything slow is imported.

`dist-train train` refuses the first of these problems, before its slow imports and again on every rank; `dist-train
doctor` names all of them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dist_train.config import DataConfig, Precision, Recipe
from dist_train.data.augment import BLUR_KERNEL
from dist_train.data.device import decoding_gpu
from dist_train.data.manifest import Manifest, check_has_tags, read_manifest
from dist_train.data.plan import choose_streams, micro_batch_of, rank_batch
from dist_train.data.remote import is_url
from dist_train.data.vocabulary import WHOLE_TAGS, read_vocabulary
from dist_train.errors import UseError, WorkError
from dist_train.image_folder import is_image_source
from dist_train.machine import is_installed
from dist_train.models.abilities import Abilities
from dist_train.models.names import CNNS, abilities, check_model, check_weights
from dist_train.ranges import check_ranges
from dist_train.train.schedule import check_schedule, count_steps
from dist_train.train.settings import deepspeed_settings, precision_of, read_deepspeed_config, why_no_graphs

AUGMENTATION_OFF: dict[str, float | bool | str] = {
    "crop": "squash",
    "crop_margin": 0,
    "flip": False,
    "auto_augment": "none",
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grey", "blur", "erasing", "mixup", "cutmix"), 0),
}
"""Every key of the data section that augments images, and the value at which it does not."""
METRICS_NAME = "metrics.jsonl"
"""The file of a run folder that says that a run has begun in it."""


def check(
    recipe: Recipe, world_size: int, device: str | None = None, manifest: Manifest | None = None, resume: str = "none"
) -> None:
    """Raise the first of `problems`."""
    for problem in problems(recipe, world_size, device, manifest, resume):
        raise problem


def check_step(recipe: Recipe, world_size: int, device: str) -> None:
    """Raise UseError where no optimizer step can be made by the recipe, whatever its data and its run folder.

    world_size: ranks that make it together. device: cpu or cuda.
    """
    check_ranges(recipe)
    check_model(recipe.model, recipe.data.image_size)
    _check_lora(recipe)
    _check_feature_cache(recipe)
    _check_batch(recipe, world_size)
    check_combination(recipe, device, world_size)
    _check_deepspeed_settings(recipe, device, world_size)


def problems(
    recipe: Recipe, world_size: int, device: str | None = None, manifest: Manifest | None = None, resume: str = "none"
) -> Iterator[UseError | WorkError]:
    """What cannot be, what takes no time to find out first.

    world_size: ranks of the run. device: cpu or cuda; None for this machine's. manifest: of data.shards; None where it
    is not read yet: then it is if it is in a folder; at a URL, which may be slow, and where a set must be built of
    images first, what follows from it is left out. resume: as `train` takes it.
    """
    in_range = next(_refusals([lambda: check_ranges(recipe)]), None)
    if in_range is not None:  # nothing can be computed from such numbers
        yield in_range
        return
    # The weights that it started from may be gone: it has its own.
    saved = any((Path(recipe.train.run) / "checkpoints").glob("step-*"))
    resumed = resume != "none" and (resume != "auto" or saved)
    yield from _refusals(
        [
            lambda: check_model(recipe.model, recipe.data.image_size),
            lambda: None if resumed else check_weights(recipe.model.weights),
            lambda: _check_lora(recipe),
            lambda: _check_feature_cache(recipe),
            lambda: _check_augmentation(recipe.data),
            lambda: check_run_folder(Path(recipe.train.run), resume),
            lambda: _check_wandb(recipe),
            lambda: _check_tokenizer(recipe),
            lambda: _check_labels(recipe),
            lambda: _check_monitor(recipe),
            lambda: _check_batch(recipe, world_size),
            lambda: choose_streams(recipe.train.batch_size, recipe.data.streams),
        ]
    )
    unreadable = list(_refusals([lambda: read_deepspeed_config(recipe.deepspeed)]))
    yield from unreadable
    if manifest is None and not is_url(recipe.data.shards) and not is_image_source(recipe.data.shards):
        try:
            manifest = read_manifest(recipe.data.shards)
        except (UseError, WorkError) as no_set:
            yield no_set
    if manifest is not None:
        yield from _refusals([lambda: check_digest(recipe.data, manifest), lambda: _check_samples(recipe, manifest)])
    # From here on torch may have to be imported, to ask for a GPU.
    device = device or find_device()
    yield from _refusals(
        [
            lambda: decoding_gpu(recipe.data, 0 if device == "cuda" else None),
            lambda: check_combination(recipe, device, world_size),
            lambda: None if unreadable else _check_deepspeed_settings(recipe, device, world_size),
            lambda: None if resumed else _check_hub_weights(recipe),
        ]
    )


def _refusals(checks: list[Callable[[], object]]) -> Iterator[UseError]:
    for one in checks:
        try:
            one()
        except UseError as refusal:
            yield refusal


# ---------------------------------------------------------------- where it will run
def ranks_of_this_job() -> int:
    """Ranks of the job that this process is one of, as its launcher or SLURM says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def find_device() -> str:
    """cuda if this machine has a GPU that torch can use, else cpu. Imports torch only where there may be one."""
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver's, without which there is none
    except OSError:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------- one by one
def check_run_folder(run: Path, resume: str) -> None:
    """Raise UseError where a new run would write over an old one, or the folder cannot be."""
    # os.path, which says no of what it may not look at; pathlib raises.
    if resume == "none" and os.path.exists(run / METRICS_NAME):
        raise UseError(f"{run} already holds a run; add --resume auto to continue it, or choose another train.run")
    above = next(path for path in [run.absolute(), *run.absolute().parents] if os.path.exists(path))
    if not os.path.isdir(above):
        raise UseError(f"train.run {run}: {above} is a file; choose another train.run")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UseError(f"train.run {run}: {above} cannot be written; choose another train.run")


def check_digest(config: DataConfig, manifest: Manifest) -> None:
    """Raise UseError where the shard set is not the one that data.digest names."""
    if config.digest not in (None, manifest.digest):
        raise UseError(
            f"data.digest is {config.digest}, but {config.shards} has digest {manifest.digest}; it is another shard set"
        )


def check_combination(recipe: Recipe, device: str, world_size: int = 1) -> None:
    """Raise UseError for settings that do not go together, or not on this device (cpu or cuda)."""
    config, stage = recipe.deepspeed, recipe.deepspeed.zero_stage
    precision = _precision_on(recipe, device)
    if precision in ("fp16", "tf32") and device == "cpu":
        raise UseError(f"deepspeed.precision {precision} needs a GPU; on the CPU use bf16 or float32")
    if precision == "tf32":
        _check_tf32()
    if precision == "bf16_autocast" and stage > 0:
        raise UseError(f"deepspeed.precision bf16_autocast needs deepspeed.zero_stage 0; ZeRO {stage} has bf16")
    if (precision == "fp16" or (precision == "bf16" and stage > 0)) and _can(recipe).batch_norms:
        raise UseError(
            f"{recipe.model.backbone} has batch norms, whose float32 statistics DeepSpeed's {precision} cannot "
            "take; use deepspeed.precision bf16 with deepspeed.zero_stage 0, or float32"
        )
    if recipe.train.noise_every and precision == "fp16":
        raise UseError(
            "train.noise_every: deepspeed.precision fp16 scales what it measures; use bf16, or noise_every 0"
        )
    if config.offload == "optimizer" and stage == 0:
        raise UseError("deepspeed.offload optimizer needs deepspeed.zero_stage 1, 2 or 3")
    if config.offload == "parameters" and stage != 3:
        raise UseError(f"deepspeed.offload parameters needs deepspeed.zero_stage 3, not {stage}")
    if recipe.train.ema and stage == 3:
        raise UseError(
            "train.ema needs whole parameters on every rank, and deepspeed.zero_stage 3 splits them; use 0 to 2"
        )
    if recipe.model.compile in ("kernels", "graphs") and stage == 3:
        raise UseError("model.compile cannot see parameters that deepspeed.zero_stage 3 gathers; use 0 to 2, or none")
    if recipe.model.compile == "graphs" and (problem := why_no_graphs(recipe, device, world_size)):
        raise UseError(f"model.compile graphs {problem}; use kernels, or auto")
    if recipe.train.channels_last and _can(recipe).tokens:
        raise UseError(f"train.channels_last is for CNNs; with {recipe.model.backbone} use false")


def _can(recipe: Recipe) -> Abilities:
    return abilities(recipe.model.backbone, recipe.data.image_size)


def _check_tf32() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise UseError(f"deepspeed.precision tf32: {torch.cuda.get_device_name()} has no such arithmetic")


def _precision_on(recipe: Recipe, device: str) -> Precision:
    config = recipe.deepspeed
    return "float32" if config.precision == "auto" and device == "cpu" else precision_of(config)


def _check_lora(recipe: Recipe) -> None:
    if not recipe.model.lora:
        return
    if recipe.model.backbone in CNNS:
        raise UseError(f"model.lora: {recipe.model.backbone} has no transformer blocks for adapters; use a ViT, or 0")
    if recipe.model.freeze != "none":
        raise UseError("model.lora freezes the backbone but for its adapters: use model.freeze none with it")
    if not is_installed("peft"):
        raise UseError("model.lora needs the package peft: pip install 'dist-train[lora]'")


def _check_feature_cache(recipe: Recipe) -> None:
    data, folder = recipe.data, recipe.data.feature_cache
    if folder is None:
        return
    if is_url(folder):
        raise UseError(f"data.feature_cache {folder}: must be a folder, not a URL")
    if recipe.model.freeze != "backbone":
        raise UseError("data.feature_cache keeps the features of a frozen backbone: use model.freeze backbone with it")
    if data.labels != "class":
        raise UseError("data.feature_cache goes with the classes of images alone: use data.labels class, or no cache")
    if recipe.model.text_tokens:
        raise UseError("data.feature_cache keeps features of images alone: use model.text_tokens 0, or no cache")
    on = [f"data.{key} {str(value).lower()}" for key, value in AUGMENTATION_OFF.items() if getattr(data, key) != value]
    if on:
        raise UseError(
            f"data.feature_cache: a sample has the same features in every epoch, so nothing may augment it; set "
            f"{', '.join(on)}"
        )


def _check_augmentation(config: DataConfig) -> None:
    for key in ("crop_scale", "crop_ratio", "blur_sigma"):
        least, most = getattr(config, key)
        if least > most:
            raise UseError(f"data.{key} is {[least, most]}; the first number must not be above the second")
    if config.blur and config.image_size <= BLUR_KERNEL // 2:
        raise UseError(
            f"data.blur reflects {BLUR_KERNEL // 2} pixels at the border, and data.image_size is {config.image_size}; "
            "use 0, or larger images"
        )


def _check_wandb(recipe: Recipe) -> None:
    if recipe.train.wandb_project and not is_installed("wandb"):
        raise UseError("train.wandb_project needs the package: pip install wandb")


def _check_tokenizer(recipe: Recipe) -> None:
    tokens = recipe.model.text_tokens
    if not tokens or recipe.data.tokenizer == WHOLE_TAGS:
        return
    read_vocabulary(recipe.data.tokenizer)
    if tokens < 3:
        raise UseError(
            f"model.text_tokens is {tokens}, and a WordPiece tokenizer puts [CLS] and [SEP] around the tags: use 3 or "
            "more, or data.tokenizer tags"
        )


def _check_labels(recipe: Recipe) -> None:
    if recipe.data.labels == "class":
        if recipe.optim.positive_weight != 1:
            raise UseError("optim.positive_weight weighs tags: it needs data.labels tags")
    elif recipe.model.text_tokens:
        raise UseError(
            "with data.labels tags a model that reads tags would read its answer: set model.text_tokens to 0"
        )
    elif recipe.optim.class_weights != "none":
        raise UseError(
            "optim.class_weights weighs samples by their class: with data.labels tags set it to none; "
            "optim.positive_weight weighs tags"
        )


def _check_monitor(recipe: Recipe) -> None:
    monitor = recipe.train.monitor
    if recipe.data.labels == "tags" and monitor not in ("auto", "loss"):
        raise UseError(f"train.monitor {monitor} is of one class an image: with data.labels tags use auto or loss")


def _check_batch(recipe: Recipe, world_size: int) -> None:
    if recipe.train.micro_batch_size == "auto":
        _check_auto_micro_batch(recipe)
        micro_batch = rank_batch(recipe.train.batch_size, world_size)  # if this can be paired, some can
    else:
        micro_batch = micro_batch_of(recipe.train.batch_size, world_size, recipe.train.micro_batch_size)
    if recipe.train.skip_bad_steps and micro_batch * world_size < recipe.train.batch_size:
        # The gradients of a step's first micro-batch could not be taken back.
        raise UseError("train.skip_bad_steps needs one micro-batch a step; set train.micro_batch_size to 0")
    if not (recipe.data.mixup or recipe.data.cutmix):
        return
    if recipe.model.text_tokens:
        raise UseError("data.mixup and data.cutmix mix images, and tags cannot be mixed: use 0 with model.text_tokens")
    if micro_batch % 2:
        raise UseError(
            f"data.mixup and data.cutmix pair the samples of a micro-batch, which has an odd {micro_batch}; "
            "choose train.batch_size or train.micro_batch_size so that it is even"
        )


def _check_auto_micro_batch(recipe: Recipe) -> None:
    """What the micro-batch decides on beside memory must not depend on how much of it there is."""
    if recipe.train.skip_bad_steps:
        raise UseError("train.skip_bad_steps needs one micro-batch a step; set train.micro_batch_size to 0, not auto")
    if recipe.data.feature_cache:
        raise UseError(
            "train.micro_batch_size auto: with data.feature_cache steps are of the head alone and take little; use 0"
        )
    if _can(recipe).batch_norms and recipe.model.freeze != "backbone":
        raise UseError(
            f"train.micro_batch_size auto: {recipe.model.backbone} has batch norms, whose statistics are those of a "
            "micro-batch, so what is learnt would depend on the memory there is; give a number"
        )


def _check_samples(recipe: Recipe, manifest: Manifest) -> None:
    samples = manifest.split("train").samples
    if not samples:
        raise UseError("the split to train on holds no samples")
    for split in ("val", "test"):
        if split in manifest.splits and not manifest.splits[split].samples:
            raise UseError(f"the split {split} holds no samples to evaluate on; build the set with some, or without it")
    if recipe.train.patience and "val" not in manifest.splits:
        raise UseError(
            "train.patience counts evaluations on val, and the shard set has no such split; use 0, or add one"
        )
    check_schedule(recipe.optim, count_steps(recipe.train.epochs, samples, recipe.train.batch_size))
    if recipe.model.text_tokens or recipe.data.labels == "tags":
        check_has_tags(recipe.data, manifest)


def _check_deepspeed_settings(recipe: Recipe, device: str, world_size: int) -> None:
    if recipe.deepspeed.config is None:
        return
    size = recipe.train.micro_batch_size
    try:
        micro_batch = micro_batch_of(recipe.train.batch_size, world_size, 0 if size == "auto" else size)
    except UseError:  # which `_check_batch` tells
        return
    known = replace(recipe, deepspeed=replace(recipe.deepspeed, precision=_precision_on(recipe, device)))
    deepspeed_settings(known, world_size, micro_batch, parameters=0)


def _check_hub_weights(recipe: Recipe) -> None:
    if recipe.model.weights.partition(":")[0] == "hub":
        from dist_train.models.pretrained import hub_name  # imports timm, which alone knows and which training needs

        hub_name(recipe.model.backbone, recipe.model.weights.removeprefix("hub").removeprefix(":"))
