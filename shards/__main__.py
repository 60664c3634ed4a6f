"""The command `python -m shards`: build, verify, info, demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from dist_train.data.manifest import read_manifest
from dist_train.data.remote import is_url
from dist_train.errors import UseError, run_command
from shards.build import build_shard_set
from shards.info import describe, summarise
from shards.plan import BuildOptions
from shards.sources import read_source
from shards.verify import fix_indexes, verify_shard_set


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (the work failed, the set is damaged) or 2 (wrong use)."""
    parsed = _parser().parse_args(arguments)
    return run_command(lambda: parsed.command(parsed))


def _build(arguments: argparse.Namespace) -> int:
    options = BuildOptions(
        size=arguments.size,
        max_side=arguments.max_side,
        min_per_class=arguments.min_per_class,
        shard_mb=arguments.shard_mb,
        ratios=_ratios(arguments.ratios),
        seed=arguments.seed,
        quality=arguments.quality,
        workers=arguments.workers,
    )
    records = read_source(arguments.source, arguments.format, arguments.class_column, arguments.root)
    print(describe(arguments.out, build_shard_set(records, arguments.out, options)))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from shards.demo import demo_records

    options = BuildOptions(
        size=arguments.size, shard_mb=arguments.shard_mb, seed=arguments.seed, workers=arguments.workers
    )
    records = demo_records(arguments.characters, arguments.pictures, arguments.size, arguments.seed)
    print(describe(arguments.out, build_shard_set(records, arguments.out, options)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if is_url(arguments.set):
        raise UseError(f"{arguments.set}: verify reads folders; copy the set to one first (training checks each shard)")
    root = Path(arguments.set)
    if arguments.fix_index:
        for path in fix_indexes(root):
            print(f"{path}: written again")
    differences = verify_shard_set(root, arguments.workers)
    if differences:
        print("\n".join(differences))
        return 1
    manifest = read_manifest(arguments.set)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    samples = sum(split.samples for split in manifest.splits.values())
    print(
        f"{arguments.set}: {shards:,} shards, {samples:,} samples, {len(manifest.classes):,} classes, "
        "all as the manifest says"
    )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.set)
    print(json.dumps(summarise(manifest), indent=1) if arguments.json else describe(arguments.set, manifest))
    return 0


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UseError(f"--ratios must be three numbers such as 0.7,0.1,0.2, not '{text}'") from None
    return train, val, test


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shards", description="Make, check and describe shard sets: WebDataset tars with a manifest."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    defaults = BuildOptions()
    cores = len(os.sched_getaffinity(0))

    build = commands.add_parser(
        "build",
        help="build a shard set from images, or complete one",
        description="Build the shard set OUT from the images of SOURCE. Every image is decoded once, made an upright "
        "RGB JPEG (what is one already is kept byte for byte), and left out, with the reason in left_out.jsonl, if "
        "that fails. An interrupted build goes on when the same command runs again.",
    )
    build.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder ROOT/CLASS/*.jpg or "
        "ROOT/{train,val,test}/CLASS/*.jpg, or a CSV file with the header path,class[,split][,tags]",
    )
    build.add_argument("out", type=Path, metavar="OUT", help="folder of the shard set")
    build.add_argument("--format", choices=["folders", "csv"], help="what SOURCE is (default: found out)")
    build.add_argument(
        "--root", type=Path, metavar="DIR", help="where the paths of a CSV start from (default: the CSV's folder)"
    )
    build.add_argument(
        "--class-column", default="class", metavar="NAME", help="the CSV column that holds the class (default: class)"
    )
    build.add_argument("--size", type=int, metavar="S", help="resize images to S x S pixels (default: keep their size)")
    build.add_argument(
        "--max-side",
        type=int,
        metavar="N",
        help="shrink images so that the longer side has at most N pixels (default: keep their size)",
    )
    build.add_argument(
        "--min-per-class",
        type=int,
        default=defaults.min_per_class,
        metavar="N",
        help="leave out classes with fewer than N images; the paper has 20 (default: %(default)s)",
    )
    build.add_argument(
        "--ratios",
        default=",".join(map(str, defaults.ratios)),
        metavar="TRAIN,VAL,TEST",
        help="how images without a split of their own are divided, within each class (default: %(default)s)",
    )
    build.add_argument(
        "--quality",
        type=int,
        default=defaults.quality,
        metavar="Q",
        help="JPEG quality of images that are encoded anew, 1 to 100, 4:2:0 (default: %(default)s)",
    )
    build.set_defaults(command=_build)

    demo = commands.add_parser(
        "demo",
        help="draw the embedded demo data and build a shard set from it",
        description="Draw pictures of made-up characters, with tags, and build the shard set OUT from them.",
    )
    demo.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=Path("data/demo"),
        metavar="OUT",
        help="folder of the shard set (default: %(default)s)",
    )
    demo.add_argument("--characters", type=int, default=40, metavar="N", help="classes (default: %(default)s)")
    demo.add_argument("--pictures", type=int, default=8000, metavar="N", help="images in all (default: %(default)s)")
    demo.add_argument("--size", type=int, default=96, metavar="S", help="side of an image (default: %(default)s)")
    demo.set_defaults(command=_demo)

    for command in (build, demo):
        command.add_argument(
            "--shard-mb",
            type=float,
            default=defaults.shard_mb,
            metavar="MB",
            help="largest shard in millions of bytes; small splits get smaller shards, so that there "
            "is work for several processes (default: %(default)s)",
        )
        command.add_argument(
            "--seed",
            type=int,
            default=defaults.seed,
            metavar="N",
            help="seed of the splits, the order and drawn pictures (default: %(default)s)",
        )

    verify = commands.add_parser(
        "verify",
        help="check every byte of a shard set",
        description="Compare the shard set SET with its manifest and indexes, and decode every image. Prints one line "
        "per difference and exits 1 if there is any.",
    )
    verify.add_argument("set", metavar="SET", help="folder of the shard set")
    verify.add_argument("--fix-index", action="store_true", help="first write wrong .idx files again from their tars")
    verify.set_defaults(command=_verify)

    info = commands.add_parser(
        "info", help="say what is in a shard set", description="Say what is in the shard set SET, by its manifest."
    )
    info.add_argument("set", metavar="SET", help="folder or URL of the shard set")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    info.set_defaults(command=_info)

    for command in (build, demo, verify):
        command.add_argument(
            "--workers",
            type=int,
            default=cores,
            metavar="N",
            help="worker processes (default: the cores of this machine, %(default)s)",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
