"""The step, IFA and engine benchmarks on small models: rows, memory by an independent account, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import result
from benchmarks.__main__ import main
from benchmarks.speed import ifa_point, memory
from benchmarks.speed.bare import bare_step
from benchmarks.speed.engine_point import SPENDING, TURNED_BACK
from benchmarks.speed.step import measure
from benchmarks.speed.timing import median_ms, ratio, timed_in_turns
from dist_train.cli import parse_recipe
from dist_train.config import recipe_from_dict
from dist_train.train.precision import measured_products


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    return tmp_path


def test_a_point_is_measured_in_each_arm_and_printed(
    shard_set: Callable[..., Path], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shard_set({"train": [40, 30]}, baked=40)
    recipe = (
        "--data.image_size 32 --data.crop_margin 8 --data.threads 1 --model.backbone vit_tiny_patch16 --model.head ifa"
    )
    batch = "--train.batch_size 8 --train.micro_batch_size 4 --data.mean auto --data.std auto"
    arguments = f"step --name small --arms synthetic,loader,end_to_end --warmup 1 --steps 3 {recipe} {batch}"
    assert main([*arguments.split(), "--data.shards", str(shards)]) == 0
    document = json.loads((results / "step/small.json").read_bytes())
    rows = {row["arm"]: row for row in document["rows"]}
    assert set(rows) == {"synthetic", "loader", "end_to_end"}
    lines = capsys.readouterr().out.splitlines()
    for line, (arm, row) in zip(lines, rows.items(), strict=False):
        assert line.startswith(f"{arm}, vit_tiny_patch16 ifa batch 8: ") and f"step_ms {row['step_ms']}" in line
    assert lines[-1] == str(results / "step/small.json")
    for row in rows.values():
        assert row["steps"] == 3 and row["step_ms"] <= row["step_ms_p95"] <= row["step_ms_p99"]
        assert row["images_per_s"] == pytest.approx(8000 / row["step_ms"], rel=0.01)
    assert 0 < rows["end_to_end"]["data_wait_share"] < 1
    # ViT-Ti at 32 px: 12 blocks keep at least their inputs for 4 images of 5 tokens.
    assert rows["synthetic"]["saved_activations_mb"] > 12 * 4 * 5 * 192 * 4 / 1e6
    assert document["parameters"]["recipe"]["train"]["micro_batch_size"] == 4
    recipe = document["parameters"]["recipe"]
    assert recipe["model"]["compile"] == recipe["deepspeed"]["precision"] == "auto"  # and here is what that was
    if not torch.cuda.is_available():
        assert [rows["synthetic"][key] for key in ("compile", "precision")] == ["none", "float32"]


@pytest.mark.parametrize(("pure", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_bare_loop_trains_timms_model_on_what_it_is_given(pure: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    step = bare_step("vit_tiny_patch16_224", {"img_size": 32}, 8, images, labels, pure=pure)
    held = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    weights = held["optimizer"].param_groups[0]["params"]
    assert {weight.dtype for weight in weights} == {dtype} and len(weights) == 152
    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_contestants_take_turns_and_ratios_are_of_the_same_turn() -> None:
    order: list[tuple[str, int]] = []
    steps = {name: partial(lambda name, number: order.append((name, number)), name) for name in "ab"}
    times = timed_in_turns(steps, turns=2, warmup=1, steps=2, device=torch.device("cpu"))
    assert order == [(name, number) for name in "abba" for number in range(3)]
    assert {name: [len(turn) for turn in turns] for name, turns in times.items()} == {"a": [2, 2], "b": [2, 2]}
    # The machine is ten times as slow in the second turn: the ratio is the same.
    assert ratio([[2.0, 2.2], [20.0, 22.0]], [[1.0, 1.1], [10.0, 11.0]]) == 2
    assert median_ms([[1.0, 3.0], [2.0]]) == 2000


def test_a_recipe_survives_its_way_into_the_measuring_process() -> None:
    recipe, _ = parse_recipe(["--data.mean=[0.1,0.2,0.3]", "--optim.betas=[0.8,0.9]", "--model.head", "ifa"])
    from dataclasses import asdict

    assert recipe_from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_what_cannot_be_measured_is_one_clear_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["step", "--name", "a", "--arms", "real"]) == 2
    assert "no arm 'real'; there are synthetic, loader, end_to_end" in capfd.readouterr().err
    assert main(["step", "--name", "a", "--arms", "loader", "--data.shards", str(tmp_path / "none")]) == 2
    assert "no such shard set" in capfd.readouterr().err
    assert main(["ifa", "--name", "a", "--backbones", "vit_tiny_patch16,resnet18"]) == 2
    assert capfd.readouterr().err.startswith("error: model.head: ifa needs the [CLS] token of every block")


def test_running_out_of_memory_is_a_result() -> None:
    recipe, _ = parse_recipe(["--data.image_size", "4096", "--train.batch_size", "1000000"])  # 200 TB of images
    assert measure(recipe, "synthetic", 0, 1)["out_of_memory"] is True


def test_the_stacked_way_gives_the_same_logits_and_holds_all_tokens(results: Path) -> None:
    point = {"backbone": "vit_tiny_patch16", "text_tokens": 8, "batch": 4, "size": 64, "classes": 11}
    device = torch.device("cpu")
    models = {which: ifa_point.make_model(point, which, device).eval() for which in ("ifa", "stacked")}
    inputs = ifa_point.inputs(point, device)
    inputs[2][:, 5:] = False
    assert torch.allclose(models["ifa"](*inputs), models["stacked"](*inputs), atol=1e-5)
    for precision in ("bf16", "bf16_autocast"):
        exact = models["ifa"](*inputs)
        for which in ("ifa", "stacked"):
            model = ifa_point.make_model(point | {"precision": precision}, which, device).eval()
            with measured_products() as products:
                logits = model(*inputs)
            assert products.shares() == {"bf16": 1.0}
            assert 0 < (logits.float() - exact).abs().max() < 0.1

    assert (
        main("ifa --name small --backbones vit_tiny_patch16 --batch 16 --size 64 --classes 11 --pairs 2".split()) == 0
    )
    rows = {row["head"]: row for row in json.loads((results / "ifa/small.json").read_bytes())["rows"]}
    bdl = 4 * 16 * 192 * 12 / 1e6
    assert rows["cls"]["peak_over_cls_mb"] == 0 and rows["cls"]["time_over_cls"] == 1
    assert rows["ifa"]["parameters_over_cls"] == rows["stacked"]["parameters_over_cls"] == 13
    assert rows["ifa"]["peak_over_cls_mb"] < 3 * bdl + 0.1
    assert rows["stacked"]["peak_over_cls_mb"] > 17 * bdl / 2  # 17 tokens


def test_peak_bytes_is_the_allocators_own_account() -> None:
    def step() -> None:
        large = torch.ones(1000, 1000)
        small = large.sum()
        del large
        torch.ones(500, 1000) + small

    assert 4_000_000 <= memory.peak_bytes(step, torch.device("cpu")) < 4_200_000
    assert memory.peak_bytes(lambda: None, torch.device("cpu")) == 0


def test_the_engine_benchmark_says_where_the_time_goes(results: Path) -> None:
    arguments = "engine --name small --backbone vit_tiny_patch16 --size 32 --stages 0,1 --micro-batches 2 --pairs 2"
    assert main([*arguments.split(), "--seconds", "0"]) == 0
    rows = json.loads((results / "engine/small.json").read_bytes())["rows"]
    assert [(row["zero_stage"], row["micro_batch"], row["turns"]) for row in rows] == [(0, 2, 2), (1, 2, 2)]
    assert all(row["bare_ms"] > 0 and 0.2 < row["ours_ratio"] < 20 for row in rows)
    for row in rows:
        phases = [row[f"ours_{phase}_ms_per_million"] for phase in ("forward", "backward", "step")]
        assert len(phases) == 3 and {f"ours_{what}_ms_per_million" for what in SPENDING} <= set(row)
    # DeepSpeed's own configuration of ZeRO copies all gradients and parameters at every step.
    assert rows[1]["default_copies_ms_per_million"] > rows[0]["ours_copies_ms_per_million"]

    assert main([*arguments.replace("0,1", "1").split(), "--seconds", "0", "--arm", "settings"]) == 0
    rows = json.loads((results / "engine/small.json").read_bytes())["rows"]
    assert [row["turned_back"] for row in rows] == list(TURNED_BACK)
    assert all(row["it_ratio"] > 0 and row["ours_ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_the_host_arm_measures_whole_steps_of_every_stage(results: Path) -> None:
    assert main("engine --arm host --name host --stages 0,3 --pairs 3 --seconds 0".split()) == 0
    rows = json.loads((results / "engine/host.json").read_bytes())["rows"]
    assert [(row["zero_stage"], row["turns"]) for row in rows] == [(0, 3), (3, 3)]
    assert json.loads((results / "engine/host.json").read_bytes())["parameters"]["threads"] == 1
    # A third of a step is what DeepSpeed's engine costs at ZeRO 0; sharding costs several.
    assert rows[0]["ours_ratio"] < rows[1]["ours_ratio"]
