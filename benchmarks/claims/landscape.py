"""Loss surfaces around trained weights, as in Figure 3 of the paper, with the numbers that the picture suggests.

Every run is looked at on the same samples: the first of a split, without augmentation, held in memory. The model is in
evaluation mode (nothing is dropped), in float32, and the loss is the plain mean cross-entropy whatever the run was
trained with. What the surface is, and how sharp, is in `benchmarks/claims/surface.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks import result
from benchmarks.claims.landscape_picture import draw_landscape
from benchmarks.claims.surface import (
    CENTRE,
    LINE,
    Measured,
    Point,
    draw_direction,
    fits_plan,
    line_barrier,
    measure_units,
    move_on_line,
    move_on_plane,
    plan_line,
    plan_plane,
    sharpness,
    surface_arrays,
)
from dist_train.cli import recipe_from_run
from dist_train.config import Recipe
from dist_train.data.draws import Draw, random_bits
from dist_train.data.loader import Batch, EvalLoader
from dist_train.data.manifest import Manifest
from dist_train.errors import UseError, WorkError
from dist_train.files import write_atomically
from dist_train.inference import TrainedModel, load_trained
from dist_train.models.build import build_model
from dist_train.models.saved import CHECKSUMS_NAME, newest_checkpoint
from dist_train.train.checkpoint import read_state
from dist_train.train.evaluate import Forward
from dist_train.train.inputs import read_shard_set

_METHOD = 1  # of the numbers in a work file: another one makes old work files useless
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is measured of every run; as the arguments of `measure_landscape`."""

    split: str
    samples: int
    points: int
    radius: float
    line_points: int
    seed: int


def measure_landscape(
    runs: list[Path],
    split: str,
    samples: int,
    points: int,
    radius: float,
    line_points: int,
    seed: int,
    name: str,
) -> Path:
    """Measure the surfaces of the runs' newest checkpoints and write the result; returns its path.

    samples: the first of the split, or all if it has fewer. points: of the plane along each of its two axes, odd, over
    [-radius, radius] in units of the filters' norms. line_points: positions t on the line from the initial to the
    trained weights, t from -0.2 to 1.2. seed: of the two directions.

    Beside `NAME.json` stay the arrays of run i, `NAME-<i>-<run>.npz` (see `surface_arrays`), and the picture `NAME.png`
    if matplotlib is installed. Until then a work file for each run holds what is finished: the same call goes on from
    it. All runs see the same samples, each at its own image size and with as many tags as it reads.

    Raises UseError for arguments that cannot be, where there is no trained run, and for runs of different shard sets;
    WorkError for damaged files.
    """
    settings = Settings(split, samples, points, radius, line_points, seed)
    _check_settings(settings)
    recipes, manifest = read_runs(runs)
    manifest.split(split)
    folder = result.RESULTS / "landscape"
    folder.mkdir(parents=True, exist_ok=True)
    stems = [f"{name}-{i}-{run.resolve().name}" for i, run in enumerate(runs)]
    works = [folder / f"{stem}.work.npz" for stem in stems]

    rows, arrays = [], []
    for run, recipe, stem, work in zip(runs, recipes, stems, works, strict=True):
        row, measured = _measure_run(run, recipe, manifest, settings, work)
        rows.append(row | {"arrays": f"{stem}.npz"})
        arrays.append(surface_arrays(measured, points, radius, line_points))
    for row, its in zip(rows, arrays, strict=True):
        _save_arrays(folder / row["arrays"], its)
    parameters = asdict(settings) | {"precision": "float32", "manifest_digest": manifest.digest}
    path = result.write_result("landscape", name, parameters, rows)
    for work in works:
        work.unlink()
    try:
        draw_landscape(path)
    except UseError as error:  # there are results without a picture
        log.warning("%s", error)
    return path


def _check_settings(settings: Settings) -> None:
    if settings.samples < 1:
        raise UseError(f"--samples: {settings.samples} is not at least 1")
    if settings.points < 3 or settings.points % 2 == 0:
        raise UseError(
            f"--points: {settings.points} is not an odd number from 3, with the trained weights amid them; "
            f"use {max(3, settings.points + 1)}"
        )
    if not (settings.radius > 0 and math.isfinite(settings.radius)):
        raise UseError(f"--radius: {settings.radius} is not above 0; 1 moves every filter by its own norm")
    if settings.line_points < 2:
        raise UseError(f"--line-points: {settings.line_points} is not at least 2")


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
                f"{manifest.digest}; put the set back, or train anew"
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


# ---------------------------------------------------------------------- one run
def _measure_run(
    run: Path, recipe: Recipe, manifest: Manifest, settings: Settings, work: Path
) -> tuple[dict[str, Any], Measured]:
    """The row of a run, without its arrays' name, and all that was measured."""
    trained = load_trained(run, recipe, "last", False)
    model = trained.model
    batches = hold_subset(trained, recipe, manifest, settings.split, settings.samples)
    plane, line = plan_plane(settings.points, settings.radius), plan_line(settings.line_points)
    key = _work_key(trained, recipe, manifest, settings)
    measured = read_work(work, key, plane | line)
    missing = [unit for name, unit in (plane | line).items() if name not in measured]
    note = None
    # TensorFloat-32, cuDNN's default for the patches' convolution, has 10 bits of mantissa: not enough for differences.
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with (
        exact,
        tqdm(
            total=sum(map(len, missing)), desc=run.resolve().name, unit="point", disable=not sys.stderr.isatty()
        ) as bar,
    ):

        def at(move: Callable[..., None]) -> Callable[..., tuple[float, float]]:
            def evaluate(*point: float) -> tuple[float, float]:
                move(*point)
                bar.update()
                return loss_and_top1(trained.forward, batches)

            return evaluate

        def save(so_far: Measured) -> None:
            _save_arrays(work, {"key": np.array(key), **so_far})

        if any(name not in measured for name in plane):
            directions = [draw_direction(model, settings.seed, number) for number in (1, 2)]
            move = move_on_plane(model, *directions)
            measure_units(plane, at(move), measured, save)
            move(0.0, 0.0)  # the line ends at the trained weights
        if LINE not in measured:
            try:
                initial = initial_weights(recipe, trained)
            except (UseError, WorkError) as error:
                note = f"no line, as the initial weights cannot be made again: {error}"
                log.warning("%s: %s", run, note)
            else:
                measure_units(line, at(move_on_line(model, initial)), measured, save)

    loss, top1 = measured[CENTRE][0].tolist()
    row = {
        "run": run.resolve().name,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "batch_size": recipe.train.batch_size,
        "image_size": recipe.data.image_size,
        "text_tokens": recipe.model.text_tokens,
        "step": read_state(trained.checkpoint).step,
        "samples": sum(len(batch.labels) for batch in batches),
        "loss": _number(loss),
        "top1": _number(top1),
        **{key: _number(value) for key, value in sharpness(measured, settings.points, settings.radius).items()},
        "line": settings.line_points if LINE in measured else None,
        "line_barrier": _number(line_barrier(measured, settings.line_points)),
    }
    return row | ({"line_note": note} if note else {}), measured


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
    tensors = (batch.images, batch.labels, batch.weights, batch.text_ids, batch.text_mask)
    return Batch(*(None if tensor is None else tensor[chosen] for tensor in tensors), batch.samples[chosen.cpu()])


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
        torch.default_generator.manual_seed(int(random_bits(recipe.train.seed, Draw.WEIGHTS) >> 1))
        model, _ = build_model(recipe.model, recipe.data.image_size, len(trained.class_names), vocab_size)
    return model.state_dict()


# ---------------------------------------------------------------------- files
def _work_key(trained: TrainedModel, recipe: Recipe, manifest: Manifest, settings: Settings) -> str:
    """SHA-256 (hex) of all that the numbers depend on: the checkpoint's bytes, the recipe, the data, the settings."""
    identity = {
        "method": _METHOD,
        "checkpoint": hashlib.sha256((trained.checkpoint / CHECKSUMS_NAME).read_bytes()).hexdigest(),
        "recipe": asdict(recipe),
        "manifest": manifest.digest,
        "settings": asdict(settings),
        "device": "cpu" if trained.place.device_id is None else "gpu",
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_work(path: Path, key: str, plan: dict[str, list[Point]]) -> Measured:
    """The finished units in a work file; none, with a warning, where it is damaged or of another measurement."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            units = dict(_items(arrays))
    except Exception as error:  # zip, zlib and numpy each have errors of their own
        log.warning("%s cannot be read (%s); measuring from the start", path, " ".join(str(error).split()))
        return {}
    if str(units.pop("key", "")) != key or not fits_plan(units, plan):
        log.warning("%s is of another checkpoint or other settings; measuring from the start", path)
        return {}
    return units


def _items(arrays: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in arrays.files:
        yield name, arrays[name]


def _save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror}); make room, then start again") from None


def _number(value: float | None) -> float | None:
    """Seven digits, as float32 has no more; None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")
