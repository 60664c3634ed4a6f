"""What of the gradients' exchange each way to train leaves exposed, between two hosts' worth of network namespaces.

One rank in each (`exchange_point.py`), and between them a cable whose bandwidth is limited so that the exchange of a
step takes as long as its computing. The backward pass, two thirds of that, is what an exchange can hide behind; what
each contestant does not hide shows.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.arguments import numbers
from benchmarks.benchmark import Benchmark
from benchmarks.points import Child
from benchmarks.result import write_result
from benchmarks.speed.link import PATH, inside, joined_namespaces, why_no_namespaces
from benchmarks.tables import Document, having, text_of
from dist_train.errors import UseError, WorkError
from dist_train.ranges import AT_LEAST_1, Range

ADDRESSES = ("10.78.0.1", "10.78.0.2")
# In a namespace: wait for the cable's end, take the address $1, stay.
_BOOT = """
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up && ip address add "$1/24" dev eth0 && ip link set eth0 up && exec sleep infinity
"""


@dataclass(frozen=True)
class Arguments:
    """Steps of two ranks in two network namespaces, whose cable is as slow as makes the exchange of a step take as long
    as its computing: ours beside torch's DDP and DeepSpeed, in turns. Needs root."""

    name: str
    """of the result: benchmarks/results/exchange/NAME.json"""
    backbone: str = "vit_small_patch16"
    """of the model"""
    size: Annotated[int, AT_LEAST_1] = 64
    """side of an image"""
    micro_batch: Annotated[int, AT_LEAST_1] = 16
    """images of a rank in a step"""
    turns: Annotated[int, Range(2)] = 15
    """of all contestants"""
    set: Literal["stages", "buckets", "settings"] = "stages"
    """beside DDP: ours and DeepSpeed's stages; ours with other buckets; ZeRO with other settings"""
    stages: str = "0,1,2,3"
    """ZeRO stages"""


def run(arguments: Arguments) -> Path:
    """Measure the contestants and write the result.

    Raises UseError where there can be no namespaces, WorkError where a rank fails.
    """
    stages = numbers("--stages", arguments.stages, least=0)
    if why := why_no_namespaces("tc"):
        raise UseError(f"benchmarks exchange: {why}")
    point = {"backbone": arguments.backbone, "size": arguments.size, "micro_batch": arguments.micro_batch}
    point |= {"turns": arguments.turns, "set": arguments.set, "stages": stages}
    with joined_namespaces([["bash", "-c", _BOOT, "boot", address] for address in ADDRESSES]) as pids:
        found = _run_ranks(pids, point)
    parameters = {**point, "head": "cls", "optimizer": "sgd", "precision": "float32", "ranks": 2, "threads": 1}
    return write_result("exchange", arguments.name, parameters | found["measured"], found["rows"])


def _run_ranks(pids: list[int], point: dict[str, Any]) -> dict[str, Any]:
    """The answer of rank 0, of one rank in the namespaces of each process."""
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PATH": PATH, "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    function = "benchmarks.speed.exchange_point:measure_rank"
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(Child(function, shared | {"RANK": str(rank)}, within=partial(inside, pid)))
            for rank, pid in enumerate(pids)
        ]
        for child in ranks:
            child.send(point)
        try:
            answers = [child.receive() for child in ranks]
        except (UseError, WorkError) as error:
            raise WorkError(f"a rank of the exchange failed: {error}") from None
    return answers[0]


def headline(document: Document) -> str:
    """Each contestant's step over DDP's, but for those with DeepSpeed's settings varied: the table has them."""
    parts = []
    for row in having(document["rows"], "step_over_ddp", "exposed_share"):
        name = text_of(row.get("contestant"))
        if name not in ("alone", "ddp") and "," not in name.removeprefix("DeepSpeed,"):
            parts.append(f"{name} {row['step_over_ddp']:.3f} ({row['exposed_share']:.2f})")
    return f"Step over DDP's (share of the exchange that is exposed): {', '.join(parts)}" if parts else ""


COLUMNS = [
    ("contestant", "contestant", ""),
    ("turns", "turns", "d"),
    ("step_ms", "step ms", ",.0f"),
    ("step_over_ddp", "step / DDP's", ".3f"),
    ("step_over_ddp_lower_quartile", "lower quartile", ".3f"),
    ("step_over_ddp_upper_quartile", "upper", ".3f"),
    ("exposed_ms", "exposed ms", ",.0f"),
    ("exposed_share", "of the exchange's own time", ".2f"),
    ("sent_mb", "MB sent by a rank", ",.1f"),
    ("bandwidth_mbit", "Mbit/s", ",d"),
]
BENCHMARK = Benchmark(
    "exchange",
    "The gradients' exchange beside torch's DDP, over a slow cable",
    Arguments,
    run,
    COLUMNS,
    headline,
)
