"""What a frozen backbone makes of each sample, computed once and kept on disk; from then on the head trains alone.

The features of a sample must not depend on the epoch, so nothing may augment it. They are computed as in evaluation,
in the run's precision, by all ranks together, each sample once. A later run finds them if set, backbone, its weights
and all that shapes an image or a feature are the same; the head, its rate and the batch may be others.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import dist_train
from dist_train.config import Recipe, recipe_to_dict
from dist_train.data.device import decoding_gpu
from dist_train.data.features import CHUNK, FeatureEvalLoader, FeatureStore, FeatureTrainLoader
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import Manifest
from dist_train.data.plan import evaluation_batches, micro_batch_of
from dist_train.data.quarantine import QUARANTINE_NAME
from dist_train.errors import written
from dist_train.models.classifier import Classifier
from dist_train.models.heads import HEADS
from dist_train.place import Place
from dist_train.train.engine import torch_device
from dist_train.train.evaluate import padded
from dist_train.train.precision import compute_dtype, set_arithmetic, uses_autocast
from dist_train.train.ranks import from_rank_zero, gather
from dist_train.train.settings import precision_of

log = logging.getLogger(__name__)

# Keys that change nothing in what a frozen backbone gives for an image, its weights being given. The others, new ones
# too, are part of what a store is found by.
_OTHER_KEYS = {
    *(f"data.{key}" for key in ("shards", "cache", "cache_gb", "digest", "feature_cache", "streams", "shuffle_window")),
    *(f"data.{key}" for key in ("crop_margin", "flip", "brightness", "contrast", "saturation", "hue")),
    *(f"data.{key}" for key in ("mixup", "cutmix", "tokenizer", "tag_order", "tag_vocabulary")),
    *(f"data.{key}" for key in ("device", "threads", "prefetch", "max_bad_samples")),
    *(f"model.{key}" for key in ("head", "head_init", "text_tokens", "mask_padding", "weights", "pos_resize")),
    *(f"model.{key}" for key in ("dropout", "drop_path", "freeze", "lora", "lora_alpha", "lora_targets")),
    *(f"model.{key}" for key in ("checkpoint_blocks", "compile")),
}


@torch.no_grad()
def prepare_features(recipe: Recipe, model: Classifier, manifest: Manifest, place: Place) -> FeatureStore:
    """The features of all splits by the model's backbone, from data.feature_cache or computed now and put there.

    All ranks call this together, before an engine is built. From then on the model takes features for images. Raises
    WorkError where the folder cannot be written.
    """
    computing = _computing_model(model, recipe, place)
    side = recipe.data.image_size
    example = _features(computing, recipe, torch.zeros(1, 3, side, side, device=torch_device(place)))
    shape, dtype = tuple(example.shape[1:]), example.dtype
    description = from_rank_zero(lambda: _describe(recipe, computing, manifest, place, example), place)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    folder = Path(recipe.data.feature_cache or "") / digest[:32]
    store = FeatureStore(folder, shape, dtype, description)
    with written(folder, "choose another data.feature_cache"), ExitStack() as held:
        from_rank_zero(lambda: held.enter_context(store.locked()), place)
        for split in manifest.splits:
            _fill(store, split, recipe, computing, manifest, place)
        gather(None, place)  # so that the last has written before the first reads, or lets go of the folder
    model.train()
    model.feature_shape = shape
    return store


def _computing_model(model: Classifier, recipe: Recipe, place: Place) -> Classifier:
    """The model in evaluation mode and in the arithmetic of its evaluations: the same, or a copy of another type."""
    config, device = recipe.deepspeed, torch_device(place)
    dtype = torch.float32 if uses_autocast(config) else compute_dtype(config)
    computing = model.to(device) if dtype == torch.float32 else copy.deepcopy(model).to(device, dtype)
    set_arithmetic(computing, config)
    return computing.eval()


def _features(model: Classifier, recipe: Recipe, images: Tensor) -> Tensor:
    layout = torch.channels_last if recipe.train.channels_last else torch.preserve_format
    dtype = next(model.parameters()).dtype
    return model.features(images.to(dtype, memory_format=layout))


def _describe(recipe: Recipe, model: Classifier, manifest: Manifest, place: Place, example: Tensor) -> dict[str, Any]:
    """All that the features depend on."""
    weights = hashlib.sha256()
    for name, tensor in model.backbone.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    keys = {
        f"{section}.{key}": value
        for section in ("data", "model")
        for key, value in recipe_to_dict(recipe)[section].items()
        if f"{section}.{key}" not in _OTHER_KEYS
    }
    return {
        "manifest": manifest.digest,
        "weights": weights.hexdigest(),
        "features": HEADS[recipe.model.head].reads,
        "shape": list(example.shape[1:]),
        "type": str(example.dtype).removeprefix("torch."),
        "precision": precision_of(recipe.deepspeed),
        "decoded_by": "cpu" if decoding_gpu(recipe.data, place.device_id) is None else "gpu",
        "versions": {"dist_train": dist_train.__version__, "timm": timm.__version__},
        **keys,
    }


def _fill(store: FeatureStore, split: str, recipe: Recipe, model: Classifier, manifest: Manifest, place: Place) -> None:
    """Compute what is missing of a split, shared out among the ranks."""
    samples, started = manifest.split(split).samples, time.perf_counter()
    from_rank_zero(lambda: store.begin(split, samples), place)
    parts = gather(store.missing(split, samples, place.rank, place.world_size), place)
    missing = [chunk for part in parts for chunk in part]
    if not missing:
        log.info("features of %d samples of %s: taken from %s", samples, split, store.folder)
        return
    first, end = (len(missing) * (place.rank + i) // place.world_size for i in (0, 1))
    _compute(store, split, missing[first:end], recipe, model, manifest, place)
    gather(None, place)
    computed = sum(min(CHUNK, samples - chunk * CHUNK) for chunk in missing)
    seconds = time.perf_counter() - started
    log.info(
        "features of %d samples of %s: %d computed in %.1f s, in %s", samples, split, computed, seconds, store.folder
    )


def _compute(
    store: FeatureStore,
    split: str,
    chunks: list[int],
    recipe: Recipe,
    model: Classifier,
    manifest: Manifest,
    place: Place,
) -> None:
    """Run the backbone over these chunks of a split, and write them one by one."""
    size = recipe.train.eval_batch_size
    loader = EvalLoader(recipe.data, manifest, split, place, batch_size=size, quarantine=store.folder / QUARANTINE_NAME)
    in_order = evaluation_batches(manifest.split(split).shard_samples, CHUNK, 0, 1)
    loader.batches = [in_order[chunk][i : i + size] for chunk in chunks for i in range(0, len(in_order[chunk]), size)]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        count = len(batch.labels)
        features.append(_features(model, recipe, padded(batch, size).images)[:count].cpu())
        labels.append(batch.labels.cpu())
        chunk = int(batch.samples[-1]) // CHUNK
        if int(batch.samples[-1]) == int(in_order[chunk].sample[-1]):
            store.write(split, chunk, torch.cat(features), torch.cat(labels))
            features.clear()
            labels.clear()


def feature_train_loader(
    store: FeatureStore, recipe: Recipe, manifest: Manifest, place: Place, samples_consumed: int
) -> FeatureTrainLoader:
    """This rank's micro-batches of features from a position in the run on."""
    return FeatureTrainLoader(
        store,
        recipe.data,
        manifest,
        place,
        batch_size=recipe.train.batch_size,
        micro_batch=micro_batch_of(recipe.train.batch_size, place.world_size, recipe.train.micro_batch_size),
        seed=recipe.train.seed,
        samples_consumed=samples_consumed,
        quarantine=Path(recipe.train.run) / QUARANTINE_NAME,
    )


def feature_eval_loader(
    store: FeatureStore, recipe: Recipe, manifest: Manifest, place: Place, split: str
) -> FeatureEvalLoader:
    """This rank's batches of features of a split."""
    return FeatureEvalLoader(
        store,
        recipe.data,
        manifest,
        split,
        place,
        batch_size=recipe.train.eval_batch_size,
        quarantine=Path(recipe.train.run) / QUARANTINE_NAME,
    )
