"""The commands of README.md, in order, and what the walk does with each: run it with small settings, or why not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.conftest import REPOSITORY

SMALL_RUN = "--train.epochs 2 --optim.warmup_steps 1 --train.batch_size 8"
LISTED = ("train-000000.", "manifest.json", "left_out.jsonl", "build.json", "dist_train/")
"""First words of what is indented in the README and no command."""


@dataclass(frozen=True)
class Run:
    """Run the command with `more` appended, later words win; `makes` are the files that it must leave."""

    more: str = ""
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """Do not run it, and why; that its words parse and that what it reads is there is checked all the same."""

    reason: str


SLOW = "takes minutes, or would here beside the others; tests/benchmarks/{} runs it in small"
WALK: dict[str, Run | Skip] = {
    "make demo": Run(
        "PICTURES=400 RECIPE='--train.epochs 1 --optim.warmup_steps 1'",
        ("runs/demo/summary.json", "runs/demo/predictions.png"),
    ),
    "make test": Skip("is what runs this walk"),
    "source .venv/bin/activate": Run(),
    "python -m shards build my_images": Run(makes=("data/mine/manifest.json",)),
    "python -m shards verify": Run(),
    "python -m shards info": Run(),
    "sed": Run(makes=("launch/recipes/mine.yaml",)),
    "dist-train train --config launch/recipes/mine.yaml": Run(SMALL_RUN, ("runs/mine/summary.json",)),
    "deepspeed launch/train.py --config launch/recipes/mine.yaml": Run(SMALL_RUN, ("runs/mine-all-gpus/summary.json",)),
    "dist-train evaluate": Run(makes=("runs/mine/evaluation_test.csv",)),
    "dist-train predict": Run(),
    "dist-train export": Run(makes=("weights.safetensors",)),
    "cp launch/hostfile.example": Run(makes=("hostfile",)),
    "dist-train doctor --hostfile": Skip("asks the hosts node1 and node2; tests/multinode has two"),
    "launch/multinode.sh": Skip("trains on node1 and node2; tests/multinode has two"),
    "python launch/supervise.py -- launch/multinode.sh": Skip("trains on node1 and node2; tests/multinode has two"),
    "python launch/supervise.py -- deepspeed": Skip("the launcher has run above; tests/train/test_staying_alive.py"),
    "deepspeed launch/train.py --config launch/recipes/paper/table6.yaml": Skip("DAF and a ViT-B's weights, days"),
    "dist-train train --config launch/recipes/mine.yaml --data.shards s3:": Skip("a bucket; tests/data/test_remote.py"),
    'pip install -e ".[benchmarks]"': Skip("the environment is there and a test installs nothing"),
    "python -m benchmarks loader": Run(
        "--only ours,timm_loader --rounds 1 --seconds 0.2 --batch 8", ("benchmarks/results/loader/mine.json",)
    ),
    "python -m benchmarks histogram": Run(),
    "python -m benchmarks step": Skip(SLOW.format("test_step_benchmarks.py")),
    "python -m benchmarks batch_size": Skip(SLOW.format("test_sweeps.py")),
    "python -m benchmarks ifa": Skip(SLOW.format("test_step_benchmarks.py")),
    "python -m benchmarks paper": Skip("the paper's data and weights, days; tests/benchmarks/test_sweeps.py"),
    "python -m benchmarks landscape": Skip(SLOW.format("test_landscape.py")),
    "python -m benchmarks study": Skip(SLOW.format("test_sweeps.py")),
    "python -m benchmarks engine": Skip(SLOW.format("test_step_benchmarks.py")),
    "python -m benchmarks exchange": Skip(SLOW.format("test_exchange_benchmark.py")),
    "python -m benchmarks precision": Skip("nine trainings to their end"),
    "python -m benchmarks scale": Run(
        "--samples 100000 --shards 1000 --nodes 4", ("benchmarks/results/scale/mine.json",)
    ),
    "python -m shards demo data/kill": Run(makes=("data/kill/manifest.json",)),
    "python -m benchmarks kill": Skip(SLOW.format("test_kill_study.py")),
    "benchmarks/gpu_suite.sh": Skip("a GPU; tests/benchmarks/test_gpu_suite.py"),
    "python -m benchmarks report": Run(makes=("benchmarks/results.html",)),
    "docker build": Skip("a Docker engine, and gigabytes"),
}
"""By the words that a command begins with; the longest that fits counts."""


def commands() -> list[str]:
    """The README's indented commands, in order, without their comments."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r" {4,}(?! *[-*|])\S", line)]
    return [" ".join(re.sub(r"\s#\s.*", "", line).split()) for line in lines if not line.startswith(LISTED)]


def in_prose() -> list[str]:
    """What stands as a command with arguments between backticks."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    spans = [f"python -m shards {span}" if re.match(r"(build|adopt) ", span) else span for span in spans]
    known = r"(dist-train|python -m (shards|benchmarks)) [a-z]+ [^.]|(sbatch|deepspeed|launch/\S+\.sh) "
    return [span for span in spans if re.match(known, span)]


def what_to_do(command: str) -> Run | Skip | None:
    """The walk's entry for a command; None where it has none."""
    fitting = [words for words in WALK if command.startswith(words)]
    return WALK[max(fitting, key=len)] if fitting else None
