"""Weights from files and from the hub's cache: what fits loads, everywhere it can; what does not is refused."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_train.config import ModelConfig
from dist_train.errors import UseError, WorkError
from dist_train.models.build import Classifier, build_model, plain_weights, to_timm_state_dict
from dist_train.models.pretrained import hub_name
from dist_train.models.weights import LoadReport, resize_position_embeddings

CLASSES = 7
IMAGE = 32


def timm_vit(
    image_size: int = IMAGE, num_classes: int = CLASSES, name: str = "vit_tiny_patch16_224"
) -> torch.nn.Module:
    torch.manual_seed(11)
    model = timm.create_model(name, num_classes=num_classes, img_size=image_size)
    with torch.no_grad():  # no tensor may be all zero or all one, or it would look loaded when it is not
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def load(path: Path | str, image_size: int = IMAGE, **settings: Any) -> tuple[Classifier, LoadReport]:
    torch.manual_seed(0)
    config = ModelConfig(**{"backbone": "vit_tiny_patch16", **settings, "weights": str(path)})
    model, report = build_model(config, image_size, CLASSES, vocab_size=30)
    return model.eval(), report


def assert_same_logits(model: Classifier, reference: torch.nn.Module, image_size: int = IMAGE) -> None:
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), atol=1e-5, rtol=0)


def jax_arrays(model: torch.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    """The weights of a timm ViT in the layout of the JAX original's files."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for block in range(len(model.blocks)):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        qkv_weight = state[ours + "attn.qkv.weight"].reshape(3, heads, dim // heads, dim)
        qkv_bias = state[ours + "attn.qkv.bias"].reshape(3, heads, dim // heads)
        for part, name in enumerate(("query", "key", "value")):
            arrays[f"{attention}{name}/kernel"] = qkv_weight[part].transpose(2, 0, 1)
            arrays[f"{attention}{name}/bias"] = qkv_bias[part]
        arrays[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, dim // heads, dim)
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        for layer, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{name}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{name}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    return {prefix + name: array for name, array in arrays.items()}


def write(state: dict[str, Tensor], path: Path, nested_under: str | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({nested_under: state, "epoch": 3} if nested_under else state, path)
    return path


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "nested_under"),
    [("w.safetensors", None), ("w.pth", None), ("w.pt", "state_dict"), ("w.bin", "model")],
)
def test_a_file_of_timms_weights_gives_timms_logits(tmp_path: Path, name: str, nested_under: str | None) -> None:
    reference = timm_vit()
    model, report = load(write(reference.state_dict(), tmp_path / name, nested_under))
    assert_same_logits(model, reference)
    assert (report.loaded, report.resized, report.new, report.unused) == (len(reference.state_dict()), [], [], [])


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_file_of_the_jax_original_gives_the_same_logits(tmp_path: Path, prefix: str) -> None:
    reference = timm_vit()
    np.savez(tmp_path / "w.npz", **jax_arrays(reference, prefix))
    model, report = load(tmp_path / "w.npz")
    assert_same_logits(model, reference)
    assert (report.loaded, report.new, report.unused) == (len(reference.state_dict()), [], [])


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0"])
def test_a_file_of_a_cnn_gives_timms_logits(tmp_path: Path, backbone: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(backbone, num_classes=CLASSES).eval()
    model, report = load(write(reference.state_dict(), tmp_path / "w.safetensors"), backbone=backbone)
    assert_same_logits(model, reference)
    assert report.new == report.unused == []


@pytest.mark.parametrize(("head", "text_tokens"), [("cls", 0), ("ifa", 0), ("cls", 6), ("ifa", 6)])
def test_our_own_weights_come_back_whole(tmp_path: Path, head: str, text_tokens: int) -> None:
    settings = {"head": head, "text_tokens": text_tokens, "head_init": "default"}
    torch.manual_seed(5)
    config = ModelConfig(backbone="vit_tiny_patch16", **settings)
    saved = plain_weights(build_model(config, IMAGE, CLASSES, vocab_size=30)[0])
    model, report = load(write(saved, tmp_path / "w.safetensors"), **settings)
    assert report.new == report.resized == report.unused == []
    loaded = plain_weights(model)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    for_timm, extra = to_timm_state_dict(model)
    assert {**for_timm, **extra}.keys() == saved.keys()
    assert all(name.startswith(("ifa.", "text.")) for name in extra)
    missing, unexpected = timm_vit().load_state_dict(for_timm, strict=False)
    assert unexpected == []
    assert set(missing) == ({"norm.weight", "norm.bias", "head.weight", "head.bias"} if head == "ifa" else set())


# ---------------------------------------------------------------- heads and text


def test_a_classifier_of_another_number_of_classes_stays_new_and_zero(tmp_path: Path) -> None:
    path = write(timm_vit(num_classes=21).state_dict(), tmp_path / "w.safetensors")
    model, report = load(path)
    assert report.new == ["head.weight", "head.bias"] and report.unused == ["head.bias", "head.weight"]
    assert plain_weights(model)["head.weight"].abs().max() == 0
    assert "2 new (head.weight, head.bias)" in report.summary() and "\n" not in report.summary()


def test_a_cls_file_starts_an_ifa_vilt_and_its_parts_stay_new(tmp_path: Path) -> None:
    reference = timm_vit()
    path = write(reference.state_dict(), tmp_path / "w.safetensors")
    model, report = load(path, head="ifa", text_tokens=6)
    assert report.unused == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert len(report.new) == 5 + 6 and all(name.startswith(("ifa.", "text.")) for name in report.new)
    assert torch.equal(plain_weights(model)["blocks.11.mlp.fc2.weight"], reference.blocks[11].mlp.fc2.weight)


def test_the_report_of_no_weights_says_that_all_is_new() -> None:
    _, report = load("none")
    assert report.loaded == 0 and len(report.new) == len(timm_vit().state_dict())


# ---------------------------------------------------------------- position embeddings


def bilinear_aligned(grid: np.ndarray, new: int) -> np.ndarray:
    """Bilinear interpolation of (g, g, D) to (new, new, D) with the corners on the corners, by hat functions."""
    old = grid.shape[0]
    places = np.arange(new) * (old - 1) / (new - 1)
    hats = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)[None, :]))
    return np.einsum("yi,xj,ijd->yxd", hats, hats, grid)


@pytest.mark.parametrize("file_type", [".safetensors", ".npz"])
@pytest.mark.parametrize(("old", "new"), [(7, 4), (3, 4)])
def test_reference_resizing_of_positions_is_bilinear_with_aligned_corners(
    tmp_path: Path, file_type: str, old: int, new: int
) -> None:
    reference = timm_vit(image_size=16 * old)
    path = tmp_path / f"w{file_type}"
    if file_type == ".npz":
        np.savez(path, **jax_arrays(reference, ""))
    else:
        write(reference.state_dict(), path)
    model, report = load(path, image_size=16 * new, pos_resize="reference")
    assert report.resized == ["pos_embed"] and report.new == []
    theirs = reference.pos_embed.detach().numpy()[0]
    expected = bilinear_aligned(theirs[1:].reshape(old, old, -1), new).reshape(new * new, -1)
    ours = model.backbone.pos_embed.detach().numpy()[0]
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1:], expected, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(7, 4), (3, 4)])
def test_timm_resizing_of_positions_is_what_timm_does_to_a_loaded_model(tmp_path: Path, old: int, new: int) -> None:
    reference = timm_vit(image_size=16 * old)
    model, report = load(write(reference.state_dict(), tmp_path / "w.safetensors"), image_size=16 * new)
    assert report.resized == ["pos_embed"]
    grid = reference.pos_embed.detach()[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(model.backbone.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)
    reference.set_input_size(img_size=(16 * new, 16 * new))
    assert_same_logits(model, reference, image_size=16 * new)


@pytest.mark.parametrize("shape", [(1, 198, 192), (192,), ()])
def test_positions_that_are_no_square_grid_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WorkError, match=r"w.pth.*(1x198x192|192|one number)"):
        resize_position_embeddings(torch.zeros(shape), 65, "timm", "w.pth")


# ---------------------------------------------------------------- refusals


def refuse(path: Path, error: type[Exception], message: str, **settings: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("vit_small_patch16_224", "vit_tiny_patch16", "cls_token is 1x1x384, the model's is 1x1x192"),
        ("vit_tiny_patch16_224", "vit_tiny_patch8", "patch_embed.proj.weight is 192x3x16x16, the model's is 192x3x8x8"),
        ("resnet34", "resnet18", "tensors that the backbone has no place for, as layer1.2"),
        ("resnet18", "vit_tiny_patch16", "has 0 of the model's tensors but not cls_token"),
        ("deit_tiny_distilled_patch16_224", "vit_tiny_patch16", "pos_embed is 1x198x192, not .CLS. and a square grid"),
    ],
)
def test_the_weights_of_another_architecture_are_refused(tmp_path: Path, theirs: str, ours: str, message: str) -> None:
    path = write(timm.create_model(theirs).state_dict(), tmp_path / "w.safetensors")
    refuse(path, WorkError, message, backbone=ours)


@pytest.mark.parametrize("shallow", ["file", "model"])
def test_weights_of_another_depth_are_refused(tmp_path: Path, shallow: str) -> None:
    state = timm_vit().state_dict()
    if shallow == "file":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.11.")}
        message = "but not blocks.11.norm1.weight and 11 others"
    else:
        state["blocks.12.norm1.weight"] = torch.ones(192)
        message = "1 tensors that the backbone has no place for, as blocks.12.norm1.weight"
    refuse(write(state, tmp_path / "w.pth"), WorkError, message)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_a_cut_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".npz":
        np.savez(path, **jax_arrays(timm_vit(), ""))
    else:
        write(timm_vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100_000])
    refuse(path, WorkError, "not a readable weights file")


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "old torch", "pickle", "npz"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, writer: str) -> None:
    trap = Touch(tmp_path / "trap")
    path = tmp_path / ("w.npz" if writer == "npz" else "w.pth")
    if writer == "npz":
        arrays = jax_arrays(timm_vit(), "")
        arrays["cls"] = np.array([trap], dtype=object)
        np.savez(path, **arrays)
        assert zipfile.is_zipfile(path)
    elif writer == "pickle":
        path.write_bytes(pickle.dumps({"cls_token": trap}, protocol=2))
    else:
        torch.save({"cls_token": trap}, path, _use_new_zipfile_serialization=writer == "torch")
    refuse(path, WorkError, "not a readable weights file" if writer == "npz" else "holds pickled objects other than")
    assert not (tmp_path / "trap").exists()


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "args": ["a"]}, tmp_path / "w.pth")
    refuse(tmp_path / "w.pth", WorkError, "holds no tensors by name")
    torch.save([1, 2], tmp_path / "list.pth")
    refuse(tmp_path / "list.pth", WorkError, "not a readable weights file")
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    refuse(tmp_path / "w.npz", WorkError, "not the layout of the JAX original")


def test_a_missing_file_and_an_unknown_type_are_mistakes_of_use(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.pth", UseError, "there is no file")
    (tmp_path / "w.ckpt").touch()
    refuse(tmp_path / "w.ckpt", UseError, "is not none, hub, hub:TAG or a file of type .safetensors")


# ---------------------------------------------------------------- hub


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("vit_base_patch16", "vit_base_patch16_224.orig_in21k"),
        ("vit_base_patch32", "vit_base_patch32_224.orig_in21k"),
        ("vit_large_patch16", "vit_large_patch16_224.orig_in21k"),
        ("vit_large_patch32", "vit_large_patch32_224.orig_in21k"),
        ("vit_tiny_patch16", "vit_tiny_patch16_224.augreg_in21k"),
        ("vit_small_patch16", "vit_small_patch16_224.augreg_in21k"),
        ("resnet18", "resnet18.tv_in1k"),
        ("resnet50", "resnet50.tv_in1k"),
        ("efficientnet_b0", "efficientnet_b0.ra_in1k"),
    ],
)
def test_hub_means_the_papers_weights(backbone: str, expected: str) -> None:
    assert hub_name(backbone) == expected


def test_a_hub_tag_is_looked_up_at_every_resolution_and_an_unknown_one_refused() -> None:
    assert hub_name("vit_base_patch16", "dino") == "vit_base_patch16_224.dino"
    assert hub_name("vit_large_patch32", "orig_in21k_ft_in1k") == "vit_large_patch32_384.orig_in21k_ft_in1k"
    with pytest.raises(UseError, match="no weights augreg_21k for vit_tiny_patch16; the nearest is hub:augreg_in21k "):
        load("hub:augreg_21k")
    with pytest.raises(UseError, match="no pretrained weights for vit_tiny_patch4"):
        load("hub", backbone="vit_tiny_patch4")


def test_hub_weights_come_from_the_local_cache_and_a_miss_is_one_clear_line(tmp_path: Path) -> None:
    """In a process of its own, because the hub's client reads its environment when it is imported."""
    reference = timm_vit(image_size=224, num_classes=21843)
    repository = tmp_path / "hub" / "models--timm--vit_tiny_patch16_224.augreg_in21k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write(reference.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    script = """
from dist_train.config import ModelConfig
from dist_train.errors import run_command
from dist_train.models.build import build_model, plain_weights
def build(backbone):
    model, report = build_model(ModelConfig(backbone=backbone, weights="hub"), image_size=32, num_classes=7)
    print(report.summary())
    print(plain_weights(model)["blocks.3.mlp.fc1.weight"].double().sum().item())
print(run_command(lambda: build("vit_tiny_patch16")))
print(run_command(lambda: build("vit_small_patch16")))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    summary, total, hit, miss = done.stdout.splitlines()
    assert summary.startswith("weights hub: 150 tensors loaded; 1 resized (pos_embed); 2 new (head.weight, head.bias)")
    assert float(total) == pytest.approx(reference.blocks[3].mlp.fc1.weight.double().sum().item(), rel=1e-12)
    assert (hit, miss) == ("0", "1")
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: model.weights: cannot get vit_small_patch16_224.augreg_in21k from the hub")
    assert "HF_HUB_OFFLINE=1" in last
