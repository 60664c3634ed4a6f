"""What is in a shard set, for people and (as JSON) for programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_train.data.manifest import LEFT_OUT_NAME, Manifest


def summarise(manifest: Manifest) -> dict[str, Any]:
    """The set in JSON values: samples, shards and bytes of each split, classes, imbalance, transform, left out.

    `untrained_classes` counts those without a training image. `imbalance` is the largest class's count over the
    smallest's, None if a class is empty.
    """
    smallest, largest = min(manifest.classes, key=lambda c: c.count), max(manifest.classes, key=lambda c: c.count)
    return {
        "samples": sum(split.samples for split in manifest.splits.values()),
        "splits": {
            name: {
                "samples": split.samples,
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
            }
            for name, split in manifest.splits.items()
        },
        "classes": len(manifest.classes),
        "largest_class": asdict(largest),
        "smallest_class": asdict(smallest),
        "untrained_classes": len(manifest.untrained),
        "imbalance": largest.count / smallest.count if smallest.count else None,
        "transform": manifest.transform,
        "text": manifest.text,
        "left_out": manifest.left_out,
        "tool": manifest.tool,
        "digest": manifest.digest,
    }


def describe(root: str | Path, manifest: Manifest) -> str:
    """The same for a person, over several lines."""
    facts = summarise(manifest)
    lines = [f"{root}: {facts['samples']:,} samples, {facts['classes']:,} classes"]
    for name, split in facts["splits"].items():
        shards = f"{split['shards']:,} shard{'s' if split['shards'] > 1 else ''}"
        lines.append(f"  {name:<6}{split['samples']:>12,} samples{shards:>14}{split['bytes'] / 1e6:>12,.1f} MB")
    largest, smallest = facts["largest_class"], facts["smallest_class"]
    ratio = f", {facts['imbalance']:,.1f} to 1" if facts["imbalance"] else ""
    lines.append(
        f"  classes   largest {largest['count']:,} ({largest['name']}), "
        f"smallest {smallest['count']:,} ({smallest['name']}){ratio}"
    )
    if facts["untrained_classes"]:
        lines.append(f"  untrained {facts['untrained_classes']:,} classes have no training image")
    lines.append(f"  images    {facts['transform'] or 'as in the source'}")
    lines.append(f"  text      {'tags' if facts['text'] else 'none'}")
    if facts["left_out"]:
        lines.append(f"  left out  {sum(facts['left_out'].values()):,} files, see {root}/{LEFT_OUT_NAME}")
        lines += [f"  {count:>12,} {reason}" for reason, count in facts["left_out"].items()]
    lines.append(f"  digest    {facts['digest']}")
    return "\n".join(lines)
