"""The data loaders that ours is measured beside, and the ceilings; each in a module of its own.

A contestant is a function `batches(task) -> Iterator`, endless, a global batch of `task.batch_size` images each time:
decoded, resized to task.size + task.margin square, cropped to task.size, flipped, jittered, normalised to float32 CHW
where it can do that; with `task.usual` cropped by RandomResizedCrop, flipped and normalised, as most recipes have it.
`NOTE` says where it does something else, `USUAL_NOTE` where it does with `task.usual`, if that is not the same. Its
`prepare(task)`, if it has one, converts the data once, outside of all measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEAN = STD = 0.5
JITTER = 0.1  # brightness, contrast, saturation and hue
PREPARED = 10  # batches before any that count: two workers with four each, or DALI's queue, and what is under way


@dataclass(frozen=True)
class Task:
    """What every contestant does: the train split of `shards`, image side and margin in pixels, threads or workers.

    usual: RandomResizedCrop and flip, without jitter.
    """

    shards: str
    size: int
    margin: int
    batch_size: int
    threads: int
    scratch: str
    usual: bool = False

    @property
    def crop_range(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """What RandomResizedCrop takes as scale and ratio: torchvision's, or the one square that the margin leaves."""
        share = (self.size / (self.size + self.margin)) ** 2
        return ((0.08, 1.0), (3 / 4, 4 / 3)) if self.usual else ((share, share), (1.0, 1.0))

    @property
    def tars(self) -> list[Path]:
        """The shards of the train split."""
        from dist_train.data.manifest import read_manifest

        return [Path(self.shards) / shard.file for shard in read_manifest(self.shards).split("train").shards]
