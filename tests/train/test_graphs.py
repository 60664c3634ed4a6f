"""A recorded pass, replayed, trains exactly as the pass itself, with everything that a step may have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import recipe as recipe_module
from dist_train.models.saved import newest_checkpoint, read_averaged_weights, read_weights
from dist_train.train import engine as engine_module
from dist_train.train import graphs
from tests import harness
from tests.harness import IFA, jpeg_bytes, read_metrics, write_shard_set
from tests.train.recording import record

DROPS = {"model.dropout": 0.2, "model.drop_path": 0.2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the pictures are no pictures."""
    return write_shard_set(
        tmp_path_factory.mktemp("sets") / "set",
        {"train": [37, 35], "val": [11]},
        baked=20,
        text=True,
        replace={5: b"not an image", 40: jpeg_bytes(40, 20, 20)[:300]},
    )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs are allowed here and recorded by the CPU's stand-in. Returns a list that gets an entry a recording."""
    recordings: list[int] = []

    def counted(run: Callable[[], Any], device: torch.device) -> Any:
        recordings.append(1)
        return record(run, device)

    for module in (engine_module, recipe_module):
        monkeypatch.setattr(module, "why_no_graphs", lambda *_: "")
    monkeypatch.setattr(engine_module, "compile_parts", lambda model: None)
    monkeypatch.setattr(graphs, "record", counted)
    return recordings


def train(shards: Path, run: Path, mode: str, resume: str = "none", **overrides: object) -> None:
    overrides = {"model.compile": mode, "train.eval_batch_size": 4, **overrides}
    assert harness.train(shards, run, resume, **IFA, **overrides) == 0


def figures(run: Path) -> list[tuple[Any, ...]]:
    return [(line["step"], line.get("split"), line.get("top1"), line["loss"]) for line in read_metrics(run)]


@pytest.mark.parametrize(
    "settings",
    {
        "plain": {},
        "dropout, a ViLT, AdamW, clipping": {
            **DROPS,
            "model.text_tokens": 4,
            "data.tokenizer": "tags",
            "optim.name": "adamw",
            "optim.clip_norm": 0.5,
        },
        "micro-batches": {**DROPS, "train.micro_batch_size": 6},
        "mixing, class weights, smoothing": {
            "data.mixup": 0.4,
            "data.cutmix": 1.0,
            "optim.class_weights": "inverse",
            "optim.label_smoothing": 0.1,
        },
        "tags, mixing, smoothing": {
            "data.labels": "tags",
            "data.mixup": 0.4,
            "optim.positive_weight": 2,
            "optim.label_smoothing": 0.1,
        },
        "frozen layers": {"model.freeze": "3", "optim.layer_decay": 0.5},
        "running statistics": {"model.backbone": "resnet18", "model.head": "cls", "data.image_size": 16},
        "bf16": {"deepspeed.precision": "bf16", "train.micro_batch_size": 12},
    }.items(),
    ids=lambda pair: pair[0],
)
def test_replayed_passes_train_to_the_same_weights(
    shards: Path, tmp_path: Path, recorded: list[int], settings: tuple[str, dict[str, object]]
) -> None:
    """With two bad samples of weight 0, averaged weights and evaluations in between. There is a stop and a resume where
    they might lose most: drawn masks with AdamW's moments, and running statistics.
    """
    runs = ["graphs"]
    options = {"train.ema": 0.9, **settings[1]}
    train(shards, tmp_path / "eager", "none", **options)
    assert not recorded
    train(shards, tmp_path / "graphs", "graphs", **options)
    assert len(recorded) == 1  # evaluation neither uses nor breaks it
    if settings[0].startswith(("dropout", "running statistics")):
        runs.append("stopped")
        train(shards, tmp_path / "stopped", "graphs", **options, **{"train.stop_after_steps": 2})
        train(shards, tmp_path / "stopped", "graphs", "auto", **options)
    expected = newest_checkpoint(tmp_path / "eager")
    for name in runs:
        assert figures(tmp_path / name) == figures(tmp_path / "eager")
        found = newest_checkpoint(tmp_path / name)
        for read in (read_weights, read_averaged_weights):
            for key, tensor in read(expected).items():
                assert torch.equal(read(found)[key], tensor), key
    assert len((tmp_path / "graphs" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_a_step_that_is_skipped_leaves_nothing_behind(
    shards: Path, tmp_path: Path, recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train.train import step as step_module

    whole = step_module.mix_neighbours

    def poisoned(config: Any, batch: Any, seed: int, step: int, position: int) -> Any:
        if step == 3:
            batch.images[0] = float("nan")
        return whole(config, batch, seed, step, position)

    monkeypatch.setattr(step_module, "mix_neighbours", poisoned)
    for mode in ("none", "graphs"):
        train(shards, tmp_path / mode, mode, **{"train.skip_bad_steps": 1})
    assert recorded and figures(tmp_path / "graphs") == figures(tmp_path / "none")
    assert (tmp_path / "graphs" / "bad_batch.json").exists()
    weights = [read_weights(newest_checkpoint(tmp_path / mode)) for mode in ("none", "graphs")]
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())


def test_an_evaluations_short_last_batch_compiles_nothing_anew(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Val has 11 samples, 4 in a pass; backbone and head are compiled once for training, once for evaluation."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="eager", **how))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    train(shards, tmp_path / "run", "kernels")
    assert counters["stats"]["unique_graphs"] == 4
    train(shards, tmp_path / "plain", "none")
    assert figures(tmp_path / "run") == figures(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "model.compile graphs needs a GPU"),
        (["--deepspeed.zero_stage=1"], "does not go with DeepSpeed's engine"),
        (["--deepspeed.precision=fp16"], "does not go with DeepSpeed's engine"),
        (["--model.checkpoint_blocks=true"], "does not go with model.checkpoint_blocks"),
        (["ranks"], "is for one GPU, not 2"),
    ],
)
def test_where_there_can_be_no_graph_it_is_refused_in_one_line_and_auto_takes_less(
    options: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train.errors import UseError
    from dist_train.recipe import check_combination
    from dist_train.train.engine import compile_mode
    from tests.train.deepspeed_worker import recipe_of

    ranks = 2 if options == ["ranks"] else 1
    options = [option for option in options if option != "ranks"]
    device = torch.device("cuda" if line != "model.compile graphs needs a GPU" else "cpu")
    with pytest.raises(UseError) as error:
        check_combination(recipe_of(Path(), [*options, "--model.compile=graphs"]), device.type, ranks)
    assert line in str(error.value) and "\n" not in str(error.value)
    mode = compile_mode(recipe_of(Path(), options), device, ranks)
    assert mode == ("none" if device.type == "cpu" else "kernels")


def test_on_one_gpu_auto_is_graphs_and_with_zero_3_nothing_is_compiled() -> None:
    from dist_train.train.engine import compile_mode
    from tests.train.deepspeed_worker import recipe_of

    gpu = torch.device("cuda")
    assert compile_mode(recipe_of(Path(), []), gpu, 1) == "graphs"
    assert compile_mode(recipe_of(Path(), ["--deepspeed.zero_stage=3"]), gpu, 1) == "none"
    assert compile_mode(recipe_of(Path(), ["--model.compile=none"]), gpu, 1) == "none"
    assert compile_mode(recipe_of(Path(), []), torch.device("cpu"), 1) == "none"


def test_a_batch_of_another_shape_is_an_error_not_a_broadcast() -> None:
    target, source = torch.zeros(4), torch.zeros(1)
    from dist_train.train.mixing import Mix

    with pytest.raises(ValueError, match="share of a recorded pass is"):
        graphs._copy(Mix(target, target.clone()), Mix(target, source))
