"""The noise benchmark: what it calls true is so, and a small one ends with its row."""

import json
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from benchmarks.__main__ import main
from benchmarks.claims.noise import true_scales
from dist_train.models.names import VIT_SIZES
from tests.harness import arguments, write_shard_set
from tests.train.deepspeed_worker import CLASSES, NARROW, recipe_of, start


def test_true_scales_are_those_of_all_samples_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)
    model, _ = start(recipe_of(Path(), ["--model.head=cls", "--model.head_init=default"]))
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % CLASSES
    found = true_scales(model, images, labels)
    model.double()

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), (None, 0, 0))(parameters, images.double(), labels)
    norms = [name for name in parameters if ".norm" in name]
    for kind, names in {"noise_scale": list(parameters), "noise_scale_norms": norms}.items():
        flat = torch.cat([gradients[name].flatten(1) for name in names], dim=1)
        trace = float(flat.var(dim=0, correction=1).sum())
        assert found[kind] == pytest.approx(trace / (float(flat.mean(dim=0).square().sum()) - trace / 6), rel=1e-9)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--stages=0,7", "--stages: no ZeRO stage '7'; there are 0, 1, 2, 3"),
        ("--samples=0", "--samples 0: must be a multiple of train.batch_size 12"),
        ("--accumulations=1,5", "--accumulations 5: must divide train.batch_size 12"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(
    more: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path / "no set", tmp_path / "run")
    assert main(["noise", "--name=small", "--samples=12", more, *words]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_small_one_has_the_cost_and_both_scales(tmp_path: Path, results: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [24]}, baked=20)
    words = arguments(shards, tmp_path / "run", model__head="ifa", model__head_init="mean")
    small = ["--samples=12", "--warm=1", "--steps=2", "--accumulations=2", "--stages=0"]
    assert main(["noise", "--name=small", *small, *words]) == 0
    (row,) = json.loads((results / "noise/small.json").read_bytes())["rows"]
    assert row["micro_batch"] == 6
    assert row["measured_ratio"] > 0
    assert {"true_noise_scale", "true_noise_scale_norms", "noise_scale", "every_10_percent"} <= row.keys()
