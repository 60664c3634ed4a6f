"""`dist-train demo`: where a model looks is where its class is, and the page says what `predict` says, offline."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
import yaml

from dist_train.cli import main
from dist_train.config import DataConfig, Recipe, recipe_to_dict
from dist_train.data.loader import Batch
from dist_train.errors import WorkError
from dist_train.parse import recipe_from_run
from dist_train.place import Place
from dist_train.use.look import find_importance, overlay
from dist_train.use.trained import load_trained
from tests import harness
from tests.harness import free_port, smooth_image, write_shard_set
from tests.use.browser import chromium


def batch_of(image: torch.Tensor) -> Batch:
    none = torch.zeros(1, dtype=torch.int64)
    return Batch(image[None], none, torch.ones(1), None, None, none.numpy())


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 5), (7, 7)])
def test_what_decides_is_found_and_nothing_else(row: int, column: int) -> None:
    """Of a model that adds up the pixels of one cell: the cell, and what a window covers together with it."""
    image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 3

    def forward(batch: Batch) -> torch.Tensor:
        signal = batch.images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean(dim=(1, 2, 3))
        return torch.stack([0 * signal, signal], dim=1)

    found = find_importance(forward, batch_of(image), 1)
    assert np.unravel_index(found.argmax(), found.shape) == (row, column)
    near = np.zeros((8, 8), bool)
    near[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
    assert (found[near] > 0.01).all() and np.abs(found[~near]).max() < 1e-6
    # Covered, the cell has the image's mean, and the log-odds are that instead of 3.
    mean = float(image.mean())
    fall = -np.log1p(np.exp(-3.0)) + np.log1p(np.exp(-mean))
    assert found[row, column] == pytest.approx(fall, rel=1e-4)
    against = find_importance(forward, batch_of(image), 0)
    assert against[row, column] < 0  # the other class gains
    red = np.asarray(overlay(np.full((64, 64, 3), 100, np.uint8), found), np.int16)
    strongest = (red[..., 0] - red[..., 1]).argmax()
    y, x = divmod(int(strongest), 480)
    assert abs(y / 60 - row - 0.5) <= 1 and abs(x / 60 - column - 0.5) <= 1


def test_without_gradio_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(Recipe())))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", str(tmp_path / "run")]) == 2
    assert "demo: needs gradio; pip install 'dist-train[page]'" in harness.error_line(capsys.readouterr().err)


def test_beside_a_gpu_images_are_decoded_where_data_device_says_and_go_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU is named, not used."""
    from dist_train.use import page

    asked = []
    monkeypatch.setattr(page, "ImageReader", lambda config, device_id: asked.append(device_id))
    for device in ("cpu", "auto"):
        recipe = Recipe(data=DataConfig(device=device))
        viewer = page.Viewer(SimpleNamespace(recipe=recipe, place=Place(device_id=0)))
        assert viewer._device == torch.device("cuda", 0)
    assert asked == [None, 0]


@pytest.mark.slow
def test_the_page_says_in_a_browser_what_predict_says_and_asks_nobody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slow: starts gradio and Chromium. With SCREENSHOTS=FOLDER it leaves pictures of the page there."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    pytest.importorskip("gradio", reason="the extra `page` is not installed")
    from dist_train.use.page import serve

    shards = write_shard_set(tmp_path / "set", {"train": [24]})
    run = tmp_path / "run <b>"
    assert harness.train(shards, run, train__epochs=2, optim__lr=0.05) == 0
    photo = tmp_path / "photo.png"
    smooth_image(7, 90, 60).save(photo)
    capsys.readouterr()
    assert main(["predict", str(run), str(photo)]) == 0
    probability, name = re.search(r"  (\d\.\d+)  (.+)", capsys.readouterr().out).groups()
    port = free_port()
    trained = load_trained(run, recipe_from_run(run))
    with pytest.raises(WorkError, match="--port 99999: the page cannot be served there"):
        serve(trained, 99_999)
    page = serve(trained, port)
    try:
        with chromium(program, tmp_path / "profile") as browser:
            browser.open(f"http://127.0.0.1:{port}")
            browser.wait_for("document.querySelector('input[type=file]') && 1")
            assert "run <b>" in browser.value("document.body.innerText")
            browser.choose_file("input[type=file]", photo)
            said = browser.wait_for(
                "document.body.innerText.includes('counts for') && document.body.innerText.includes('%') "
                "&& document.body.innerText"
            )
            assert name in said and f"{float(probability):.0%}" in said
            browser.wait_for("[...document.querySelectorAll('img')].filter(i => i.naturalWidth == 480).length")
            take_screenshots(browser)
            assert browser.value("document.documentElement.scrollWidth") <= 390  # of the last size
            outside = {urlparse(url).hostname for url in browser.requested if url.startswith("http")} - {"127.0.0.1"}
            assert outside <= {"localhost"}, outside
    finally:
        page.close()


def take_screenshots(browser: Any) -> None:
    for width in (1280, 390):
        browser.resize(width)
        browser.wait_for(f"window.innerWidth == {width}")
        if folder := os.environ.get("SCREENSHOTS"):
            (Path(folder) / f"page-{width}.png").write_bytes(browser.screenshot())
