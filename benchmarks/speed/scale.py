"""The epoch plan at a size that no machine here holds: time, memory and locality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from benchmarks.benchmark import Benchmark
from benchmarks.points import run_point
from benchmarks.result import write_result
from benchmarks.tables import Document, describe_row, figures, text_of
from dist_train.errors import UseError
from dist_train.output import say
from dist_train.ranges import AT_LEAST_1

NODES_FOLLOWED = 3


@dataclass(frozen=True)
class Arguments:
    """Time, memory and locality of the epoch plan for many samples, shards and nodes, without any."""

    name: str
    """of the result: benchmarks/results/scale/NAME.json"""
    samples: Annotated[int, AT_LEAST_1] = 10**9
    """of the training split"""
    shards: Annotated[int, AT_LEAST_1] = 10**6
    """that hold them"""
    nodes: Annotated[int, AT_LEAST_1] = 1024
    """of the cluster"""
    ranks: Annotated[int, AT_LEAST_1] = 8
    """of a node"""
    batch: Annotated[int, AT_LEAST_1] = 65536
    """global batch size"""


def run(arguments: Arguments) -> Path:
    """Measure the plan, say each row and write the result. Raises UseError for shards or batches without a sample.

    A process of its own for each start: at step 0 and at step 1,000,000, time to the first batch of one rank, time per
    batch and memory beyond that of the interpreter and numpy. Then one epoch of all ranks of some nodes, step by step:
    the shards that each node touches against its share, and how many are in use at once.
    """
    if arguments.samples < max(arguments.shards, arguments.batch):
        raise UseError(
            f"--samples {arguments.samples}: too few for {arguments.shards} shards and --batch {arguments.batch}"
        )
    parameters = {"samples": arguments.samples, "shards": arguments.shards, "nodes": arguments.nodes}
    parameters |= {"ranks_per_node": arguments.ranks, "batch_size": arguments.batch}
    rows = []
    for step in (0, 10**6):
        rows.append(run_point("benchmarks.speed.scale_point:measure_start", parameters | {"step": step}))
    for i in range(NODES_FOLLOWED):
        node = i * (arguments.nodes - 1) // (NODES_FOLLOWED - 1)
        rows.append(run_point("benchmarks.speed.scale_point:follow_node", parameters | {"node": node}))
    for row in rows:
        say(describe_row(row, row["what"]))
    return write_result("scale", arguments.name, parameters, rows)


def headline(document: Document) -> str:
    """The longest wait for a first batch, the most memory, and what a node reads beyond its share."""
    rows = document["rows"]
    first, memory, share = (figures(rows, key) for key in ("first_batch_ms", "memory_mb", "read_over_share"))
    if not first or not memory:
        return ""
    samples = text_of((document.get("parameters") or {}).get("samples"))
    reads = f"; a node reads at most {max(share):.4f} of its share" if share else ""
    return f"{samples} samples: first batch within {max(first):,.0f} ms, {max(memory):,.0f} MB{reads}"


COLUMNS = [
    ("what", "what", ""),
    ("first_batch_ms", "first batch ms", ",.0f"),
    ("batch_ms_median", "batch ms", ".3f"),
    ("batch_ms_highest", "highest", ".1f"),
    ("memory_mb", "memory MB", ",.0f"),
    ("shards_read", "shards read", ",.0f"),
    ("read_over_share", "read / share", ".4f"),
    ("shards_in_use_at_once", "shards in use at once", ",.0f"),
]
BENCHMARK = Benchmark("scale", "The epoch plan at a size that no machine here holds", Arguments, run, COLUMNS, headline)
