"""Batches made off the training thread: made where they should be, errors in their turn, and nothing left behind."""

from __future__ import annotations

import cProfile
import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from dist_train.config import DataConfig
from dist_train.data import background
from dist_train.data.background import Batch, IsStopped, made_ahead
from dist_train.data.cache import ShardCache
from dist_train.data.fetch import FetchedBatch
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.plan import Positions
from dist_train.data.quarantine import Quarantine
from dist_train.errors import WorkError
from dist_train.place import Place
from tests.harness import REPOSITORY, wait_for

MakeSet = Callable[..., Path]


def config_for(root: Path) -> DataConfig:
    return DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=2, streams=2)


def train_loader(root: Path, batch: int = 8, kind: type[TrainLoader] = TrainLoader) -> TrainLoader:
    return kind(config_for(root), read_manifest(root), Place(), batch_size=batch, micro_batch=batch, seed=0)


def batch_of(number: int) -> Batch:
    return Batch(torch.zeros(1), torch.zeros(1), torch.ones(1), None, None, np.array([number]))


OTHERS: set[threading.Thread] = set()
"""Threads that tests of other files have left in this process: what is asked here is whether these tests leave any."""


@pytest.fixture(autouse=True, scope="module")
def note_others_threads() -> None:
    gc.collect()  # those of loaders that nobody holds any more end with them
    OTHERS.update(threads())


def threads() -> list[threading.Thread]:
    """Threads that making batches starts: its own, and those of the pipeline."""
    ours = (one for one in threading.enumerate() if one.name.startswith(("batches", "augment")))
    return [one for one in ours if one not in OTHERS]


def mapped(root: Path) -> bool:
    gc.collect()  # DALI's own objects may stand in cycles
    return str(root) in Path("/proc/self/maps").read_text()


class Recorded(TrainLoader):
    """Remembers which threads prepare and finish batches."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.idents: set[int] = set()

    def _fetch(self, positions: Positions) -> FetchedBatch:
        self.idents.add(threading.get_ident())
        return super()._fetch(positions)

    def _finish(self, *arguments: object) -> Batch:
        self.idents.add(threading.get_ident())
        return super()._finish(*arguments)  # type: ignore[arg-type]


def test_batches_are_made_by_one_thread_that_is_not_the_one_that_takes_them(shard_set: MakeSet) -> None:
    loader = train_loader(shard_set({"train": [30]}), kind=Recorded)
    assert isinstance(loader, Recorded)
    assert len(list(islice(loader, 6))) == 6
    assert len(loader.idents) == 1 and threading.get_ident() not in loader.idents


def test_every_tensor_of_a_gpus_batch_is_kept_until_the_stream_that_uses_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU to ask: which tensors the allocator is told of."""

    class Stream:
        def wait_event(self, event: object) -> None:
            pass

    told: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(tensor))
    tensors = [torch.zeros(1) for _ in range(6)]
    batch = Batch(*tensors[:5], np.array([0]), tensors[5])
    made = cast(torch.cuda.Event, object())
    assert background._Handover(0).receive(batch, made) is batch
    assert {id(tensor) for tensor in told} == {id(tensor) for tensor in tensors}


def test_as_many_batches_are_ready_as_asked_for_and_no_more() -> None:
    made = []

    def make(stopped: IsStopped) -> Iterator[Batch]:
        for number in range(100):
            made.append(number)
            yield batch_of(number)

    batches = made_ahead(make, 3, None)
    assert next(batches).samples == [0]
    wait_for(lambda: len(made) == 5)  # one taken, three ready, one in hand
    assert [int(batch.samples[0]) for batch in islice(batches, 50)] == list(range(1, 51))
    batches.close()
    assert len(made) <= 51 + 3 + 1


def test_an_error_comes_in_its_turn_as_it_was_raised() -> None:
    error = WorkError("a shard cannot be reached")

    def make(stopped: IsStopped) -> Iterator[Batch]:
        yield batch_of(0)
        yield batch_of(1)
        raise error

    batches = made_ahead(make, 4, None)
    assert [int(next(batches).samples[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(WorkError) as raised:
        next(batches)
    assert raised.value is error
    assert not threads()


# ---------------------------------------------------------------------- the end


def closed(batches: Iterator[Batch]) -> None:
    batches.close()  # type: ignore[attr-defined]


def left_by_an_exception(batches: Iterator[Batch]) -> None:
    def use(batches: Iterator[Batch]) -> None:
        for _ in batches:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use(batches)


def forgotten(batches: Iterator[Batch]) -> None:
    pass


@pytest.mark.parametrize("end", [closed, left_by_an_exception, forgotten])
def test_the_thread_and_what_it_holds_go_with_the_iterator(
    shard_set: MakeSet, end: Callable[[Iterator[Batch]], None]
) -> None:
    root = shard_set({"train": [30, 20]})
    batches = iter(train_loader(root))
    next(batches)
    assert threads() and mapped(root)
    end(batches)
    del batches
    wait_for(lambda: not threads() and not mapped(root))


def test_an_evaluation_that_is_over_leaves_no_thread(shard_set: MakeSet) -> None:
    root = shard_set({"val": [9]})
    loader = EvalLoader(config_for(root), read_manifest(root), "val", Place(), batch_size=4)
    for _ in range(2):
        assert [len(batch.labels) for batch in loader] == [4, 4, 1]
        assert not [one for one in threads() if one.name == "batches"]
    del loader  # which keeps its pipeline for one more
    gc.collect()
    wait_for(lambda: not threads())


AT_EXIT = """
import sys
from pathlib import Path
from tests.data.test_background import *
config = config_for(Path(sys.argv[1]))
loader = TrainLoader(config, read_manifest(config.shards), Place(), batch_size=8, micro_batch=8, seed=0,
                     quarantine=Path(sys.argv[2]))
batches = iter(loader)
next(batches)
print("taken", flush=True)
{how}
"""


@pytest.mark.parametrize("how, code", [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1)])
def test_an_interpreter_that_exits_among_batches_ends_at_once_and_blames_no_sample(
    shard_set: MakeSet, tmp_path: Path, how: str, code: int
) -> None:
    record = tmp_path / "quarantine.jsonl"
    command = [sys.executable, "-c", AT_EXIT.format(how=how), str(shard_set({"train": [30]})), str(record)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "taken\n"), done.stderr
    assert not record.exists()
    assert "left out" not in done.stderr and ("Traceback" in done.stderr) == (code == 1)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as it does but where the tests run as a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_gets_through_to_a_thread_that_waits_for_a_batch(ctrl_c: None) -> None:
    def make(stopped: IsStopped) -> Iterator[Batch]:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(stopped)
        yield batch_of(0)

    with pytest.raises(KeyboardInterrupt):
        next(made_ahead(make, 1, None))
    assert not threads()


def test_a_signal_that_is_handled_does_not_lose_the_batch() -> None:
    seen = []

    def make(stopped: IsStopped) -> Iterator[Batch]:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: bool(seen))
        yield batch_of(7)

    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        assert next(made_ahead(make, 1, None)).samples == [7]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_maker_that_does_not_come_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def make(stopped: IsStopped) -> Iterator[Batch]:
        yield batch_of(0)
        released.wait(60)

    monkeypatch.setattr(background, "END_S", 0.01)
    batches = made_ahead(make, 1, None)
    next(batches)
    batches.close()  # returns, though the thread waits
    assert threads()
    released.set()
    wait_for(lambda: not threads())


def test_ctrl_c_ends_the_wait_for_a_shard_that_another_process_downloads(
    ctrl_c: None, shard_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(shard_set({"train": [8, 8]}))
    config = replace(config_for(tmp_path), shards="http://127.0.0.1:9/set", cache=str(tmp_path / "cache"))
    loader = TrainLoader(config, manifest, Place(), batch_size=8, micro_batch=8, seed=0)
    try_open, waited = ShardCache.try_open, []

    def interrupting(*arguments: Any) -> None:
        assert try_open(*arguments) is None
        if threading.current_thread().name == "batches" and not waited:
            waited.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShardCache, "try_open", interrupting)
    with ExitStack() as locked:
        for shard in manifest.split("train").shards:  # as a process has them that downloads
            part = locked.enter_context(open(tmp_path / "cache" / f"{shard.sha256}.part", "wb"))
            fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
        assert not threads()


# ---------------------------------------------------------------------- what a sample costs


def test_a_sample_costs_few_calls_in_python(shard_set: MakeSet) -> None:
    """Calls that a batch of 200 needs beyond those of one of 50, by the sample: no timing, the same on any machine."""
    root = shard_set({"train": [110, 90]}, baked=20)

    def calls(batch: int) -> int:
        making = train_loader(root, batch)._make(lambda: False)
        for _ in range(2 * 200 // batch + 2):  # a sample is looked at when it first comes
            next(making)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(4):
            next(making)
        profile.disable()
        making.close()
        return sum(entry.callcount for entry in profile.getstats()) // 4

    assert (calls(200) - calls(50)) / 150 < 8


def test_ranks_that_meet_a_bad_sample_at_the_same_time_record_it_once(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    for sample in (0, 99):
        Quarantine(file, "train", 1000, 0).add(sample, f"shard:{sample}", 0, "damaged")
    line = file.read_text().splitlines()[1].replace("99", "7")
    with open(file, "a") as other:  # another rank, between its look at the record and its line
        fcntl.flock(other, fcntl.LOCK_EX)
        adding = threading.Thread(target=Quarantine(file, "train", 1000, 1).add, args=(7, "shard:7", 0, "damaged"))
        adding.start()
        adding.join(0.3)
        assert adding.is_alive()
        other.write(line + "\n")
    adding.join(30)
    assert [json.loads(line)["sample"] for line in file.read_text().splitlines()] == [0, 99, 7]
    assert Quarantine(file, "train", 1000, 0).among(np.array([0, 99, 100])).tolist() == [True, True, False]
    assert not Quarantine(file, "val", 1000, 0).among(np.array([0, 99])).any()
