"""A finished run in other programs' formats: what onnxruntime and timm make of it, each without this project."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from dist_train.cli import main
from dist_train.config import DataConfig, ModelConfig
from dist_train.data.reader import ImageReader
from dist_train.errors import UseError
from dist_train.models.build import build_model, to_timm_state_dict
from dist_train.models.saved import newest_checkpoint
from dist_train.use import onnx_file
from dist_train.use.export import check_fits
from tests import harness
from tests.harness import CLASSES, smooth_image, write_shard_set
from tests.use.hub_server import TOKEN, hub

NAMES = [f"class {i}" for i in range(CLASSES)]
PHOTOS = ((7, 61, 43), (8, 20, 20), (9, 11, 90))
"""(picture, width, height)"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [24], "val": [8]}, text=True)


def train(shards: Path, run: Path, **changes: object) -> Path:
    """A run of a few steps, at a rate at which its classifier is far from nothing."""
    options = {"train__epochs": 1, "optim__lr": 0.05, "data__image_size": 16, **changes}
    assert harness.train(shards, run, **options) == 0
    return run


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shards, tmp_path_factory.mktemp("runs") / "cls")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """PNG files, which every decoder reads alike."""
    paths = [tmp_path / f"photo{number}.png" for number, _, _ in PHOTOS]
    for path, (number, width, height) in zip(paths, PHOTOS, strict=True):
        smooth_image(number, width, height).save(path)
    return paths


def predicted(run: Path, photos: list[Path], capsys: Any, *options: str) -> list[dict[str, float]]:
    """{class: probability} of each photo, as `dist-train predict` says."""
    capsys.readouterr()
    assert main(["predict", str(run), *map(str, photos), *options]) == 0
    found: list[dict[str, float]] = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            probability, _, name = line.strip().partition("  ")
            found[-1][name] = float(probability)
        else:
            found.append({})
    return found


def in_a_process_of_its_own(script: str, *arguments: object, **variables: str) -> Any:
    """What a script prints as JSON, run where this project is not on the path. It may not have imported it either."""
    checked = script + "\nimport sys; assert 'dist_train' not in sys.modules"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", checked, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------------- ONNX
WITH_ONNXRUNTIME = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
known = session.get_modelmeta().custom_metadata_map
names = json.loads(known["classes"])
more = {}
if known["text_tokens"] != "0":
    rules = json.loads(known["tokenizer"])
    ids = [2 + rules["tags"].index(tag) if tag in rules["tags"] else 1 for tag in "smile hat red".split()]
    padding = [0] * (rules["tokens"] - len(ids))
    more = {"text_ids": np.array([ids + padding]), "text_mask": np.array([[True] * len(ids) + [False] * len(padding)])}
found = []
for path in sys.argv[2:]:
    pixels = np.asarray(Image.open(path))[None]
    logits, probabilities = session.run(None, {"images": pixels, **more})
    found.append(dict(zip(names, probabilities[0].tolist(), strict=True)))
several = np.stack([pixels[0], pixels[0][::-1]])
together = session.run(["probabilities"], {"images": several, **{k: v.repeat(2, 0) for k, v in more.items()}})[0]
assert np.allclose(together[0], probabilities[0], atol=1e-5) and not np.allclose(together[1], together[0], atol=1e-5)
print(json.dumps(found))
"""

VILT = {"model__text_tokens": 4, "data__tokenizer": "tags", "model__head": "ifa"}
# As many steps as the running means of batch norms take to come near what they average; one checkpoint, the last.
OF_CNNS = {"data__image_size": 32, "train__epochs": 20, "train__eval_every": 20}


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exports") / "new" / "model.onnx"
    assert main(["export", str(run), str(file)]) == 0
    assert os.listdir(file.parent) == [file.name]
    return file


def check_onnx(run: Path, file: Path, photos: list[Path], capsys: Any, *tags: str) -> None:
    wanted = predicted(run, photos, capsys, *tags)
    found = in_a_process_of_its_own(WITH_ONNXRUNTIME, file, *photos)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == set(NAMES) and max(one.values()) > 0.3
        assert one == pytest.approx(other, abs=2e-3)


def test_onnxruntime_alone_predicts_from_photos_what_dist_train_predicts(
    run: Path, exported: Path, photos: list[Path], capsys: Any
) -> None:
    check_onnx(run, exported, photos, capsys)


@pytest.mark.parametrize(
    "changes",
    [
        VILT,
        pytest.param({"model__backbone": "resnet18", **OF_CNNS}, marks=pytest.mark.slow),
        pytest.param({"model__head": "attentive"}, marks=pytest.mark.slow),
        pytest.param({"data__eval_crop": "center"}, marks=pytest.mark.slow),
        pytest.param({"model__backbone": "convnext_atto", "data__image_size": 64}, marks=pytest.mark.slow),
        pytest.param(
            {"model__backbone": "vit_tiny_r_s16_p8_224", "data__image_size": 64, "model__head": "cls"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"model__backbone": "efficientnet_b0", **OF_CNNS}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "cls",
)
def test_so_it_does_of_models_that_read_tags_of_other_heads_and_of_cnns(
    shards: Path, photos: list[Path], tmp_path: Path, capsys: Any, changes: dict[str, object]
) -> None:
    run = train(shards, tmp_path / "run", **changes)
    file = tmp_path / "model.onnx"
    assert main(["export", str(run), str(file)]) == 0
    assert "uint8 (batch, height, width, 3)" in capsys.readouterr().out
    tags = ["--tags", "smile hat red"] if "model__text_tokens" in changes else []
    check_onnx(run, file, photos, capsys, *tags)


@pytest.mark.parametrize("crop", ["squash", "center"])
def test_pixels_in_the_file_are_those_of_the_loader(crop: str) -> None:
    """Within 1.5 of 255, downwards and upwards; most are equal."""
    config = DataConfig(image_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), threads=1, eval_crop=crop)
    model = torch.nn.Flatten()
    seen = onnx_file._FromPixels(model, config)  # type: ignore[arg-type]  # whose "logits" are the pixels
    example = {"images": torch.zeros(2, 40, 45, 3, dtype=torch.uint8)}
    document = onnx_file._convert(seen, example, Path("pixels.onnx"))
    import onnxruntime

    session = onnxruntime.InferenceSession(document.SerializeToString(), providers=["CPUExecutionProvider"])
    reader = ImageReader(config, None)
    noise = np.random.default_rng(0).integers(0, 256, (97, 71, 3), np.uint8)
    for picture in (Image.fromarray(noise), smooth_image(1, 300, 40), smooth_image(2, 32, 32), smooth_image(3, 9, 13)):
        file = io.BytesIO()
        picture.save(file, "PNG")
        wanted = 255 * reader.read(file.getvalue()).numpy().reshape(1, -1)
        found = 255 * session.run(["logits"], {"images": np.asarray(picture)[None]})[0]
        assert np.abs(found - wanted).max() <= 1.01 and (np.abs(found - wanted) < 0.01).mean() > 0.97
    reader.close()


def test_a_file_that_would_compute_something_else_is_not_put_in_place(
    run: Path, exported: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: object) -> onnx.ModelProto:
        document = onnx.load(exported)
        del document.metadata_props[:]
        for tensor in document.graph.initializer:
            if tensor.name.endswith("head.classifier.bias"):
                tensor.raw_data = np.ones(CLASSES, np.float32).tobytes()
        return document

    monkeypatch.setattr(onnx_file, "_convert", wrong)
    assert main(["export", str(run), str(tmp_path / "model.onnx")]) == 1
    assert "not written: onnxruntime's logits differ from PyTorch's by" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_graph_with_a_fixed_number_of_images_is_one_line_and_no_file(
    run: Path, exported: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch writes one for nn.MultiheadAttention, in a backbone of somebody's own."""

    def fixed(*arguments: object) -> onnx.ModelProto:
        document = onnx.load(exported)
        del document.metadata_props[:]
        document.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        return document

    monkeypatch.setattr(onnx_file, "_convert", fixed)
    assert main(["export", str(run), str(tmp_path / "model.onnx")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not written: onnxruntime cannot run the model on 1 images" in error and "export .safetensors" in error
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------- timm's format
WITH_TIMM = """
import json, sys
import timm, torch
from PIL import Image
model = timm.create_model(sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg["label_names"]
found = []
for path in sys.argv[2:]:
    with torch.no_grad():
        probabilities = model(transform(Image.open(path).convert("RGB"))[None]).softmax(dim=1)[0]
    found.append(dict(zip(names, probabilities.tolist(), strict=True)))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"model__backbone": "resnet18", "data__image_size": 32}, marks=pytest.mark.slow),
        pytest.param(
            {"model__backbone": "vit_tiny_patch16", "data__image_size": 32, "data__eval_crop": "center"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "cls",
)
def test_timm_alone_predicts_from_the_folder_what_dist_train_predicts(
    run: Path, shards: Path, photos: list[Path], tmp_path: Path, capsys: Any, changes: dict[str, object]
) -> None:
    if changes:
        run = train(shards, tmp_path / "run", **changes)
    folder = tmp_path / "model"
    assert main(["export", str(run), str(folder), "--licence", "cc-by-4.0"]) == 0
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    card, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
    metrics = [entry for entry in harness.evaluations(run) if entry["split"] == "val"]
    assert f"| val | 8 | {metrics[-1]['top1']:.4f} | {metrics[-1]['top5']:.4f} |" in card
    assert "\nlicense: cc-by-4.0\n" in card and str(shards) not in card and str(run) not in card
    assert config["label_names"] == NAMES and config["pretrained_cfg"]["crop_mode"] == changes.get(
        "data__eval_crop", "squash"
    )
    wanted = predicted(run, photos, capsys)
    for one, other in zip(in_a_process_of_its_own(WITH_TIMM, f"local-dir:{folder}", *photos), wanted, strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    assert main(["export", str(run), str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_card_has_the_results_of_the_run_that_its_checkpoint_is_of(run: Path, shards: Path, tmp_path: Path) -> None:
    other = train(shards, tmp_path / "other")
    metrics = other / "metrics.jsonl"
    metrics.write_text(re.sub(r'"top1": [0-9.]+', '"top1": 0.4321', metrics.read_text()))
    folder = tmp_path / "model.v1"  # an empty folder is a new one, whatever its name
    folder.mkdir()
    checkpoint = newest_checkpoint(other)
    assert main(["export", str(run), str(folder), "--checkpoint", str(checkpoint), "--licence", "mit"]) == 0
    assert "| val | 8 | 0.4321 |" in (folder / "README.md").read_text()


def test_what_is_pushed_timm_loads_from_the_hub(
    run: Path, photos: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push = ["export", str(run), "--hub", "anna/flowers"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        assert main(push) == 0
        assert "timm.create_model('hf-hub:anna/flowers', pretrained=True)" in capsys.readouterr().out
        pushed = server.repositories["anna/flowers"]
        assert pushed["private"] and sorted(pushed["files"]) == ["README.md", "config.json", "model.safetensors"]
        assert b"license" not in pushed["files"]["README.md"]
        variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        found = in_a_process_of_its_own(WITH_TIMM, "hf-hub:anna/flowers", *photos, **variables)
        for one, other in zip(found, predicted(run, photos, capsys), strict=True):
            assert one == pytest.approx(other, abs=2e-3)
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        assert main(push) == 1
        assert "error: --hub anna/flowers: not uploaded (" in harness.error_line(capsys.readouterr().err)
        monkeypatch.delenv("HF_TOKEN")
        assert main(push) == 2
        assert "no token of the hub; log in with `hf auth login`" in harness.error_line(capsys.readouterr().err)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(push) == 1
    assert "error: --hub anna/flowers: the hub cannot be reached (" in harness.error_line(capsys.readouterr().err)


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name FILE.onnx, FILE.safetensors or a new FOLDER, or --hub USER/NAME"),
        (["model.pth"], "name a file .onnx or .safetensors, or a new folder without a dot"),
        (["model.onnx", "--public"], "--public: is said of --hub USER/NAME"),
        (["model.onnx", "--licence", "mit"], "--licence: is written into a folder's model card"),
    ],
)
def test_a_target_that_is_none_is_one_line_before_anything_is_loaded(
    run: Path, capsys: Any, words: list[str], said: str
) -> None:
    assert main(["export", str(run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_the_onnx_packages_the_extra_is_named(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(run), "model.onnx"]) == 2
    assert "model.onnx: needs onnxscript; pip install 'dist-train[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize(("backbone", "side"), [("levit_128s", 224), ("convnext_atto", 32)])
def test_a_model_whose_head_is_more_in_timm_is_refused_for_timms_formats(backbone: str, side: int) -> None:
    weights, _ = to_timm_state_dict(build_model(ModelConfig(backbone=backbone), side, CLASSES)[0])
    try:
        check_fits(weights, backbone, {"num_classes": CLASSES})
    except UseError as error:
        assert "the head of its levit_128s is more than a linear layer; export FILE.onnx" in str(error)
    else:
        assert backbone == "convnext_atto"


def test_a_head_that_timm_lacks_is_refused_for_its_format_in_one_line(
    shards: Path, tmp_path: Path, capsys: Any
) -> None:
    run = train(shards, tmp_path / "run", model__head="ifa", train__stop_after_steps=1)
    assert main(["export", str(run), str(tmp_path / "folder")]) == 2
    assert "timm has no place for this model, which has the ifa head: export it as FILE.onnx" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
