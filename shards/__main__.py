"""The command `python -m shards`: build, adopt, verify, info, demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from dist_train.data.manifest import read_manifest
from dist_train.data.remote import is_url
from dist_train.errors import UseError, run_command
from dist_train.output import keep_stdout, say
from shards.adopt import UNDECODABLE, adopt_tars
from shards.build import build_shard_set
from shards.info import describe, summarise
from shards.plan import BuildOptions
from shards.sources import LAYOUTS, read_source
from shards.splits import SPLITS
from shards.verify import fix_indexes, verify_shard_set

_FORMATS = """

Found out: a .csv file; a .json or .jsonl file (danbooru); a .tar file or a folder of nothing but tars (webdataset);
DAF and DAFull by their lists, if only one of their image folders is there; moeimouto and icartoonface by theirs; any
other folder is folders, or sidecar if any KEY.txt lies beside a KEY.jpg. What is an image, its content says where its
ending does not. Every file that is not taken is counted by reason and listed in left_out.jsonl; OUT, shard sets, hidden
folders, __MACOSX and annotations are not read.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (the work failed, the set is damaged) or 2 (wrong use)."""

    def command() -> int:
        parsed = _parser().parse_args(arguments)  # --help goes to standard output: before that is kept for results
        if arguments is None:
            keep_stdout()
        return parsed.command(parsed)

    return run_command(command)


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
    records = read_source(
        arguments.source,
        arguments.format,
        class_column=arguments.class_column,
        root=arguments.root,
        class_key=arguments.class_key,
        class_names=arguments.classes,
        out=arguments.out,
        split_folders=arguments.split_folders,
        image_ending=arguments.image_ending,
    )
    say(describe(arguments.out, build_shard_set(records, arguments.out, options)))
    return 0


def _adopt(arguments: argparse.Namespace) -> int:
    manifest = adopt_tars(
        arguments.folder,
        classes=arguments.classes,
        split=arguments.split,
        ratios=arguments.ratios and _ratios(arguments.ratios),
        seed=arguments.seed,
        decode=not arguments.no_decode,
        workers=arguments.workers,
    )
    say(describe(arguments.folder, manifest))
    if manifest.left_out:
        say(
            f"  training will set the {manifest.left_out[UNDECODABLE]:,} undecodable images aside "
            "(data.max_bad_samples must allow for as many)"
        )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from shards.demo.records import demo_records

    options = BuildOptions(
        size=arguments.size, shard_mb=arguments.shard_mb, seed=arguments.seed, workers=arguments.workers
    )
    records = demo_records(arguments.characters, arguments.pictures, arguments.size, arguments.seed)
    say(describe(arguments.out, build_shard_set(records, arguments.out, options)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if is_url(arguments.set):
        raise UseError(f"{arguments.set}: verify reads folders; copy the set to one first (training checks each shard)")
    root = Path(arguments.set)
    if arguments.fix_index:
        for path in fix_indexes(root):
            say(f"{path}: written again")
    differences = verify_shard_set(root, arguments.workers)
    if differences:
        say("\n".join(differences))
        return 1
    manifest = read_manifest(arguments.set)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    samples = sum(split.samples for split in manifest.splits.values())
    say(
        f"{arguments.set}: {shards:,} shards, {samples:,} samples, {len(manifest.classes):,} classes, "
        "all as the manifest says"
    )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.set)
    say(json.dumps(summarise(manifest), indent=1) if arguments.json else describe(arguments.set, manifest))
    return 0


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UseError(f"--ratios must be three numbers such as 0.7,0.1,0.2, not '{text}'") from None
    return train, val, test


def _workers(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


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
        epilog="What --format can be:\n"
        + "\n".join(f"  {name:<14}{lies}" for name, lies in LAYOUTS.items())
        + _FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder or file that holds or lists the images; see --format"
    )
    build.add_argument("out", type=Path, metavar="OUT", help="folder of the shard set")
    build.add_argument(
        "--format",
        choices=list(LAYOUTS),
        metavar="NAME",
        help="what SOURCE is, one of the list below (default: found out)",
    )
    build.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="csv: where the paths start from (default: the CSV's folder); danbooru: the folder of image buckets",
    )
    build.add_argument("--class-column", metavar="NAME", help="csv: the column that holds the class (default: class)")
    build.add_argument(
        "--class-key", metavar="KEY", help="webdataset: the class is KEY in a sample's .json (default: its .cls)"
    )
    build.add_argument(
        "--image-ending",
        metavar="ENDING",
        help="webdataset: the image to take of samples that have several, such as jpg beside mask.png",
    )
    build.add_argument(
        "--split-folders",
        action=argparse.BooleanOptionalAction,
        help="folders: those named as splits (train, val, test) are splits and the others not read, or every folder is "
        "a class (default: found out, refused where in doubt)",
    )
    build.add_argument("--size", type=int, metavar="S", help="squash images to S x S pixels (default: keep their size)")
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

    adopt = commands.add_parser(
        "adopt",
        help="make a shard set of tars that are there, without copying them",
        description="Index the tars in FOLDER, as the webdataset library or img2dataset wrote them, and write their "
        "manifest. Each sample needs one image (jpg, jpeg, png, webp) and its class id, decimal, as .cls. Nothing is "
        "written unless all tars are usable.",
    )
    adopt.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the tars; becomes the shard set")
    adopt.add_argument(
        "--split", choices=SPLITS, help="the split of all tars (default: by their names, train-..., val-..., test-...)"
    )
    adopt.add_argument(
        "--ratios", metavar="TRAIN,VAL,TEST", help="draw the split of each tar, in these shares of all tars"
    )
    adopt.add_argument("--no-decode", action="store_true", help="do not decode every image to find those that fail")
    adopt.set_defaults(command=_adopt)

    for command in (build, adopt):
        command.add_argument(
            "--classes",
            type=Path,
            metavar="FILE",
            help="tars with decimal classes: their names by id, one a line (default: the ids)",
        )

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
    for command in (build, adopt, demo):
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
    verify.add_argument(
        "--fix-index", action="store_true", help="first write missing or wrong .idx and .crc files from their tars"
    )
    verify.set_defaults(command=_verify)

    info = commands.add_parser(
        "info", help="say what is in a shard set", description="Say what is in the shard set SET, by its manifest."
    )
    info.add_argument("set", metavar="SET", help="folder or URL of the shard set")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    info.set_defaults(command=_info)

    for command in (build, adopt, demo, verify):
        command.add_argument(
            "--workers",
            type=_workers,
            default=cores,
            metavar="N",
            help="worker processes (default: the cores of this machine, %(default)s), or ray: the Ray cluster that "
            "RAY_ADDRESS names, whose nodes must all have the project and the folders at the same paths",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
