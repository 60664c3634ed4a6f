"""The benchmark `precision`: pairs of the same seed, and a result that only finished runs replace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.claims import precision
from benchmarks.claims.precision import Arguments, run
from benchmarks.result import write_result
from dist_train.config import Recipe, TrainConfig
from dist_train.errors import UseError


def test_each_precision_is_compared_with_the_first_seed_by_seed(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trainings that take no time; a precision that is named twice is trained once."""
    trained: list[str] = []

    def finish(recipes: list[Recipe], *_: Any) -> Iterator[Recipe]:
        for recipe in recipes:
            trained.append(Path(recipe.train.run).name)
            yield recipe

    top1 = {("float32", 0): 0.5, ("float32", 1): 0.7, ("bf16", 0): 0.49, ("bf16", 1): 0.68}
    monkeypatch.setattr(precision, "finish_runs", finish)
    monkeypatch.setattr(precision, "outcome", lambda r: {"top1": top1[r.deepspeed.precision, r.train.seed]})
    asked = Arguments("x", precisions="float32,bf16,float32", seeds=2)
    document = json.loads(run(asked, Recipe(train=TrainConfig(run=str(tmp_path)))).read_bytes())
    assert trained == ["float32-seed0", "bf16-seed0", "float32-seed1", "bf16-seed1"]
    (difference,) = document["differences"]
    assert (difference["precision"], difference["pairs"], difference["points"]) == ("bf16", 2, -1.5)
    assert difference["standard_error"] == 0.5
    assert precision.headline(document) == "bf16 is -1.50 +- 0.50 points from float32"


def test_a_refused_recipe_leaves_the_result_as_it_was(tmp_path: Path, results: Path) -> None:
    base = Recipe(train=TrainConfig(run=str(tmp_path / "runs")))
    before = write_result("precision", "x", {}, [{"precision": "float32", "seed": 0, "top1": 0.5}]).read_bytes()
    other = replace(base, optim=replace(base.optim, lr=0.5))
    (tmp_path / "runs/float32-seed0").mkdir(parents=True)
    recipe = yaml.safe_dump(json.loads(json.dumps(asdict(other))))
    (tmp_path / "runs/float32-seed0/recipe.yaml").write_text(recipe)
    for asked, said in ((Arguments("x"), "holds a run of another recipe"), (Arguments("x", seeds=0), "--seeds: 0 is ")):
        with pytest.raises(UseError, match=said):
            run(asked, base)
    assert (results / "precision/x.json").read_bytes() == before
