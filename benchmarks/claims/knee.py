"""The batch size beyond which a sample teaches less, measured by branches of one run from the same checkpoint.

As in Merrill et al. 2025, "Critical Batch Size Revisited" (arXiv 2505.23971): a trunk is trained at the smallest batch;
from points of it branch runs of k times that batch, k a power of two, with the rate scaled by one rule and then
constant. Here all branches of a seed see the same samples, and each is compared with the smallest batch of its seed.
With `--rate-factors` every batch tries several rates and counts at its best: a knee at one rule's rates may be that
rule's, not the batch's.
`benchmarks/claims/knee_fit.py` says where the knee is; `knee_run.py` makes the steps.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.arguments import positive_numbers, words
from benchmarks.benchmark import Benchmark
from benchmarks.claims.knee_report import COLUMNS, LOSS, charts, factor_of, headline, knee_of
from benchmarks.claims.runs import comparable, threads_of
from benchmarks.points import Child, gpu_environment
from benchmarks.result import begun_document, write_result
from benchmarks.tables import Document, Row, short_backbone
from dist_train.config import Recipe
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.files import write_atomically
from dist_train.machine import ask_git
from dist_train.output import say
from dist_train.recipe import METRICS_NAME, check
from dist_train.train.schedule import count_steps, learning_rate

Scaling = Literal["auto", "none", "sqrt", "linear"]
Free = SimpleQueue[Child]


@dataclass(frozen=True)
class Arguments:
    """Branch runs of 1, 2, 4, ... times a recipe's train.batch_size from checkpoints of that recipe, and find the batch
    beyond which the loss after the same samples is worse. A setting is added to the result; where it was stopped, the
    same command continues it."""

    name: str
    """of the result: benchmarks/results/knee/NAME.json"""
    setting: str = ""
    """what the recipe is called in the result; by default its backbone, head, optimizer and shard set"""
    largest: int = 256
    """batch of the branches, a power of two times the recipe's train.batch_size"""
    stages: str = "0.2,0.6"
    """shares of the recipe's training at which runs branch, separated by commas"""
    steps: int = 16
    """of the largest batch in a branch; all branches take as many samples"""
    seeds: int = 4
    """of the branches' data order"""
    scaling: Scaling = "auto"
    """of the rate with the batch; auto: the square root for AdamW, linear for SGD"""
    rate_factors: str = "1"
    """multiples of that rate which every batch tries, such as 0.25,0.5,1,2,4; each batch counts at its best"""
    tolerance: float = 0.02
    """share of the smallest batch's loss by which a loss may be higher and count as not worse"""
    jobs: int = 1
    """branches at a time, a GPU each if there are any"""

    def __post_init__(self) -> None:
        """Raise UseError for values that cannot be, before anything is trained."""
        for option, value in (("--steps", self.steps), ("--seeds", self.seeds)):
            if value < 1:
                raise UseError(f"{option}: {value} is not at least 1")
        if not 0 < self.tolerance < math.inf:
            raise UseError(f"--tolerance: {self.tolerance} is not above 0; 0.02 is 2 % of the loss")
        _ = self.shares, self.factors

    @property
    def shares(self) -> list[float]:
        """The stages, ascending."""
        try:
            shares = sorted({float(word) for word in words(self.stages)})
        except ValueError:
            raise UseError(f"--stages: numbers separated by commas are expected, not '{self.stages}'") from None
        if not all(0 < share < 1 for share in shares):
            raise UseError(f"--stages: {self.stages}: each must lie between 0 and 1, such as 0.2,0.6")
        return shares

    @property
    def factors(self) -> list[float]:
        """Of the rates, ascending."""
        return sorted(set(positive_numbers("--rate-factors", self.rate_factors)))


@dataclass(frozen=True)
class Setting:
    """A recipe's branches. steps: of the trunk, by stage. samples: of each branch."""

    label: str
    trunk: Recipe
    batches: list[int]
    steps: dict[float, int]
    rates: dict[float, float]
    """Of the trunk, by stage."""
    samples: int
    scaling: str
    seeds: int
    factors: list[float]
    """Of the branches' rates."""
    threads: int
    """Of each process."""
    digest: str
    """Of the shard set's manifest."""

    @property
    def folder(self) -> Path:
        """Of the trunk's run folder, its checkpoints and the logs."""
        return Path(self.trunk.train.run).parent

    def rate(self, stage: float, batch: int, factor: float) -> float:
        """Of a branch."""
        times = batch / self.batches[0]
        return factor * self.rates[stage] * {"none": 1.0, "sqrt": math.sqrt(times), "linear": times}[self.scaling]

    def point(self, stage: float) -> dict[str, Any]:
        """What a process is asked for at a stage: the trunk itself, and with a branch's numbers the branch."""
        recipe = replace(self.trunk, data=replace(self.trunk.data, threads=self.threads))
        return {"recipe": asdict(recipe), "step": self.steps[stage]}

    @property
    def trained_by(self) -> dict[str, Any]:
        """The trunk's recipe, without where its folder lies, and the shard set, as JSON has it."""
        recipe = comparable(self.trunk) | {"manifest_digest": self.digest}
        del recipe["train"]["run"]
        return json.loads(json.dumps(recipe))

    def describe(self) -> dict[str, Any]:
        """What decides the loss of a branch of a given stage, batch and seed."""
        return {"recipe": self.trained_by, "samples_per_branch": self.samples, "rate_scaling": self.scaling}


def run(arguments: Arguments, base: Recipe) -> Path:
    """Train the trunk from stage to stage, make the branches that are missing, and write the result after each.

    Raises UseError for what cannot be, before anything is trained, and WorkError for branches that failed, after all.
    """
    setting = plan(arguments, base)
    record = Record(setting, arguments)
    say(
        f"{setting.label}: batches {', '.join(map(str, setting.batches))}, {len(setting.steps)} stages, "
        f"{arguments.seeds} seeds, {len(setting.factors)} rates, {setting.samples:,} samples a branch; "
        f"{len(record.missing())} branches to make"
    )
    begin_folder(setting)
    path = record.write()
    with workers(setting, arguments.jobs) as free:
        for stage in setting.steps:
            if not record.missing(stage):
                continue
            record.note_stage(stage, *reach_stage(setting, stage, free))
            for row in make_branches(setting, stage, record.missing(stage), free, arguments.jobs):
                record.rows.append(row)
                path = record.write()
    return path


# ---------------------------------------------------------------------- what there is to do
def plan(asked: Arguments, base: Recipe) -> Setting:
    """The branches that are asked for. Raises UseError where they cannot be."""
    smallest = base.train.batch_size
    doublings = math.log2(asked.largest / smallest) if asked.largest > 0 else -1.0
    if doublings < 1 or not doublings.is_integer():
        raise UseError(
            f"--largest: {asked.largest} is not 2, 4, 8, ... times train.batch_size {smallest}, the smallest batch"
        )
    batches = [smallest * 2**i for i in range(round(doublings) + 1)]
    trunk = replace(base, train=replace(base.train, run=str(Path(base.train.run) / "trunk"), stop_after_steps=0))
    check(trunk, 1, resume="auto")
    manifest = read_manifest(base.data.shards)
    manifest.split("val")
    samples = manifest.split("train").samples
    total = count_steps(base.train.epochs, samples, smallest)
    steps = {stage: round(stage * total) for stage in asked.shares}
    rates = {stage: learning_rate(base.optim, smallest, step, total, samples) for stage, step in steps.items()}
    for stage, step in steps.items():
        if not max(0, base.optim.warmup_steps - 1) < step < total:
            raise UseError(
                f"--stages: {stage:g} is step {step} of {total}; it must lie after optim.warmup_steps "
                f"{base.optim.warmup_steps} and before the end"
            )
    scaling = {"sgd": "linear", "adamw": "sqrt"}[base.optim.name] if asked.scaling == "auto" else asked.scaling
    return Setting(
        asked.setting or describe(base),
        trunk,
        batches,
        steps,
        rates,
        asked.steps * batches[-1],
        scaling,
        asked.seeds,
        asked.factors,
        threads_of(asked.jobs),
        manifest.digest,
    )


def describe(recipe: Recipe) -> str:
    """The name of a setting that was given none."""
    parts = [short_backbone(recipe.model.backbone), recipe.model.head.upper()]
    parts += [{"sgd": "SGD", "adamw": "AdamW"}[recipe.optim.name], Path(recipe.data.shards).name]
    return ", ".join(parts)


class Record:
    """The result on its way: the rows and stages of this setting and of those that were measured before."""

    def __init__(self, setting: Setting, asked: Arguments) -> None:
        self.setting, self.name = setting, asked.name
        document: Document = begun_document("knee", asked.name)
        self.settings: dict[str, Any] = document.get("parameters", {}).get("settings", {})
        self.rows: list[Row] = document.get("rows", [])
        self.stages: list[Row] = document.get("knees", [])
        mine, there = setting.describe(), self.settings.get(setting.label)
        if there is not None and (key := next((key for key in mine if not alike(mine[key], there[key])), None)):
            raise UseError(
                f"--setting: '{setting.label}' was measured with another {key.replace('_', ' ')}; name this one "
                "otherwise, or give the result another --name"
            )
        self.settings[setting.label] = mine | {"tolerance": asked.tolerance}

    def missing(self, only: float | None = None) -> list[tuple[int, int, float]]:
        """(batch, seed, factor) of the branches that have no row, at one stage or at all; a whole seed after the
        other."""
        mine = [row for row in self.rows if row["setting"] == self.setting.label]
        there = {(row["stage"], row["batch"], row["seed"], factor_of(row)) for row in mine}
        wanted = product(self.setting.steps, range(self.setting.seeds), self.setting.batches, self.setting.factors)
        return [
            (batch, seed, factor)
            for stage, seed, batch, factor in wanted
            if (stage, batch, seed, factor) not in there and only in (None, stage)
        ]

    def note_stage(self, stage: float, start_loss: float | None, predicted: Row) -> None:
        """Keep what is known of a stage before its branches."""
        setting = self.setting
        of_others = [one for one in self.stages if (one["setting"], one["stage"]) != (setting.label, stage)]
        step = setting.steps[stage]
        facts = {"setting": setting.label, "stage": stage, "samples": step * setting.batches[0]}
        facts |= {"rate": setting.rates[stage], "start_loss": start_loss}
        self.stages = [*of_others, facts | predicted]

    def write(self) -> Path:
        """The result so far."""
        stages = [knee_of(self.rows, one, self.settings[one["setting"]]["tolerance"]) for one in self.stages]
        return write_result("knee", self.name, {"settings": self.settings}, self.rows, {"knees": stages})


def alike(one: Any, other: Any) -> bool:
    """Whether two descriptions are the same in what both have: a version may know keys that another did not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(alike(one[key], other[key]) for key in one.keys() & other.keys())
    return bool(one == other)


# ---------------------------------------------------------------------- the trunk
def begin_folder(setting: Setting) -> None:
    """Raise UseError where the folder has the trunk of another recipe; else note in it whose it is."""
    note = setting.folder / "knee.json"
    mine = setting.trained_by
    if note.is_file() and not alike(json.loads(note.read_bytes()), mine):
        raise UseError(
            f"{setting.folder}: holds branches of another recipe or set; remove it, or use another train.run"
        )
    setting.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, (json.dumps(mine, indent=1) + "\n").encode())


def reach_stage(setting: Setting, stage: float, free: Free) -> tuple[float | None, Row]:
    """Train the trunk to a stage, unless its checkpoint is there. Returns its loss on val, and `predicted_batch`."""
    step = setting.steps[stage]
    say(f"{setting.label}: training to step {step:,}, {stage:.0%}")
    with taken(free) as child:
        if not child.ask(setting.point(stage)):
            raise WorkError(f"{setting.trunk.train.run}: did not come to step {step}; the same command goes on")
        start = child.ask(setting.point(stage) | {"batch": setting.batches[0], "seed": 0, "rate": 0.0, "samples": 0})
    return start[LOSS], predicted_batch(Path(setting.trunk.train.run), step)


def predicted_batch(run: Path, step: int) -> Row:
    """What the gradient noise scale that the run logged (train.noise_every) predicts for a step, with the ends of its
    interval; predicted_norms: likewise, of the layer norms alone. None where it was not measured or is infinite."""
    lines = map(json.loads, (run / METRICS_NAME).read_text(encoding="utf-8").splitlines())
    logged = [entry for entry in lines if "lr" in entry and entry["step"] <= step]
    last = logged[-1] if logged else {}
    return {f"predicted{which}": last.get(f"noise_scale{which}") for which in ("", "_low", "_high", "_norms")}


# ---------------------------------------------------------------------- the branches
def make_branches(
    setting: Setting, stage: float, wanted: Sequence[tuple[int, int, float]], free: Free, jobs: int
) -> Iterator[Row]:
    """The row of each branch (batch, seed, factor) as it ends, `jobs` at a time.

    Raises WorkError after all others where some failed.
    """

    def branch(batch: int, seed: int, factor: float) -> Row:
        rate = setting.rate(stage, batch, factor)
        asked = {"batch": batch, "seed": seed, "rate": rate, "samples": setting.samples}
        with taken(free) as child:
            started = time.perf_counter()
            measured = child.ask(setting.point(stage) | asked)
            seconds = time.perf_counter() - started
        row = {"setting": setting.label, "stage": stage, "factor": factor} | asked
        row |= {"steps": setting.samples // batch} | measured
        return row | {"seconds": round(seconds, 1), "trained_at": ask_git("rev-parse", "--short", "HEAD") or ""}

    pool = ThreadPoolExecutor(jobs)
    bar = tqdm(total=len(wanted), desc=f"{stage:.0%}", unit="branch", disable=not sys.stderr.isatty())
    failures = []
    try:
        futures = {pool.submit(branch, *one): one for one in wanted}
        for future in as_completed(futures):
            bar.update()
            try:
                row = future.result()
            except WorkError as error:
                failures.append("batch {}, seed {}, rate factor {:g}: {}".format(*futures[future], error))
            else:
                loss = f"loss on val {row[LOSS]:.4f}" if row[LOSS] is not None else "diverged"
                which = f"batch {row['batch']}, seed {row['seed']}, rate {row['rate']:.3g}"
                say(f"{stage:.0%}, {which}: {loss}, {row['seconds']:.0f} s")
                yield row
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    if failures:
        failed = f"{len(failures)} of {len(wanted)} branches failed"
        raise WorkError(f"{failed}; the same command tries them again. {failures[0]}")


@contextmanager
def workers(setting: Setting, jobs: int) -> Iterator[Free]:
    """Processes that wait for work, each with its share of the cores, or with a GPU of its own if there are any."""
    free: Free = SimpleQueue()
    for number in range(jobs):
        environment = {"OMP_NUM_THREADS": str(setting.threads)} | gpu_environment(number)
        log = setting.folder / f"worker-{number}.log"
        free.put(Child("benchmarks.claims.knee_run:work", environment, log=log))
    try:
        yield free
    finally:
        while not free.empty():
            free.get().finish()


@contextmanager
def taken(free: Free) -> Iterator[Child]:
    """A process that nobody else asks meanwhile."""
    child = free.get()
    try:
        yield child
    finally:
        free.put(child)


BENCHMARK = Benchmark(
    "knee", "The batch beyond which a sample teaches less", Arguments, run, COLUMNS, headline, charts, takes_recipe=True
)
