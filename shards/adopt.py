"""Makes a shard set of existing tars, in place: writes indexes and a manifest and copies no image.

Everything is checked before anything is written; the manifest comes last.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dist_train.data.checksums import compute_checksums, write_checksums
from dist_train.data.manifest import BUILD_NAME, MANIFEST_NAME, ClassInfo, Manifest, ShardInfo, write_manifest
from dist_train.data.tarindex import TarSample, index_tar, write_index
from dist_train.errors import UseError, WorkError, name_some, written
from dist_train.output import say
from shards.finish import make_manifest, warn_of_classes, write_left_out
from shards.records import HARMFUL, LeftOut, warn
from shards.sources.tars import read_class_names, splits_in_names, tar_files
from shards.splits import SPLITS, check_ratios, draw_splits
from shards.verify import ShardReport, check_samples, sha256_of
from shards.workers import run_jobs

UNDECODABLE = "in the tar but undecodable"
"""Reason of images that training will meet and set aside: they could not be left out of a tar that is not copied."""

_MOST_NAMELESS_CLASSES = 1_000_000  # a larger id without a name is no class id
_MOST_LINES = 20  # of a tar: where one sample cannot be used, often none can
_REPACK = "`python -m shards build --format webdataset` packs such tars again"


@dataclass(frozen=True)
class TarReport:
    """What was found in one tar. obstacles: a line for each, up to some. samples: classes, and images that do not
    decode. texts: samples with a .txt. joined: it is several archives, one behind the other."""

    shard: ShardInfo
    obstacles: list[str]
    samples: ShardReport
    texts: int
    joined: bool


def adopt_tars(
    folder: Path,
    classes: Path | None = None,
    split: str | None = None,
    ratios: Sequence[float] | None = None,
    seed: int = 0,
    decode: bool = True,
    workers: int | str = 1,
) -> Manifest:
    """Index the tars of `folder` and write its manifest; returns it.

    classes: a file with the class names by id, one a line; else the ids are the names. split: of all tars; ratios:
    train, val and test share of the tars, drawn by `seed`; else the names of the tars hold their splits. decode:
    decode every image; those that fail are listed in left_out.jsonl and stay in their tars.

    Raises UseError if the folder is a set already, cannot be written, has no tars or compressed ones, or the splits are
    not known; WorkError, a line for each obstacle, if a tar cannot be used as it is. Then nothing has been written.
    """
    if not folder.is_dir():
        raise UseError(f"{folder}: no such folder")
    cures = {MANIFEST_NAME: "delete that file to adopt the tars again", BUILD_NAME: "complete that build"}
    for name, cure in cures.items():
        if (folder / name).exists():
            raise UseError(f"{folder}: has a {name} already; {cure}")
    copy = "`python -m shards build` makes a set elsewhere"
    if not os.access(folder, os.W_OK | os.X_OK):  # said before hours of decoding
        raise UseError(f"{folder}: cannot be written, and indexes and manifest are to lie there; {copy}")
    tars = tar_files(folder)
    splits = _splits(tars, split, ratios, seed)
    names = read_class_names(classes) if classes else None

    jobs = {tar.name: (tar, len(names) if names else _MOST_NAMELESS_CLASSES, decode) for tar in tars}
    by_name = dict(run_jobs(inspect_tar, jobs, workers, 0, "adopt"))
    reports = [by_name[tar.name] for tar in tars]
    if obstacles := [line for report in reports for line in report.obstacles]:
        last = f"{folder}: not adopted, nothing was written"
        if any(" images (" in line for line in obstacles):
            last += f"; {_REPACK}, and --image-ending says which of a sample's images to take"
        elif any(": class b'" in line for line in obstacles):
            last += f"; {_REPACK}, and takes names for classes"
        raise WorkError("\n".join([*obstacles, last]))

    counts = sum((report.samples.class_counts for report in reports), Counter[int]())
    samples = counts.total()
    texts = sum(report.texts for report in reports)
    if 0 < texts < samples:
        say(f"{folder}: {samples - texts:,} of {samples:,} samples have no .txt, so the set counts as without text")
    if joined := [report.shard.file for report in reports if report.joined]:
        warn(
            f"{folder}: tars joined into one ({name_some(joined)}); all of it is read here, but the webdataset library "
            "reads the first of them alone"
        )
    for _ in run_jobs(index_in_place, {tar.name: (tar,) for tar in tars}, workers, 0, "index"):
        pass
    left_out = [
        LeftOut(f"{report.shard.file}:{key}", UNDECODABLE, why)
        for report in reports
        for key, why in report.samples.undecodable
    ]
    class_names = names or [str(number) for number in range(max(counts) + 1)]
    trained: Counter[int] = Counter()
    for report, its in zip(reports, splits, strict=True):
        if its == "train":
            trained += report.samples.class_counts - report.samples.undecodable_counts
    manifest = make_manifest(
        classes=[ClassInfo(name, counts[number]) for number, name in enumerate(class_names)],
        shards=[(its, report.shard) for report, its in zip(reports, splits, strict=True)],
        left_out=left_out,
        trained=set(trained),
        text=texts == samples,
    )
    with written(folder, copy):
        write_left_out(folder, left_out)
        write_manifest(folder, manifest)
    warn_of_classes(folder, manifest)
    return manifest


def inspect_tar(tar: Path, classes: int, decode: bool) -> TarReport:
    """Check that the loader can read every sample of a tar; runs in a worker process."""
    obstacles: list[str] = []
    checked, samples, size, sha256 = ShardReport(), [], 0, ""
    try:
        samples = index_tar(tar)
        size = tar.stat().st_size
        with open(tar, "rb") as file:
            if samples and file.read(512)[257:262] != b"ustar":
                obstacles.append(f"{tar}: a tar from before the USTAR format; {_REPACK}")
        sha256 = sha256_of(tar)
        if any(sample.find("cls") for sample in samples):
            checked = check_samples(tar, samples, classes, text=False, decode_images=decode)
            obstacles += checked.differences
        else:
            what = "none of its samples has a .cls" if samples else "holds no samples"
            obstacles.append(f"{tar}: {what}; {_REPACK}, with --class-key for a class in the .json")
        for sample in samples:
            name = sample.key + "".join(sample.members)
            if any(unicodedata.category(c) in HARMFUL for c in name):  # an index is lines of text
                obstacles.append(f"{tar}: sample {sample.key!r} has a name that no index can hold; {_REPACK}")
    except WorkError as error:
        obstacles.append(str(error))
    except OSError as error:
        obstacles.append(f"{tar}: cannot be read ({error.strerror})")
    if len(obstacles) > _MOST_LINES:
        obstacles[_MOST_LINES:] = [f"{tar}: {len(obstacles) - _MOST_LINES:,} lines more of this kind"]
    shard = ShardInfo(tar.name, len(samples), size, sha256)
    texts = sum(sample.find("txt") is not None for sample in samples)
    return TarReport(shard, obstacles, checked, texts, _is_joined(tar, samples))


def index_in_place(tar: Path) -> None:
    """Write the index and the checksums beside a tar; runs in a worker process."""
    samples = index_tar(tar)
    with written(tar.parent, "indexes lie beside their tars"):
        write_index(tar, samples)
        write_checksums(tar, compute_checksums(tar, samples))


def _splits(tars: list[Path], split: str | None, ratios: Sequence[float] | None, seed: int) -> list[str]:
    """The split of each tar."""
    if split is not None and ratios is not None:
        raise UseError("--split and --ratios exclude each other: give one")
    if split is not None:
        return [split] * len(tars)
    if ratios is not None:
        check_ratios(ratios)
        drawn = draw_splits(len(tars), ratios, seed)
        empty = [name for name, ratio in zip(SPLITS, ratios, strict=True) if ratio and name not in drawn]
        if empty:
            raise UseError(f"{len(tars)} tars divided by these --ratios leave none for {' and '.join(empty)}")
        return drawn
    named = splits_in_names(tars)
    if named is None:
        raise UseError(
            f"{tars[0]}: its name does not say which split it is (train-..., val-..., test-...), nor does another; "
            "say so with --split train for all tars, or have them divided with --ratios 0.7,0.1,0.2"
        )
    return named


def _is_joined(tar: Path, samples: list[TarSample]) -> bool:
    """Whether an end-of-archive block lies between the members of a tar."""
    members = sorted(member for sample in samples for member in sample.members.values())
    gaps = []
    for member, following in pairwise(members):
        end = member.offset + -(-member.size // 512) * 512
        if following.offset > end + 512:
            gaps.append(end)
    if not gaps:
        return False
    with open(tar, "rb") as file:
        return any(not any(os.pread(file.fileno(), 512, gap)) for gap in gaps)
