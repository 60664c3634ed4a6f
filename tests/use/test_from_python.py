"""`import dist_train`: training and loading from Python, again and again in one process, which stays as it was."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from dist_train.config import DataConfig
from dist_train.train import ranks
from dist_train.train.engine import leave_process_group
from tests.harness import (
    REPOSITORY,
    SMALL,
    environment,
    jpeg_bytes,
    logged_steps,
    newest_weights,
    same,
    write_shard_set,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [24], "val": [4], "test": [6]}
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, baked=20)


@pytest.fixture(autouse=True)
def without_process_group() -> Iterator[None]:
    """Other tests in this process may have left one."""
    if torch.distributed.is_initialized():
        leave_process_group()
    yield


def recipe(shards: Path, run: Path, **more: object) -> dict[str, Any]:
    return {**SMALL, "train.epochs": 1, "data.shards": shards, "train.run": run, **more}


def run_in_python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints that runs the code in the folder."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), check=True, capture_output=True, text=True
    ).stdout


# ---------------------------------------------------------------------- the package
def test_the_import_is_light_and_train_can_be_called_before_and_after_its_package_is_imported(tmp_path: Path) -> None:
    code = """
import sys
import dist_train
print([name for name in ("torch", "numpy", "yaml", "nvidia", "timm", "deepspeed") if name in sys.modules])
before = dist_train.train
def refusal():
    try:
        dist_train.train({"train.epoch": 3})
    except dist_train.UseError as error:
        return str(error)
print(refusal(), "torch" in sys.modules)
import dist_train.train.schedule
from dist_train import train
print(refusal(), dist_train.train is before is train, callable(dist_train.train.schedule.learning_rate))
"""
    said = "the recipe: unknown recipe key 'train.epoch'; here it is train.epochs"
    lines = run_in_python(code, tmp_path).splitlines()
    assert lines == ["[]", f"{said} False", f"{said} True True"]
    assert set(dist_train.__all__) <= set(dir(dist_train))
    assert all(hasattr(dist_train, name) for name in dist_train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        dist_train.fit  # noqa: B018


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [({}, "'3000'"), ({"GOMP_SPINCOUNT": "77"}, "'77'"), ({"OMP_WAIT_POLICY": "passive"}, "'0'")],
)
def test_threads_that_wait_soon_leave_the_core_to_others(set_by_user: dict[str, str], expected: str) -> None:
    """As GNU's OpenMP itself reports it, when PyTorch loads it."""
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        pytest.skip("PyTorch is built with another OpenMP")
    unset = {name: value for name, value in environment().items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    asked = unset | {"OMP_DISPLAY_ENV": "verbose"} | set_by_user
    command = [sys.executable, "-c", "import dist_train.train.engine"]
    said = subprocess.run(command, env=asked, check=True, capture_output=True, text=True).stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = (\S+)", said)) == {expected}


# ---------------------------------------------------------------------- training
def state_of_process(log: logging.Logger) -> tuple[object, ...]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    of_log = list(log.handlers), log.level, log.propagate
    handlers = [signal.getsignal(number) for number in numbers]
    return *of_log, dict(os.environ), torch.nn.functional.linear, sys.excepthook, handlers


def test_runs_follow_each_other_in_one_process_which_stays_as_it_was(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after one that failed, and with DeepSpeed's engine; the same recipe gives the same weights."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # as other tests in this process may have left them
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # nobody's here
    log = logging.getLogger("dist_train")
    mine = logging.NullHandler()
    log.addHandler(mine)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    before = state_of_process(log)
    try:
        first = dist_train.train(recipe(shards, tmp_path / "first"))
        with pytest.raises(dist_train.WorkError, match="loss"):
            dist_train.train(recipe(shards, tmp_path / "failed"), optim={"lr": 1e38, "clip_norm": 0})
        staged = dist_train.train(recipe(shards, tmp_path / "staged"), deepspeed={"zero_stage": 3})
        second = dist_train.train(recipe(shards, tmp_path / "second"))
        assert state_of_process(log) == before
        assert not torch.distributed.is_initialized()
    finally:
        signal.signal(signal.SIGTERM, handler)
        log.removeHandler(mine)
    assert same(newest_weights(first.folder), newest_weights(second.folder))
    assert first.complete and staged.complete and second.complete
    assert first.summary["evaluations"]["test"]["samples"] == 6
    assert [entry["step"] for entry in first.metrics if "split" not in entry] == [1, 2]
    text = (second.folder / "log.txt").read_text()
    assert len(re.findall("step 1/2 ", text)) == 1  # no line twice by a handler of a run before


def test_a_run_that_stopped_goes_on_and_a_thread_can_train(shards: Path, tmp_path: Path) -> None:
    """A notebook's widgets and servers call from threads, which may not ask for signals."""
    runs = [dist_train.train(recipe(shards, tmp_path / "run"), train={"stop_after_steps": 1})]
    assert not runs[0].complete and runs[0].summary == {}
    changed = {"train.stop_after_steps": 0}
    thread = threading.Thread(
        target=lambda: runs.append(dist_train.train(recipe(shards, tmp_path / "run"), resume="auto", **changed))
    )
    thread.start()
    thread.join()
    assert runs[1].complete and [entry["step"] for entry in logged_steps(runs[1].folder)] == [1, 2]


def test_who_asks_the_process_to_end_is_heard_when_the_run_is_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    original = ranks.StopSignal.requested

    def requested(self: ranks.StopSignal, place: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, place)

    monkeypatch.setattr(ranks.StopSignal, "requested", requested)
    try:
        run = dist_train.train(recipe(shards, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and not run.complete and len(logged_steps(run.folder)) == 1
    assert (run.folder / "checkpoints" / "step-00000001").is_dir()


# ---------------------------------------------------------------------- recipes
def test_a_recipe_is_a_file_a_mapping_or_a_recipe_and_what_is_given_beside_it_wins(tmp_path: Path) -> None:
    from dist_train.parse import parse_recipe, recipe_from_python

    file = tmp_path / "recipe.yaml"
    file.write_text("train: {epochs: 3, seed: 5}\noptim: {lr: 1e-3}\nmodel: {freeze: 2}\n")
    by_words, _ = parse_recipe(["--config", str(file), "--train.epochs", "7", "--data.mean", "[0.1, 0.2, 0.3]"])
    changes = {"train.epochs": 7, "data": {"mean": (0.1, 0.2, 0.3)}}
    mapping = {"train": {"epochs": 3, "seed": 5}, "optim.lr": 1e-3, "model.freeze": 2}
    from_file = recipe_from_python(file, changes)
    assert from_file == by_words == recipe_from_python(mapping, changes) == recipe_from_python(str(file), changes)
    assert recipe_from_python(from_file, {}) == by_words
    assert recipe_from_python(from_file, {"train.epochs": 1}).train.epochs == 1 and from_file.train.epochs == 7
    assert recipe_from_python({"data.shards": Path("a"), "model.weights": "none"}, {}).data.shards == "a"
    assert recipe_from_python(None, {}).data == DataConfig()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 3}, r"the call: unknown section 'epochs'; .*train\.epochs"),
        ({"train": 3}, "the call: 'train' is a section, whose keys stand below it, and not 3"),
        ({"train.epochs": "many"}, r"the call: train\.epochs: .*"),
        ({"train.epochs": 0}, r"train\.epochs"),
        ({"train.epochs": 1, "train": {"epochs": 1}}, r"the call: train\.epochs is given twice; keep one"),
        ({"optim.lr": float("nan")}, r"the call: optim\.lr is nan; it must be a finite number"),
        ({"model.backbone": {"name": "x"}}, r"the call: model\.backbone is dict"),
        ({"data.shards": ""}, r"the call: data\.shards is empty"),
    ],
)
def test_what_no_recipe_has_is_refused_with_the_words_of_the_command_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(dist_train.UseError, match=said):
        dist_train.train(None, **given)


# ---------------------------------------------------------------------- models
def test_a_model_predicts_evaluates_and_exports_as_the_commands_do(shards: Path, tmp_path: Path) -> None:
    run = dist_train.train(recipe(shards, tmp_path / "run"))
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg_bytes(number))
    model = run.load()
    assert model.class_names == [f"class {i}" for i in range(4)]
    predictions = model.predict(tmp_path / "photos", top=2)
    assert [one.path for one in predictions] == sorted((tmp_path / "photos").iterdir())
    assert all(len(one.names) == len(one.probabilities) == 2 and one.error is None for one in predictions)
    again = dist_train.load(str(tmp_path / "run"), "last").predict([tmp_path / "photos" / "1.jpg"], top=None)
    assert again[0].names[:2] == predictions[1].names and sum(again[0].probabilities) == pytest.approx(1, abs=1e-5)
    with pytest.raises(dist_train.UseError, match="predict: top must be a number from 1 on, not -1"):
        model.predict(tmp_path / "photos", top=-1)
    assert model.evaluate("test")["top1"] == run.summary["evaluations"]["test"]["top1"]
    assert "weights.safetensors" in model.export(tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").is_file()
    with pytest.raises(dist_train.UseError, match=r"weights\.pth: name a file \.onnx or \.safetensors"):
        model.export(tmp_path / "weights.pth")
    with pytest.raises(dist_train.UseError, match=r"no run here \(no recipe\.yaml\)"):
        dist_train.load(tmp_path)


# ---------------------------------------------------------------------- the page
def test_the_code_of_the_page_runs_from_top_to_bottom(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    sections: dict[str, dict[str, Any]] = {}
    for key, value in recipe(shards, Path("runs/mine")).items():
        sections.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = (
            str(value) if isinstance(value, Path) else value
        )
    (tmp_path / "launch" / "recipes").mkdir(parents=True)
    (tmp_path / "launch" / "recipes" / "mine.yaml").write_text(json.dumps(sections))
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.jpg", "photos/b.jpg", "photo.jpg", "another.png"):
        (tmp_path / name).write_bytes(jpeg_bytes(1))
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "docs/python.md", "exec"), {})
    assert "class " in capsys.readouterr().out and (tmp_path / "runs" / "mine" / "summary.json").is_file()
    assert (tmp_path / "weights.safetensors").is_file()
