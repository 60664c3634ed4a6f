"""How a set is completed, built or adopted: the list of what was left out, the manifest, and what to warn of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from dist_train import __version__
from dist_train.data.manifest import LEFT_OUT_NAME, ClassInfo, Manifest, ShardInfo, SplitInfo
from dist_train.files import write_atomically
from shards.records import LeftOut, warn
from shards.splits import SPLITS


def write_left_out(folder: Path, left_out: Iterable[LeftOut]) -> None:
    """Write left_out.jsonl, one entry a line."""
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in left_out)
    write_atomically(folder / LEFT_OUT_NAME, lines.encode())


def make_manifest(
    classes: Iterable[ClassInfo],
    shards: Iterable[tuple[str, ShardInfo]],
    left_out: Iterable[LeftOut],
    trained: set[int],
    text: bool,
    transform: str | None = None,
) -> Manifest:
    """The manifest of a set.

    classes: in id order. shards: (split, shard), those of a split in order; shards without samples do not count.
    trained: ids of the classes with a usable training image. text: whether samples carry tags. transform: what was
    done to the images.
    """
    classes, shards = tuple(classes), list(shards)
    splits = {}
    for split in SPLITS:
        if members := tuple(shard for its, shard in shards if its == split and shard.samples):
            splits[split] = SplitInfo(sum(shard.samples for shard in members), members)
    reasons: Counter[str] = Counter()
    for entry in left_out:
        reasons[entry.reason] += entry.count
    return Manifest(
        classes=classes,
        splits=splits,
        transform=transform,
        text=text,
        left_out=dict(sorted(reasons.items())),
        tool=f"dist-train {__version__}",
        untrained=tuple(i for i in range(len(classes)) if i not in trained) if trained else (),
    )


def warn_of_classes(folder: Path, manifest: Manifest) -> None:
    """Say what a classifier will not learn from a set: classes without training images, or that there is one class."""
    if untrained := manifest.untrained_classes():
        warn(f"{folder}: {untrained}")
    if len(manifest.classes) == 1:
        warn(f"{folder}: one class alone, '{manifest.classes[0].name}': are its subfolders the classes?")
