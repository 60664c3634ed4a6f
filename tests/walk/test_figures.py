"""The figures of the README are those of the result files beside them."""

from __future__ import annotations

import json

from tests.conftest import REPOSITORY


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
