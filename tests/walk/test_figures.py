"""The figures of the README are those of the result files beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.claims.histogram import colour_histogram_accuracy
from shards.__main__ import main as shards_main
from tests.conftest import REPOSITORY

GROCERY = (REPOSITORY / "launch" / "recipes" / "grocery.yaml").read_text(encoding="utf-8")
GROCERY_TRAIN = 2640  # photos


def ratios(name: str) -> list[str]:
    """How many times as fast ours is as FFCV, FFCV without jitter, and timm."""
    result = json.loads((REPOSITORY / "benchmarks" / "results" / "loader" / f"{name}.json").read_text())
    rates = {row["loader"]: row["images_per_s"] for row in result["rows"]}
    return [f"{rates['this project'] / rates[peer]:.1f}" for peer in ("FFCV", "FFCV, no jitter", "timm")]


def test_the_readme_has_the_loaders_ratios_of_the_committed_results() -> None:
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    with_jitter, without, timm = ratios("grocery-baked160")
    assert (
        f"{with_jitter} times as fast as in FFCV, {without} times as fast as in FFCV without its jitter, "
        f"{timm} times as fast as in timm" in text
    )
    with_jitter, without, timm = ratios("grocery-256")
    assert f"at 256 px it is {with_jitter}, {without} and {timm} times" in text


def test_the_grocery_recipe_says_how_many_images_it_shows() -> None:
    assert f"# {yaml.safe_load(GROCERY)['train']['epochs'] * GROCERY_TRAIN:,} images" in GROCERY


@pytest.mark.slow
def test_the_grocery_recipe_stands_beside_what_colours_give_on_the_same_samples(
    shared_data: Path, tmp_path: Path
) -> None:
    labels = str(shared_data / "grocery" / "labels.csv")
    assert shards_main(["build", labels, str(tmp_path / "set"), "--class-column=coarse", "--size=96"]) == 0
    accuracy, samples = colour_histogram_accuracy(tmp_path / "set")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert (
        f"histograms has {accuracy:.3f} on the same samples" in GROCERY and f"over all {samples:,} samples" in GROCERY
    )
    assert f"alone give {accuracy:.3f}" in readme
