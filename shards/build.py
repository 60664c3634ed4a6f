"""Records to a shard set: plan, write the shards in parallel, then the list of what was left out and the manifest.

Running the same command again completes an interrupted build. `build.json`, written first, says what is being built;
each finished shard has its statistics beside it until the manifest, written last, replaces them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train.data.manifest import (
    BUILD_NAME,
    LEFT_OUT_NAME,
    MANIFEST_NAME,
    ClassInfo,
    Manifest,
    read_manifest,
    write_manifest,
)
from dist_train.errors import UseError, WorkError, name_some, written
from dist_train.files import write_atomically
from dist_train.output import say
from shards.finish import make_manifest, warn_of_classes, write_left_out
from shards.plan import BuildOptions, Plan, make_plan, too_few
from shards.records import LeftOut, Record, warn
from shards.splits import SPLITS
from shards.workers import run_jobs
from shards.writer import ShardStatistics, drop_classes, read_statistics, statistics_path, write_shard

_LOCK_NAME = ".build.lock"
_SHARDS = tuple(f"{split}-*" for split in SPLITS)
_LEFTOVERS = (  # these alone: other files in the folder are not the builder's
    *(f"{shard}.stats.json" for shard in _SHARDS),
    *(f".{name}.*.tmp" for name in (*_SHARDS, BUILD_NAME, LEFT_OUT_NAME, MANIFEST_NAME)),
)
_RESUME = "run the same command again to resume"


def build_shard_set(records: Iterable[Record | LeftOut], out: Path, options: BuildOptions) -> Manifest:
    """Build the shard set `out`, or complete it; returns its manifest. A set that is complete is left as it is.

    Prints how many shards were there already, and how long the others took.

    Raises UseError if `out` holds something else, or if another build is at work there; WorkError if a shard fails
    again and again, `out` cannot be written to, or no image is usable.
    """
    plan = make_plan(records, options)
    with _locked(out):
        if _claim(out, plan, options):
            say(f"{out}: already complete")
            manifest = read_manifest(out)
        else:
            manifest = _assemble(out, plan, options, _write_shards(out, plan, options))
        warn_of_classes(out, manifest)
        for leftover in [path for pattern in _LEFTOVERS for path in out.glob(pattern)]:
            leftover.unlink()
    return manifest


def _write_shards(out: Path, plan: Plan, options: BuildOptions) -> dict[str, ShardStatistics]:
    """Write the shards that are not there yet; returns the statistics of all, by shard name."""
    finished = {shard.name: there for shard in plan.shards if (there := read_statistics(out, shard.name))}
    missing = [shard for shard in plan.shards if shard.name not in finished]
    if len(missing) < len(plan.shards):
        say(f"{out}: {len(plan.shards) - len(missing)} of {len(plan.shards)} shards are there already")
    start = time.monotonic()
    images = sum(len(shard.samples) for shard in missing)
    jobs = {shard.name: (out, shard, plan.text, options) for shard in missing}
    finished.update(run_jobs(write_shard, jobs, options.workers, images, "build"))
    seconds = time.monotonic() - start
    say(f"{out}: {images:,} images in {seconds:.1f} s, {images / max(seconds, 1e-9):,.0f} images/s")
    return finished


def _assemble(out: Path, plan: Plan, options: BuildOptions, shards: dict[str, ShardStatistics]) -> Manifest:
    """Write the list of left-out images and, last, the manifest. shards: the statistics of each by its name."""
    left_out = [*plan.left_out, *(entry for shard in plan.shards for entry in shards[shard.name].left_out)]
    with written(out, _RESUME):
        write_left_out(out, left_out)  # before there is a reason to end: it says why
    usable = sum((Counter(statistics.class_counts) for statistics in shards.values()), Counter[int]())
    dropped = _drop_small_classes(out, plan, options, shards, usable)
    kept = [number for number in range(len(plan.class_names)) if number not in dropped]
    for shard in plan.shards if dropped else ():
        unusable = {entry.name for entry in shards[shard.name].left_out}
        for record, number in shard.samples:
            if number in dropped and record.name not in unusable:
                detail = f"class {record.class_name}: {usable[number]} usable"
                left_out.append(LeftOut(record.name, too_few(options), detail))
    trained = {number for shard in plan.shards if shard.split == "train" for number in shards[shard.name].class_counts}
    manifest = make_manifest(
        classes=[ClassInfo(plan.class_names[number], usable[number]) for number in kept],
        shards=[(shard.split, shards[shard.name].shard) for shard in plan.shards],
        left_out=left_out,
        trained={i for i, number in enumerate(kept) if number in trained},
        text=plan.text,
        transform=options.transform,
    )
    with written(out, _RESUME):
        if dropped:
            write_left_out(out, left_out)
        write_manifest(out, manifest)
    return manifest


def _drop_small_classes(
    out: Path, plan: Plan, options: BuildOptions, shards: dict[str, ShardStatistics], usable: Counter[int]
) -> set[int]:
    """Take classes with too few usable images out of the written shards; `shards` gets the new statistics.

    usable: usable images by class id. Returns the ids of the classes taken out. Raises WorkError if none is left.
    """
    dropped = tuple(number for number in range(len(plan.class_names)) if usable[number] < options.min_per_class)
    if len(dropped) == len(plan.class_names):
        few = f"none of the images is usable; {out / LEFT_OUT_NAME} says why"
        if most := max(usable.values(), default=0):
            few = f"no class has {options.min_per_class} usable images (the largest has {most}); see --min-per-class"
        raise WorkError(f"{out}: {few}")
    jobs = {
        shard.name: (out, shard, plan.text, options, shards[shard.name], dropped)
        for shard in plan.shards
        if shards[shard.name].dropped != dropped
    }
    shards.update(run_jobs(drop_classes, jobs, options.workers, 0, "drop small classes"))
    if dropped:
        names = name_some([f"{plan.class_names[number]} ({usable[number]})" for number in dropped])
        warn(f"{out}: classes with fewer usable images than {options.min_per_class} are left out: {names}")
    return set(dropped)


def _claim(out: Path, plan: Plan, options: BuildOptions) -> bool:
    """Make sure that `out` is empty or holds this very build, and mark it; returns whether the set is complete.

    In an unfinished build the shards whose images have changed since are written again.
    """
    settings = options.settings()
    sizes = plan.sizes()
    claim: dict[str, Any] = {"settings": settings, "fingerprint": plan.fingerprint(), "sizes": sizes}
    complete = (out / MANIFEST_NAME).exists()
    what = "a complete shard set" if complete else "an unfinished build"
    try:
        there = {"sizes": sizes, **json.loads((out / BUILD_NAME).read_bytes())}  # older versions wrote no sizes
        changed = [name for name, its_sizes in sizes.items() if there["sizes"].get(name) != its_sizes]
    except FileNotFoundError:
        if complete or any(out.glob("*.tar")):
            raise UseError(f"{out}: holds shards that this builder did not make; choose another folder") from None
        there, changed = claim, []
    except (ValueError, TypeError, AttributeError):
        raise UseError(f"{out / BUILD_NAME}: no build wrote it; delete {out} or choose another folder") from None
    if {**there, "sizes": sizes} != claim or (complete and changed):
        theirs = there.get("settings", {})
        differences = [
            f"{name} {theirs.get(name)} there, {value} here"
            for name, value in settings.items()
            if theirs.get(name) != value
        ]
        if not differences and there.get("fingerprint") == claim["fingerprint"]:
            differences = [f"images have changed since, for example of {changed[0]}"]
        why = "; ".join(differences) or "the source's images or their sizes, classes, splits or tags"
        raise UseError(f"{out}: holds {what} of something else ({why}); choose another folder, or delete that one")
    for name in changed:
        statistics_path(out, name).unlink(missing_ok=True)
    if not complete:
        with written(out, _RESUME):
            write_atomically(out / BUILD_NAME, (json.dumps(claim, indent=1) + "\n").encode())
    return complete


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder `out`, and keep other builds out of it. The lock ends with this process, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / _LOCK_NAME, "w")
    except OSError as error:
        raise UseError(f"{out}: not a folder that can be written to ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # removed by who had it: others would lock a new file
                raise BlockingIOError
        except BlockingIOError:
            raise UseError(f"{out}: another build is at work in this folder; wait for it or choose another") from None
        except OSError as error:  # such as Lustre's without its option flock
            warn(f"{out}: its file system has no locks ({error.strerror}); let no other build work in this folder")
        try:
            yield
        finally:
            (out / _LOCK_NAME).unlink(missing_ok=True)
