"""How far colour alone goes: logistic regression on colour histograms, a floor that any trained network must pass."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.benchmark import Benchmark
from benchmarks.claims import require
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.plan import evaluation_batches
from dist_train.output import say

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 8  # per colour channel
SIDE = 64  # pixels


@dataclass(frozen=True)
class Arguments:
    """Say the accuracy that colours alone give on a shard set."""

    set: Path = field(metadata={"positional": True})
    """folder of the shard set"""


def run(arguments: Arguments) -> None:
    """Fit on the training split and say the accuracy on the test split."""
    accuracy, samples = colour_histogram_accuracy(arguments.set)
    say(f"{arguments.set}: logistic regression on colour histograms: test top-1 {accuracy:.4f} over {samples} samples")


def colour_histogram_accuracy(root: Path) -> tuple[float, int]:
    """(test top-1, test samples) of a logistic regression on 8 x 8 x 8 RGB histograms of the images at 64 x 64 px."""
    require("scikit-learn", "sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    manifest = read_manifest(root)
    train, test = (_histograms(root, manifest, split) for split in ("train", "test"))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    classifier.fit(*train)
    return float(classifier.score(*test)), len(test[1])


def _histograms(root: Path, manifest: Manifest, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from PIL import Image

    from dist_train.data.fetch import ShardFetcher

    info = manifest.split(split)
    (positions,) = evaluation_batches(info.shard_samples, info.samples, rank=0, world_size=1)
    fetched = ShardFetcher(root, info, len(manifest.classes)).fetch(positions, with_text=False)
    good = [i for i in range(info.samples) if i not in fetched.problems]
    features = np.empty((len(good), BINS**3), np.float32)
    for row, encoded in enumerate(fetched.images[i] for i in good):
        image = Image.open(io.BytesIO(np.asarray(encoded).tobytes())).convert("RGB")
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)).reshape(-1, 3)
        r, g, b = (pixels // (256 // BINS)).astype(np.int64).T
        counts = np.bincount((r * BINS + g) * BINS + b, minlength=BINS**3)
        features[row] = np.sqrt(counts / SIDE**2)  # the Hellinger map: rare colours count, but not as noise
    return features, fetched.labels[good]


BENCHMARK = Benchmark("histogram", "The accuracy that colours alone give on a shard set", Arguments, run)
