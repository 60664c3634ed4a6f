"""The loss surface of one trained run for `benchmarks/claims/landscape.py`: its samples, its points, its row.

The model is in evaluation mode (nothing is dropped), in float32, and the loss is the plain mean cross-entropy whatever
the run was trained with. What the surface is, and how sharp, is in `benchmarks/claims/surface.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.claims.landscape_arguments import Arguments
from benchmarks.claims.sharpness import excess_losses, hessian_eigenvalue, mean_excess, sample_losses
from benchmarks.claims.surface import (
    Floats,
    all_line_positions,
    draw_direction,
    line_barrier,
    move_on_line,
    move_on_plane,
    plane_points,
    sharpness,
    surface_arrays,
)
from benchmarks.tables import Row
from dist_train.config import Recipe
from dist_train.data.loader import Batch, EvalLoader
from dist_train.data.manifest import Manifest
from dist_train.errors import UseError, WorkError, written
from dist_train.files import write_atomically
from dist_train.models.saved import CHECKSUMS_NAME, newest_checkpoint
from dist_train.parse import recipe_from_run
from dist_train.train.checkpoint import read_state
from dist_train.train.evaluate import Forward
from dist_train.train.inputs import read_shard_set
from dist_train.train.setup import initial_model
from dist_train.use.trained import TrainedModel, load_trained

LARGEST_RESIDUAL = 0.1
"""Of an eigenvalue that is reported; one with a larger residual was not reached."""
_METHOD = 5  # of the numbers in a work file: another one makes old work files useless
log = logging.getLogger(__name__)


def read_runs(runs: list[Path]) -> tuple[list[Recipe], Manifest]:
    """The recipes of the runs, and the manifest of the shard set that all were trained on, before any is measured.

    Raises UseError naming a run that has no checkpoint, whose shard set is not what it was trained on, or is another
    than the first run's.
    """
    recipes: list[Recipe] = []
    manifests: list[Manifest] = []
    for run in runs:
        recipe = recipe_from_run(run)
        checkpoint = newest_checkpoint(run)
        if checkpoint is None:
            raise UseError(f"{run}: no complete checkpoint; train first")
        manifest = read_shard_set(recipe)
        trained_on = read_state(checkpoint).manifest_digest
        if trained_on != manifest.digest:
            raise UseError(
                f"{run}: trained on a shard set of digest {trained_on}, but {recipe.data.shards} now has "
                f"{manifest.digest}; put the set back, or train again"
            )
        if manifests and manifest.digest != manifests[0].digest:
            raise UseError(
                f"{run}: its shard set {recipe.data.shards} has digest {manifest.digest}, that of {runs[0]} has "
                f"{manifests[0].digest}; compare runs of one shard set"
            )
        recipes.append(recipe)
        manifests.append(manifest)
    if not manifests:
        raise UseError("landscape: no run given; name at least one run folder")
    return recipes, manifests[0]


def measure_run(
    run: Path, recipe: Recipe, manifest: Manifest, asked: Arguments, work_file: Path
) -> tuple[Row, dict[str, Floats]]:
    """The row of a run, without its arrays' name, and its `surface_arrays`. What is finished of it is kept in the work
    file, from which the next call continues."""
    trained = load_trained(run, recipe, "last", False)
    batches = hold_subset(trained, recipe, manifest, asked.split, asked.samples)
    plane, line = plane_points(asked.points, asked.radius), all_line_positions(asked.line_points)
    work = read_work(work_file, _work_key(trained, recipe, manifest, asked), len(plane) + len(line))
    # TensorFloat-32, cuDNN's default for the patches' convolution, has 10 bits of mantissa: not enough for differences.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        if "sharpness" not in work.done:
            work.done["sharpness"] = np.array(json.dumps(_sharpness(trained, batches, asked)))
            work.save()
        note = _measure_points(run, recipe, trained, batches, asked, work)

    on_plane, on_line = np.split(np.array(work.values, np.float64), [len(plane)])
    numbers = dict(zip(("loss", "top1"), on_plane[0].tolist(), strict=True))
    numbers |= sharpness(on_plane, asked.points, asked.radius) | json.loads(str(work.done["sharpness"]))
    row = {
        "run": run.resolve().name,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
        "image_size": recipe.data.image_size,
        "text_tokens": recipe.model.text_tokens,
        "step": read_state(trained.checkpoint).step,
        "samples": sum(len(batch.labels) for batch in batches),
        **{name: _number(value) for name, value in numbers.items()},
        "line": asked.line_points if len(on_line) else None,
        "line_barrier": _number(line_barrier(on_line)),
    }
    arrays = surface_arrays(on_plane, on_line, asked.points, asked.radius)
    return row | ({"line_note": note} if note else {}), arrays


def _sharpness(trained: TrainedModel, batches: list[Batch], asked: Arguments) -> dict[str, float | None]:
    """The numbers of `benchmarks.claims.sharpness`."""
    numbers: dict[str, float | None] = {}
    if asked.directions:
        losses = partial(sample_losses, trained.forward, batches)
        numbers |= mean_excess(excess_losses(trained.model, losses, asked.seed, asked.directions, asked.radius))
    if asked.hessian_steps:
        found = hessian_eigenvalue(trained.model, batches, asked.seed, asked.hessian_steps)
        reached = found.value if found.residual <= LARGEST_RESIDUAL else None
        numbers |= {"largest_eigenvalue": reached, "eigenvalue_residual": found.residual}
        numbers["eigenvalue_steps"] = found.steps
    return numbers


def _measure_points(
    run: Path, recipe: Recipe, trained: TrainedModel, batches: list[Batch], asked: Arguments, work: Work
) -> str | None:
    """Add (loss, top-1) at the points of the plane and the line that are not in `work`; why there is no line, if so."""
    plane, line = plane_points(asked.points, asked.radius), all_line_positions(asked.line_points)
    values, total = work.values, len(plane) + len(line)
    bar = tqdm(total=total - len(values), desc=run.resolve().name, unit="point", disable=not sys.stderr.isatty())

    def measure() -> None:
        values.append(loss_and_top1(trained.forward, batches))
        bar.update()
        if len(values) % asked.points == 0 or len(values) == total:
            work.save()

    with bar:
        if len(values) < len(plane):
            move = move_on_plane(trained.model, *(draw_direction(trained.model, asked.seed, i) for i in (1, 2)))
            for a, b in plane[len(values) :]:
                move(a, b)
                measure()
            move(0.0, 0.0)  # the line ends at the trained weights
        if len(values) < total:
            try:
                move_to = move_on_line(trained.model, initial_weights(recipe, trained))
            except (UseError, WorkError) as error:
                note = f"no line, as the initial weights cannot be made again: {error}"
                log.warning("%s: %s", run, note)
                del values[len(plane) :]  # of a line that was begun
                return note
            for t in line[len(values) - len(plane) :]:
                move_to(t)
                measure()
    return None


def hold_subset(trained: TrainedModel, recipe: Recipe, manifest: Manifest, split: str, samples: int) -> list[Batch]:
    """Batches of the first `samples` samples of the split, in its order, as the model reads them.

    A sample that cannot be used counts among the first but is not in a batch. Raises WorkError where none can be used.
    """
    loader = EvalLoader(
        recipe.data,
        manifest,
        split,
        trained.place,
        batch_size=min(samples, recipe.train.eval_batch_size),
        tokenizer=trained.tokenizer,
    )
    batches = []
    left = samples
    for batch in loader:
        chosen = (batch.weights[:left] > 0).nonzero().squeeze(1)
        left -= len(batch.samples[:left])
        if len(chosen):
            batches.append(_select(batch, chosen))
        if left <= 0:
            break
    if not batches:
        raise WorkError(
            f"{recipe.data.shards}: none of the first {samples} samples of '{split}' can be used; "
            "check it with `python -m shards verify`"
        )
    return batches


def _select(batch: Batch, chosen: Tensor) -> Batch:
    return Batch(
        batch.images[chosen],
        batch.labels[chosen],
        batch.weights[chosen],
        None if batch.text_ids is None else batch.text_ids[chosen],
        None if batch.text_mask is None else batch.text_mask[chosen],
        batch.samples[chosen.cpu().numpy()],
    )


@torch.no_grad()
def loss_and_top1(forward: Forward, batches: list[Batch]) -> tuple[float, float]:
    """Mean cross-entropy of the samples, summed in float64, and the share whose class came first."""
    sums = torch.zeros(2, dtype=torch.float64, device=batches[0].labels.device)
    for batch in batches:
        logits = forward(batch).double()
        sums[0] += functional.cross_entropy(logits, batch.labels, reduction="sum")
        sums[1] += (logits.argmax(dim=1) == batch.labels).sum()
    loss, top1 = (sums / sum(len(batch.labels) for batch in batches)).tolist()
    return loss, top1


def initial_weights(recipe: Recipe, trained: TrainedModel) -> dict[str, Tensor]:
    """The state that `dist_train.train.loop` began to train from, on the CPU; the global generator stays as it was.

    Raises UseError or WorkError where the recipe's starting weights are no longer to be had.
    """
    vocab_size = trained.tokenizer.vocab_size if trained.tokenizer else 0
    with torch.random.fork_rng(devices=[]):
        model, _ = initial_model(recipe, trained.class_names, vocab_size)
    return model.state_dict()


# ---------------------------------------------------------------------- files
def _work_key(trained: TrainedModel, recipe: Recipe, manifest: Manifest, asked: Arguments) -> str:
    """SHA-256 (hex) of all that the numbers depend on: the checkpoint's bytes, the recipe, the data, the settings."""
    identity = {
        "method": _METHOD,
        "checkpoint": hashlib.sha256((trained.checkpoint / CHECKSUMS_NAME).read_bytes()).hexdigest(),
        "recipe": asdict(recipe),
        "manifest": manifest.digest,
        "settings": asked.settings,
        "device": "cpu" if trained.place.device_id is None else "gpu",
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass
class Work:
    """What is finished of a run, in a file: (loss, top-1) of the points, and `done`, numbers by name."""

    path: Path
    key: str
    values: list[tuple[float, float]] = field(default_factory=list)
    done: dict[str, NDArray[Any]] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file. Raises WorkError where it cannot be."""
        values = np.array(self.values, np.float64).reshape(-1, 2)
        save_arrays(self.path, {"key": np.array(self.key), "values": values, **self.done})


def read_work(path: Path, key: str, most: int) -> Work:
    """What is in a work file; nothing, with a warning, where it is damaged or of another measurement."""
    work = Work(path, key)
    if not path.exists():
        return work
    try:
        with np.load(path, allow_pickle=False) as arrays:
            its_key, values = str(arrays["key"]), np.asarray(arrays["values"])
            done = {name: np.asarray(arrays[name]) for name in arrays.files if name not in ("key", "values")}
    except Exception as error:  # zip, zlib and numpy each have errors of their own
        log.warning("%s cannot be read (%s); measuring from the start", path, " ".join(str(error).split()))
        return work
    if its_key != key or values.ndim != 2 or values.shape[1] != 2 or len(values) > most:
        log.warning("%s is of another checkpoint or other settings; measuring from the start", path)
        return work
    work.values, work.done = [(loss, top1) for loss, top1 in values.tolist()], done
    return work


def save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a file of arrays. Raises WorkError where it cannot be."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    with written(path, "make room, then start again"):
        write_atomically(path, content.getvalue())


def _number(value: float | None) -> float | None:
    """Seven digits, as float32 has no more; None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")
