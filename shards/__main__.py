"""The command `python -m shards`: build, adopt, verify, info, demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from dist_train.data.manifest import read_manifest
from dist_train.data.remote import is_url
from dist_train.errors import UseError, run_command
from dist_train.output import keep_stdout, say
from shards.adopt import UNDECODABLE, adopt_tars
from shards.build import build_shard_set
from shards.demo.records import demo_records
from shards.info import describe, summarise
from shards.plan import BuildOptions
from shards.sources import LAYOUTS, read_source
from shards.splits import SPLITS
from shards.verify import fix_indexes, verify_shard_set

_DETECTION = """

Without --format: a .csv file is csv, a .json or .jsonl file danbooru, a .tar file or a folder of nothing but tars
webdataset; DAF and DAFull are known by their lists if only one of their image folders is there, moeimouto and
icartoonface by theirs; any other folder is folders, or sidecar if any KEY.txt lies beside a KEY.jpg. Where a file's
ending does not say whether it is an image, its content does. Every file that is not taken is counted by reason and
listed in left_out.jsonl; OUT, shard sets, hidden folders, __MACOSX and annotations are not read.
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
    options = _options(arguments)
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
        ratios=arguments.ratios,
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
    options = _options(arguments)
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
    manifest = read_manifest(root)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    samples = sum(split.samples for split in manifest.splits.values())
    classes = len(manifest.classes)
    say(f"{arguments.set}: {shards:,} shards, {samples:,} samples, {classes:,} classes, all as the manifest says")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.set)
    say(json.dumps(summarise(manifest), indent=1) if arguments.json else describe(arguments.set, manifest))
    return 0


def _options(arguments: argparse.Namespace) -> BuildOptions:
    """The options that a command has; the others keep their defaults."""
    names = {field.name for field in fields(BuildOptions)}
    return BuildOptions(**{name: value for name, value in vars(arguments).items() if name in names})


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UseError(f"--ratios must be three numbers such as 0.7,0.1,0.2, not '{text}'") from None
    return train, val, test


def _workers(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


# ---- the arguments ---------------------------------------------------------------------------------------------------

_DEFAULTS = BuildOptions()
_SHARED: dict[str, dict[str, Any]] = {
    "--classes": {
        "type": Path,
        "metavar": "FILE",
        "help": "tars with decimal classes: their names by id, one a line (default: the ids)",
    },
    "--shard-mb": {
        "type": float,
        "default": _DEFAULTS.shard_mb,
        "metavar": "MB",
        "help": "largest shard in millions of bytes; small splits get smaller shards, so that there is work for "
        "several processes (default: %(default)s)",
    },
    "--seed": {
        "type": int,
        "default": _DEFAULTS.seed,
        "metavar": "N",
        "help": "seed of the splits, the order and drawn pictures (default: %(default)s)",
    },
    "--workers": {
        "type": _workers,
        "default": len(os.sched_getaffinity(0)),
        "metavar": "N",
        "help": "worker processes (default: the cores of this machine, %(default)s), or ray: the Ray cluster that "
        "RAY_ADDRESS names, whose nodes must all have the project and the folders at the same paths",
    },
}
"""Options of several commands."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shards", description="Make, check and describe shard sets: WebDataset tars with a manifest."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], **texts: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, **texts)
        command.set_defaults(command=run)
        return command

    build = add(
        "build",
        _build,
        help="build a shard set from images, or complete one",
        description="Build the shard set OUT from the images of SOURCE. Every image is decoded once, made an upright "
        "RGB JPEG (what is one already is kept byte for byte), and left out, with the reason in left_out.jsonl, if "
        "that fails. The same command again completes an interrupted build.",
        epilog="NAME of --format:\n" + "\n".join(f"  {name:<14}{lies}" for name, lies in LAYOUTS.items()) + _DETECTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_build_arguments(build)
    _add_shared(build, "--classes", "--shard-mb", "--seed", "--workers")

    adopt = add(
        "adopt",
        _adopt,
        help="make a shard set of tars that are there, without copying them",
        description="Index the tars in FOLDER, as the webdataset library or img2dataset wrote them, and write their "
        "manifest. Each sample needs one image (jpg, jpeg, png, webp) and its class id, decimal, as .cls. Nothing is "
        "written unless all tars are usable.",
    )
    adopt.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the tars; becomes the shard set")
    adopt.add_argument(
        "--split", choices=SPLITS, help="the split of all tars (default: by their names, train-..., val-..., test-...)"
    )
    ratios = "draw the split of each tar, in these shares of all tars"
    adopt.add_argument("--ratios", type=_ratios, metavar="TRAIN,VAL,TEST", help=ratios)
    adopt.add_argument("--no-decode", action="store_true", help="do not decode every image to find those that fail")
    _add_shared(adopt, "--classes", "--seed", "--workers")

    demo = add(
        "demo",
        _demo,
        help="draw the embedded demo data and build a shard set from it",
        description="Draw pictures of made-up characters, with tags, and build the shard set OUT from them.",
    )
    place = "folder of the shard set (default: %(default)s)"
    demo.add_argument("out", type=Path, nargs="?", default=Path("data/demo"), metavar="OUT", help=place)
    demo.add_argument("--characters", type=int, default=40, metavar="N", help="classes (default: %(default)s)")
    demo.add_argument("--pictures", type=int, default=8000, metavar="N", help="images in all (default: %(default)s)")
    demo.add_argument("--size", type=int, default=96, metavar="S", help="side of an image (default: %(default)s)")
    _add_shared(demo, "--shard-mb", "--seed", "--workers")

    verify = add(
        "verify",
        _verify,
        help="check every byte of a shard set",
        description="Compare the shard set SET with its manifest and indexes, and decode every image. Prints one line "
        "per difference and exits 1 if there is any.",
    )
    verify.add_argument("set", metavar="SET", help="folder of the shard set")
    fix_index = "first write missing or wrong .idx and .crc files from their tars"
    verify.add_argument("--fix-index", action="store_true", help=fix_index)
    _add_shared(verify, "--workers")

    description = "Say what is in the shard set SET, by its manifest."
    info = add("info", _info, help="say what is in a shard set", description=description)
    info.add_argument("set", metavar="SET", help="folder or URL of the shard set")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    return parser


def _add_shared(command: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        command.add_argument(name, **_SHARED[name])


def _add_build_arguments(build: argparse.ArgumentParser) -> None:
    add = build.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder or file that holds or lists the images; see --format")
    add("out", type=Path, metavar="OUT", help="folder of the shard set")
    add("--format", choices=list(LAYOUTS), metavar="NAME", help="what SOURCE is, see below (default: found out)")
    add(
        "--root",
        type=Path,
        metavar="DIR",
        help="csv: where the paths start from (default: the CSV's folder); danbooru: the folder of image buckets",
    )
    add("--class-column", metavar="NAME", help="csv: the column that holds the class (default: class)")
    class_key = "webdataset: the class is KEY in a sample's .json (default: its .cls)"
    add("--class-key", metavar="KEY", help=class_key)
    image_ending = "webdataset: the image to take of samples that have several, such as jpg beside mask.png"
    add("--image-ending", metavar="ENDING", help=image_ending)
    add(
        "--split-folders",
        action=argparse.BooleanOptionalAction,
        help="folders: those named as splits (train, val, test) are splits and the others not read, or every folder is "
        "a class (default: found out, refused where in doubt)",
    )
    add("--size", type=int, metavar="S", help="squash images to S x S pixels (default: keep their size)")
    add(
        "--max-side",
        type=int,
        metavar="N",
        help="shrink images so that the longer side has at most N pixels (default: keep their size)",
    )
    add(
        "--min-per-class",
        type=int,
        default=_DEFAULTS.min_per_class,
        metavar="N",
        help="leave out classes with fewer than N images; the paper has 20 (default: %(default)s)",
    )
    add(
        "--ratios",
        type=_ratios,
        default=",".join(map(str, _DEFAULTS.ratios)),
        metavar="TRAIN,VAL,TEST",
        help="how images without a split of their own are divided, within each class (default: %(default)s)",
    )
    add(
        "--quality",
        type=int,
        default=_DEFAULTS.quality,
        metavar="Q",
        help="JPEG quality of images that are encoded again, 1 to 100, 4:2:0 (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
