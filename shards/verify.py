"""Compares every byte of a shard set with what its manifest and its indexes say."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.data.checksums import checksums_path, compute_checksums, read_checksums, write_checksums
from dist_train.data.images import BadImage, decode
from dist_train.data.manifest import MANIFEST_NAME, ShardInfo, read_manifest
from dist_train.data.tarindex import TarSample, index_path, index_tar, read_index, write_index
from dist_train.errors import WorkError, written
from shards.processes import count_image
from shards.sources.tars import image_extensions, read_member
from shards.workers import run_jobs

_REBUILD = f"copy it anew, or delete {MANIFEST_NAME} and build the set again"


@dataclass
class ShardReport:
    """What was found in one shard: its samples by class id, each difference from what it should be as one line that
    names the file, (sample, why) of the images that do not decode, and those by class id."""

    class_counts: Counter[int] = field(default_factory=Counter)
    undecodable_counts: Counter[int] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    undecodable: list[tuple[str, str]] = field(default_factory=list)


def verify_shard_set(root: Path, workers: int | str = 1) -> list[str]:
    """Check the shard set `root`; returns its differences from what it should be, one line each, sorted by shard.

    Checked are each shard's presence, size, SHA-256, tar structure, index, checksums (if it has them) and samples, that
    every image decodes, the counts of the manifest, and that no other tar lies in the folder.

    Raises UseError if there is no complete set, WorkError if its manifest is damaged.
    """
    manifest = read_manifest(root)
    shards = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    there = [shard for file, shard in shards.items() if (root / file).is_file()]
    jobs = {shard.file: (root / shard.file, shard, len(manifest.classes), manifest.text) for shard in there}
    images = sum(shard.samples for shard in there)
    reports = dict(run_jobs(verify_shard, jobs, workers, images, "verify"))

    differences = []
    for file in shards:
        differences += reports[file].differences if file in reports else [f"{root / file}: missing; {_REBUILD}"]
    differences += [f"{tar}: not in the manifest" for tar in sorted(root.glob("*.tar")) if tar.name not in shards]
    found = sum((report.class_counts for report in reports.values()), Counter[int]())
    for class_id, info in enumerate(manifest.classes):
        if found[class_id] != info.count:
            differences.append(
                f"{root}: class {class_id} ({info.name}) has {found[class_id]:,} samples, "
                f"{info.count:,} by the manifest"
            )
    return differences


def verify_shard(tar: Path, shard: ShardInfo, classes: int, text: bool) -> ShardReport:
    """Check one tar against its entry in the manifest and its index; runs in a worker process."""
    lines: list[str] = []
    checked = ShardReport()
    try:
        size = tar.stat().st_size
        if size != shard.bytes:
            lines.append(f"{tar}: has {size:,} bytes, {shard.bytes:,} by the manifest")
        sound = sha256_of(tar) == shard.sha256
        if not sound:
            lines.append(f"{tar}: its SHA-256 is not the manifest's; {_REBUILD}")
        samples = index_tar(tar)
        try:
            if not _same_places(read_index(tar), samples):
                lines.append(f"{index_path(tar)}: does not match its tar; write it again with --fix-index")
        except WorkError as error:
            lines.append(str(error))
        if len(samples) != shard.samples:
            lines.append(f"{tar}: has {len(samples):,} samples, {shard.samples:,} by the manifest")
        elif checksums_path(tar).exists():  # sets that were built before there were any have none
            lines += _wrong_checksums(tar, shard, samples, sound)
        checked = check_samples(tar, samples, classes, text)
        lines += checked.differences
        lines += [f"{tar}: sample {key}: its image does not decode ({why})" for key, why in checked.undecodable]
    except WorkError as error:
        lines.append(str(error))
    except OSError as error:
        lines.append(f"{tar}: cannot be read ({error.strerror})")
    return ShardReport(checked.class_counts, differences=lines)


def fix_indexes(root: Path) -> list[Path]:
    """Write the indexes that are missing or differ from their tars, and the checksums that are missing or wrong, of
    tars that are as the manifest says; returns their paths. Tars that cannot be read are left for verify to name.

    Raises UseError if there is no complete set, WorkError if a file cannot be written.
    """
    fixed = []
    for shard in (shard for split in read_manifest(root).splits.values() for shard in split.shards):
        tar = root / shard.file
        try:
            samples = index_tar(tar)
        except WorkError:
            continue
        try:
            right = _same_places(read_index(tar), samples)
        except WorkError:
            right = False
        with written(root, "indexes lie beside their tars"):
            if not right:
                write_index(tar, samples)
                fixed.append(index_path(tar))
            listed, checksums = read_checksums(tar, len(samples), shard.bytes), compute_checksums(tar, samples)
            if (listed is None or listed.tolist() != checksums) and sha256_of(tar) == shard.sha256:
                write_checksums(tar, checksums)
                fixed.append(checksums_path(tar))
    return fixed


def sha256_of(file: Path) -> str:
    """SHA-256 of a file in hex. Raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _wrong_checksums(tar: Path, shard: ShardInfo, samples: list[TarSample], sound: bool) -> list[str]:
    """A line for each sample that is not what the checksums say, or one where these are wrong: of a sound tar's."""
    path = checksums_path(tar)
    listed, checksums = read_checksums(tar, shard.samples, shard.bytes), compute_checksums(tar, samples)
    if listed is None or (sound and listed.tolist() != checksums):
        return [f"{path}: damaged, or of another tar; write it again with --fix-index"]
    pairs = zip(samples, checksums, listed.tolist(), strict=True)
    return [f"{tar}: sample {sample.key}: is not what {path.name} says" for sample, here, by in pairs if here != by]


def _same_places(index: list[TarSample], samples: list[TarSample]) -> bool:
    """Whether an index lists these samples; keys are not compared where the index has none."""
    return len(index) == len(samples) and all(
        listed.members == sample.members and listed.key in ("", sample.key)
        for listed, sample in zip(index, samples, strict=True)
    )


def check_samples(
    tar: Path, samples: list[TarSample], classes: int, text: bool, decode_images: bool = True
) -> ShardReport:
    """Check that each sample has one image, a class id below `classes` and, with `text`, tags. Raises OSError."""
    report = ShardReport()
    with open(tar, "rb") as file:
        seen: set[str] = set()
        for sample in samples:
            place = f"{tar}: sample {sample.key}"
            if sample.key in seen:
                report.differences.append(f"{place}: the key comes twice")
            seen.add(sample.key)

            found = sample.find("cls")
            label = read_member(file, found[1]).strip() if found else None
            class_id = int(label[:40]) if label is not None and label.isdigit() else classes  # as much as is read of it
            if label is None:
                report.differences.append(f"{place}: has no .cls")
            elif class_id >= classes:
                report.differences.append(f"{place}: class {label[:20]!r} is not between 0 and {classes - 1}")
            else:
                report.class_counts[class_id] += 1
            if text and sample.find("txt") is None:
                report.differences.append(f"{place}: has no .txt, but the manifest says that samples have tags")

            images = image_extensions(sample)
            if not images:
                report.differences.append(f"{place}: has 0 images")
            elif len(images) > 1:
                names = ", ".join(f"{sample.key}.{extension}" for extension in images)
                why = ", as a key ends at the first dot" if all("." in extension for extension in images) else ""
                report.differences.append(f"{place}: has {len(images)} images ({names}){why}")
            for extension in images if decode_images else []:
                try:
                    decode(read_member(file, sample.members[extension]))
                except BadImage as error:
                    report.undecodable.append((sample.key, str(error)))
                    report.undecodable_counts[class_id] += 1
            count_image()
    return report
