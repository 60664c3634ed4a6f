"""`train.micro_batch_size: auto` finds the largest that fits, on all ranks alike, and changes nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.cli import run_training
from dist_train.data.plan import micro_batch_of, micro_batches
from dist_train.errors import UseError
from dist_train.machine import available_memory
from dist_train.parse import parse_recipe, recipe_from_run
from dist_train.recipe import problems
from dist_train.train import micro_batch
from dist_train.train.engine import init_process_group
from dist_train.train.losses import Objective
from dist_train.train.memory import blank_batch, predict_step
from dist_train.train.micro_batch import largest_that_fits, of_micro_batch, steps_fit
from dist_train.train.setup import build_step, initial_model
from tests.harness import CLASSES, arguments, logged_steps, newest_weights, read_summary, same, train
from tests.train.forked_ranks import run_on, train_on


@given(st.sets(st.integers(1, 500), min_size=1), st.integers(0, 600), st.integers(0, 600))
def test_the_largest_that_fits_is_found_from_any_guess(sizes: set[int], most: int, guess: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    found = largest_that_fits(sorted(sizes), fits, guess)
    assert found == max((size for size in sizes if size <= most), default=0)
    assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + 1
    if guess == found:
        assert len(tried) <= 2  # itself, and that the next does not fit


def test_micro_batches_divide_the_share_of_a_rank() -> None:
    assert micro_batches(24, 2) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(24, 2, even=True) == [2, 4, 6, 12]  # of pairs that are mixed
    with pytest.raises(UseError, match="does not divide over 5 ranks"):
        micro_batches(24, 5)
    with pytest.raises(UseError, match="auto is for training"):
        micro_batch_of(24, 2, "auto")


REFUSED = {
    "--model.backbone=resnet18": "resnet18 has batch norms, whose statistics are those of a micro-batch",
    "--train.skip_bad_steps=1": "train.skip_bad_steps needs one micro-batch a step",
    "--data.mixup=0.2 --train.batch_size=9": "which has an odd 9",
    "--model.freeze=backbone --data.feature_cache=cache": "data.feature_cache steps are of the head alone",
}


@pytest.mark.parametrize(("words", "said"), REFUSED.items())
def test_what_the_micro_batch_would_change_is_refused(words: str, said: str) -> None:
    recipe, _ = parse_recipe(["--train.micro_batch_size=auto", *words.split()])
    assert any(said in str(problem) for problem in problems(recipe, 1, "cpu"))


def test_a_process_may_take_what_its_control_groups_have_left(tmp_path: Path) -> None:
    everything = available_memory(tmp_path)  # no groups there
    assert everything > 10_000_000

    def write(folder: str, **files: object) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(f"{text}\n")

    stat = "anon 5\ninactive_file 2000"
    write("proc/self", cgroup="0::/job/step")
    write("sys/fs/cgroup/job/step", memory__max="max", memory__current=9_000, memory__stat=stat)
    assert available_memory(tmp_path) == pytest.approx(everything, rel=0.2)
    write("sys/fs/cgroup/job", memory__max=1_000_000, memory__current=9_000, memory__stat=stat)
    assert available_memory(tmp_path) == 993_000  # files in the page cache make room
    write("proc/self", cgroup="4:memory:/not/shown/here\n0::/")
    names = {"memory__limit_in_bytes": 500_000, "memory__usage_in_bytes": 600_000, "memory__stat": "cache 1"}
    write("sys/fs/cgroup/memory", **names)
    assert available_memory(tmp_path) == 0


# ---------------------------------------------------------------- runs
def _train_within(megabytes: list[float], options: list[str]) -> None:
    """Train where rank i may take that much memory."""
    micro_batch.memory_limit = lambda recipe, place: 1e6 * megabytes[place.rank]  # type: ignore[assignment]
    run_training(options)


def limit_for(options: list[str], ranks: int, size: int) -> float:
    """MB between what micro-batches of `size` take and what the next larger would."""
    recipe = parse_recipe(options)[0]
    sizes = micro_batches(recipe.train.batch_size, ranks)
    one, next_one = size, sizes[sizes.index(size) + 1]
    device = torch.device("cpu")
    needs = [
        predict_step(of_micro_batch(recipe, each), CLASSES, 0, ranks).peak_mb
        + micro_batch.loader_bytes(recipe, each, device) / 1e6
        for each in (one, next_one)
    ]
    assert needs[0] < needs[1]
    return sum(needs) / 2


@pytest.mark.launch
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_a_run_finds_one_number_for_all_ranks_and_trains_as_with_that_number(
    stage: int, shards: Path, tmp_path: Path
) -> None:
    changes: dict[str, object] = {"deepspeed__zero_stage": stage, "train__epochs": 1, "train__batch_size": 24}
    found, given = tmp_path / "found", tmp_path / "given"
    limit = limit_for(arguments(shards, given, **changes), 2, 4)
    options = arguments(shards, found, **changes, train__micro_batch_size="auto")
    run_on(2, tmp_path, _train_within, [limit, 10 * limit], options)
    train_on(2, arguments(shards, given, **changes, train__micro_batch_size=4), tmp_path)
    assert recipe_from_run(found).train.micro_batch_size == read_summary(found)["micro_batch_size"] == 4
    assert same(newest_weights(found), newest_weights(given))
    assert [step["loss"] for step in logged_steps(found)] == [step["loss"] for step in logged_steps(given)]


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_that_goes_on_keeps_its_number_while_it_fits_on_as_many_ranks(shards: Path, tmp_path: Path) -> None:
    # A batch in one piece needs no place for gradients beside its activations: here these are more.
    changes: dict[str, object] = {"model__dropout": 0.1, "train__epochs": 4, "train__batch_size": 96}
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    auto = {"train__micro_batch_size": "auto"}
    four, eight = (limit_for(arguments(shards, run, **changes), 1, size) for size in (4, 8))
    run_on(1, tmp_path, _train_within, [four], arguments(shards, run, **changes, **auto))
    stop = arguments(shards, stopped, **changes, **auto, train__stop_after_steps=2)
    run_on(1, tmp_path, _train_within, [four], stop)
    shutil.copytree(stopped, tmp_path / "elsewhere")
    # More memory: the same masks of dropout, to the bit.
    go_on = [*arguments(shards, stopped, **changes, **auto), "--resume=auto"]
    run_on(1, tmp_path, _train_within, [eight], go_on)
    assert recipe_from_run(stopped).train.micro_batch_size == 4
    assert same(newest_weights(run), newest_weights(stopped))
    # Two ranks, each with a share of its own: a new number.
    go_on = [*arguments(shards, tmp_path / "elsewhere", **changes, **auto), "--resume=auto"]
    run_on(2, tmp_path, _train_within, [1e6, 1e6], go_on)
    assert recipe_from_run(tmp_path / "elsewhere").train.micro_batch_size == 48


@pytest.mark.launch
def test_where_nothing_fits_the_run_says_what_would_help(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for limit, said in ((1e6, "1 MB"), (-4e8, "0 MB")):  # what malloc is left may be more than there is
        monkeypatch.setattr(micro_batch, "memory_limit", lambda recipe, place, limit=limit: limit)
        assert train(shards, tmp_path / "run", train__micro_batch_size="auto") == 1
        assert f"not even 1 of 12 samples at a time fit into the {said}" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---------------------------------------------------------------- by real steps, as on a GPU
def _find_by_steps(options: list[str], stages: list[int], runs_out: str) -> None:
    """Search by steps that run out of memory above 4 samples; then train as if nothing had been tried."""
    place, original = init_process_group(), Objective.__call__

    def objective(self: Objective, logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if len(logits) > 4:
            if runs_out == "forward":
                raise torch.OutOfMemoryError("as a GPU's allocator says")
            # In the middle of the backward pass, where ZeRO's hooks are at work.
            logits.register_hook(_raise)
        return original(self, logits, *rest)

    for stage in stages:
        recipe = parse_recipe([*options, f"--deepspeed.zero_stage={stage}"])[0]
        sizes = micro_batches(recipe.train.batch_size, place.world_size)
        before = _train_a_little(of_micro_batch(recipe, 4), place)
        Objective.__call__ = objective  # type: ignore[method-assign]
        tried: list[int] = []

        def fits(size: int, recipe: object = recipe, tried: list[int] = tried) -> bool:
            tried.append(size)
            return steps_fit(of_micro_batch(recipe, size), place, CLASSES)  # type: ignore[arg-type]

        assert largest_that_fits(sizes, fits, 12) == 4
        assert tried == [12, 6, 3, 4]
        Objective.__call__ = original  # type: ignore[method-assign]
        assert _train_a_little(of_micro_batch(recipe, 4), place) == before


def _raise(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("as a GPU's allocator says")


def _train_a_little(recipe: object, place: object) -> list[float]:
    model, _ = initial_model(recipe, [str(number) for number in range(CLASSES)])  # type: ignore[arg-type]
    step = build_step(model, recipe, place, [1] * CLASSES)  # type: ignore[arg-type]
    batch = blank_batch(recipe, 4, CLASSES, torch.device("cpu"))  # type: ignore[arg-type]
    batch = replace(batch, images=torch.arange(batch.images.numel()).view_as(batch.images) % 17 / 17)
    losses = [float(step(repeat(batch), 0.01, number)) for number in range(3)]
    step.engine.destroy()
    return losses


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize(
    ("stages", "runs_out"), [([0, 3], "backward"), ([1, 2], "backward"), ([0, 1, 2, 3], "forward")]
)
def test_steps_that_run_out_of_memory_leave_nothing_behind(stages: list[int], runs_out: str, tmp_path: Path) -> None:
    options = arguments(tmp_path, tmp_path / "run", train__batch_size=24)
    run_on(2, tmp_path, _find_by_steps, options, stages, runs_out)
