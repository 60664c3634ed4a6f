"""Which image goes into which shard, decided before anything is decoded.

The plan is a function of the records and the options alone. So shards can be written in any order, by any number of
processes, and an interrupted build only has to write the missing ones.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dist_train.data.draws import permutation
from dist_train.errors import UseError
from shards.records import LeftOut, Record, check_class_names
from shards.splits import SPLITS, check_ratios, draw_splits
from shards.workers import check_workers

# First counter after the seed, so that the two uses of random numbers are independent.
_DRAW_SPLIT, _SHUFFLE = 1, 2

_UNKNOWN_BYTES = 100_000  # an image whose size is not known before it is read
_MEMBER_OVERHEAD = 2_600  # tar headers and padding of an image, its class and its tags
_SHARDS_WANTED = 16  # a split has this many if they do not become smaller than the next constant
_SMALLEST_SHARD = 4_000_000


@dataclass(frozen=True)
class BuildOptions:
    """How a shard set is made.

    size: every image is resized to a square of this side in pixels (None: not). max_side: images are shrunk so that
    the longer side has at most this many pixels (None: not). min_per_class: classes with fewer images are left out.
    shard_mb: largest shard, in millions of bytes, as estimated beforehand. ratios: train, val and test share of the
    images without a split of their own. seed: of the splits and the order. quality: of JPEGs encoded here.
    workers: processes, or "ray" for a Ray cluster; they change nothing in the result.

    Raises UseError on a value that makes no sense.
    """

    size: int | None = None
    max_side: int | None = None
    min_per_class: int = 1
    shard_mb: float = 256.0
    ratios: tuple[float, float, float] = (0.7, 0.1, 0.2)
    seed: int = 0
    quality: int = 92
    workers: int | str = 1

    def __post_init__(self) -> None:
        if self.size is not None and self.max_side is not None:
            raise UseError("--size and --max-side exclude each other: give one")
        for name, low, high in (
            ("size", 1, 65_500),
            ("max_side", 1, 65_500),
            ("min_per_class", 1, None),
            ("shard_mb", 0.001, None),
            ("seed", 0, 2**63 - 1),
            ("quality", 1, 100),
        ):
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UseError(f"--{name.replace('_', '-')} must be {limits}, not {value}")
        check_workers(self.workers)
        check_ratios(self.ratios)

    @property
    def transform(self) -> str | None:
        """What the manifest says was done to the images."""
        if self.size is not None:
            return f"resize {self.size}x{self.size}"
        return None if self.max_side is None else f"longer side at most {self.max_side}"

    def settings(self) -> dict[str, Any]:
        """What decides the set's bytes, as JSON values."""
        settings = asdict(self) | {"ratios": list(self.ratios)}
        del settings["workers"]
        return settings


@dataclass(frozen=True)
class ShardPlan:
    """A planned shard: name without suffix ("train-000000"), split, and (record, class id) of each sample in order."""

    name: str
    split: str
    samples: tuple[tuple[Record, int], ...]


@dataclass(frozen=True)
class Plan:
    """A planned shard set. left_out: what the source left out, and images of rare classes. text: whether samples have
    tags."""

    class_names: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    left_out: tuple[LeftOut, ...]
    text: bool

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every sample's name, class, tags and place."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.text]).encode())
        for shard in self.shards:
            for record, class_id in shard.samples:
                digest.update(json.dumps([shard.name, record.name, class_id, record.tags]).encode())
        return digest.hexdigest()

    def sizes(self) -> dict[str, str]:
        """By shard, 16 hex digits over the bytes that its images' files have now: other content hardly ever has the
        same."""
        sizes = {shard.name: json.dumps([record.size() for record, _ in shard.samples]) for shard in self.shards}
        return {name: hashlib.sha256(its.encode()).hexdigest()[:16] for name, its in sizes.items()}


def make_plan(found: Iterable[Record | LeftOut], options: BuildOptions) -> Plan:
    """Number the classes, draw the splits, shuffle each split and cut it into shards.

    The order in which the records come does not matter. Raises UseError if nothing is left to build, or if a record
    has an unusable class or split.
    """
    found = list(found)
    left_out = [item for item in found if isinstance(item, LeftOut)]
    records = [item for item in found if isinstance(item, Record)]
    ordered = sorted(records, key=lambda r: (r.name, r.class_name, r.split or "", r.tags or ""))
    class_sizes = Counter(record.class_name for record in ordered)
    class_names = _in_id_order([name for name, count in class_sizes.items() if count >= options.min_per_class])
    if not class_names:
        largest = max(class_sizes.values(), default=0)
        raise UseError(f"no class has {options.min_per_class} images (the largest has {largest}); see --min-per-class")
    class_ids = {name: number for number, name in enumerate(class_names)}
    kept = [record for record in ordered if record.class_name in class_ids]

    splits = _splits(kept, options)
    shards: list[ShardPlan] = []
    for number, split in enumerate(SPLITS):
        members = [record for record, its_split in zip(kept, splits, strict=True) if its_split == split]
        shuffled = [members[i] for i in permutation(len(members), options.seed, _SHUFFLE, number)]
        for place, cut in enumerate(_cut(shuffled, options)):
            samples = tuple((record, class_ids[record.class_name]) for record in cut)
            shards.append(ShardPlan(f"{split}-{place:06d}", split, samples))

    left_out += [
        LeftOut(record.name, too_few(options), f"class {record.class_name}: {class_sizes[record.class_name]}")
        for record in ordered
        if record.class_name not in class_ids
    ]
    return Plan(
        tuple(class_names), tuple(shards), tuple(left_out), text=any(record.tags is not None for record in kept)
    )


def too_few(options: BuildOptions) -> str:
    """Reason of the images of classes that have too few."""
    return f"class has fewer than {options.min_per_class} images"


def _in_id_order(names: list[str]) -> list[str]:
    """Class names by id: numerically if all are whole numbers, else by code point."""
    check_class_names(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _splits(records: list[Record], options: BuildOptions) -> list[str]:
    """The split of each record: its own, or one drawn within its class."""
    splits = [record.split or "" for record in records]
    unknown = set(splits) - {"", *SPLITS}
    if unknown:
        raise UseError(f"unknown split '{min(unknown)}'; a shard set has {', '.join(SPLITS)}")
    undecided: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        if not splits[i]:
            undecided.setdefault(record.class_name, []).append(i)
    for class_name, indexes in undecided.items():
        # By name, not by id: a class more or less must not change how the others are split.
        class_key = int.from_bytes(hashlib.sha256(class_name.encode()).digest()[:8], "big") >> 1
        drawn = draw_splits(len(indexes), options.ratios, options.seed, _DRAW_SPLIT, class_key)
        for i, split in zip(indexes, drawn, strict=True):
            splits[i] = split
    return splits


def _cut(records: list[Record], options: BuildOptions) -> list[list[Record]]:
    """Cut a split's records into shards of about equal size.

    They are at most `shard_mb`, and smaller where the split is small, so that it is written and read in parallel.
    """
    sizes = [_estimated_bytes(record, options) for record in records]
    limit = min(options.shard_mb * 1e6, max(_SMALLEST_SHARD, sum(sizes) / _SHARDS_WANTED))
    shards: list[list[Record]] = []
    room = 0.0
    for record, size in zip(records, sizes, strict=True):
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(record)
        room -= size
    return shards


def _estimated_bytes(record: Record, options: BuildOptions) -> float:
    """What a sample will take in a tar, known before it is read."""
    side = options.size or options.max_side
    encoded = 0.45 * side**2 + 1_000 if side else None  # photos at quality 92: 0.44 bytes a pixel at 160x160
    if options.size and encoded:
        return encoded + _MEMBER_OVERHEAD
    on_disk = record.size()
    if on_disk is None:
        on_disk = _UNKNOWN_BYTES
    return min(on_disk, encoded or on_disk) + _MEMBER_OVERHEAD
