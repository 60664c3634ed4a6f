"""What TensorBoard shows of a run beside its curves, each once however often the run was stopped and resumed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.parse import recipe_from_run
from dist_train.place import Place
from dist_train.train.record import RunRecord
from tests import harness
from tests.harness import CLASSES, write_shard_set


def read_board(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    return board


def pictures(board: EventAccumulator) -> dict[str, list[tuple[int, Image.Image]]]:
    """{name: [(step, picture)]}"""
    return {
        tag: [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in board.Images(tag)]
        for tag in board.Tags()["images"]
    }


def hyperparameters(board: EventAccumulator) -> dict[str, Any]:
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.string_value or value.number_value for name, value in found.items()}


def test_settings_first_images_and_confusion_stand_on_the_board_once(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [24], "val": [7], "test": [8]}, baked=20)
    run, options = tmp_path / "run", {"optim__lr": 0.05, "optim__betas": "[0.8, 0.9]"}
    for stop in (1, 3, 0):
        assert harness.train(shards, run, resume="auto", train__stop_after_steps=stop, **options) == 0
    board = read_board(run)
    found = pictures(board)
    assert {name: [step for step, _ in shown] for name, shown in found.items()} == {
        "train/first_batch": [1],
        "val/confusion": [4],
        "test/confusion": [4],
    }
    settings = hyperparameters(board)
    assert settings["optim.lr"] == 0.05 and settings["model.backbone"] == "vit_tiny_patch8"
    assert settings["optim.betas"] == "(0.8, 0.9)" or settings["optim.betas"] == "[0.8, 0.9]"
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    # The first tile is the first sample as the loader augments it.
    recipe = recipe_from_run(run)
    loader = TrainLoader(recipe.data, read_manifest(str(shards)), Place(), batch_size=12, micro_batch=12, seed=0)
    batch = next(iter(loader))
    sheet = np.asarray(found["train/first_batch"][0][1])
    for i in (0, 11):
        wanted = (batch.images[i].permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255
        y, x = divmod(i, 8)
        tile = sheet[y * 147 : y * 147 + 128, x * 128 : x * 128 + 128]
        assert np.abs(tile[4::8, 4::8].astype(float) - wanted).mean() < 12


def test_what_a_start_left_that_made_no_checkpoint_is_not_on_the_board(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [12], "val": [4]}, baked=20)
    run = tmp_path / "run"
    assert harness.train(shards, run, train__epochs=1) == 0
    recipe = recipe_from_run(run)
    batch = next(
        iter(TrainLoader(recipe.data, read_manifest(str(shards)), Place(), batch_size=12, micro_batch=12, seed=0))
    )
    names = [f"class {i}" for i in range(CLASSES)]
    for rate in (0.1, 0.2):
        recipe.optim.lr = rate
        with RunRecord(run, recipe, 0, resumed_step=0) as record:
            record.first_batch(batch, recipe.data, names)
            figures = {"split": "val", "step": 1, "top1": 0.5, "top5": 1.0, "loss": 1.0, "samples": 4, "bad_samples": 0}
            for _ in range(2):
                record.evaluation(figures, torch.eye(CLASSES, dtype=torch.int64), names)
                record._evaluated.add(("val", 1))
    board = read_board(run)
    assert {name: len(shown) for name, shown in pictures(board).items()} == {"train/first_batch": 1, "val/confusion": 1}
    assert hyperparameters(board)["optim.lr"] == 0.2
