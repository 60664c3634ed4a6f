"""A finished run's model as one ONNX file that takes decoded images of any size and knows its classes.

What `dist-train evaluate` does between a decoded image and its logits is in the graph: the whole image, or its middle,
becomes a square, antialiased (ONNX's Resize with `antialias` and `exclude_outside` is Pillow's triangle, as
`data/resize.py` is), is rounded to whole numbers and normalised. To use the file one needs a JPEG decoder
and onnxruntime, and nothing of this project or of PyTorch.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config import DataConfig
from dist_train.errors import UseError, WorkError, written
from dist_train.files import write_atomically
from dist_train.models.classifier import Classifier
from dist_train.use.export import describe, metadata_texts
from dist_train.use.trained import TrainedModel

_LARGEST = 2**31 - 2**26
"""Bytes of weights that a file can hold: protobuf ends at 2 GiB, and the graph needs some."""
_NETWORK, _WITH_RESIZE = 1e-3, 2e-2
"""Largest difference of logits that passes, relative to the largest logit: on images of the model's size; on others,
where a value that is nearly half-way between two whole numbers may be rounded to either."""


class _FromPixels(nn.Module):
    """A classifier together with what the loader does to a decoded image."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Classifier, data: DataConfig) -> None:
        super().__init__()
        self.of_tags = data.labels == "tags"
        self.model, self.side = model, data.image_size
        centred = data.eval_crop == "center"
        self.shorter = math.floor(data.image_size / data.eval_crop_pct) if centred else None
        self.register_buffer("mean", 255 * torch.tensor(data.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(data.std).view(3, 1, 1))

    def forward(
        self, images: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8 RGB, and for a ViLT ids (B, T) int64 and mask (B, T) bool, to logits and
        probabilities, (B, classes) each."""
        pixels = self._resize(images.permute(0, 3, 1, 2).float()).round().clamp(0, 255)
        normalised = (pixels - self.mean) / self.std
        logits = self.model(normalised) if text_ids is None else self.model(normalised, text_ids, text_mask)
        return logits, logits.sigmoid() if self.of_tags else logits.softmax(dim=1)

    def _resize(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, 3, S, S): all of them squashed, or their middle as `data/crops.py` has it."""
        if self.shorter is None:
            return functional.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        least = torch.sym_min(*pixels.shape[2:])
        resized: list[Any] = [self.shorter * length // least for length in pixels.shape[2:]]
        pixels = functional.interpolate(pixels, resized, mode="bilinear", antialias=True)
        for axis, length in enumerate(resized, start=2):
            half, odd = (length - self.side) // 2, (length - self.side) % 2
            start = half + odd * (half % 2)  # rounded to the nearest, from the middle between two to the even one
            pixels = pixels.index_select(axis, torch.arange(self.side) + start)
        return pixels


def export_onnx(trained: TrainedModel, file: Path) -> str:
    """Write FILE.onnx, checked against PyTorch by onnxruntime before it is put in place. Returns what it is, in words.

    Inputs: `images` (batch, height, width, 3) uint8 RGB, all of one size, any; for a model that reads tags `text_ids`
    (batch, T) int64 and `text_mask` (batch, T) bool too. Outputs: `logits` and `probabilities`, (batch, classes)
    float32. The metadata names classes, preprocessing and, with text, the vocabulary. Raises UseError where the
    model is too large for one file, WorkError where the file would compute anything else than the model.
    """
    import onnx

    weights = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    if weights > _LARGEST:
        raise UseError(
            f"{file}: {weights / 1e9:.1f} GB of weights are more than an ONNX file holds; export .safetensors"
        )
    model = _FromPixels(copy.deepcopy(trained.model).cpu(), trained.recipe.data).eval()
    document = _convert(model, _example(2, model.side + 3, model.side + 8, trained), file)
    for key, text in metadata_texts(describe(trained)).items():
        entry = document.metadata_props.add()
        entry.key, entry.value = key, text
    onnx.checker.check_model(document)
    content = document.SerializeToString()
    difference = _check(content, model, trained, file)
    with written(file, "choose another"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    return (
        f"{file}: {len(content) / 1e6:.1f} MB; takes RGB images of any size as uint8 (batch, height, width, 3), gives "
        f"logits and probabilities of {len(trained.class_names)} classes; onnxruntime's logits are PyTorch's within "
        f"{difference:.0e} of the largest"
    )


# ---------------------------------------------------------------------- from PyTorch
def _convert(model: _FromPixels, inputs: dict[str, Tensor], file: Path) -> Any:
    """The model as an onnx.ModelProto, with the sizes of `inputs` free but for the text's length."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    free = {"images": {0: batch, 1: height, 2: width}, "text_ids": {0: batch}, "text_mask": {0: batch}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's, about itself
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it names every node that it leaves as it is
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=["logits", "probabilities"],
                dynamic_shapes={name: free[name] for name in inputs},
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise WorkError(
                f"{file}: PyTorch cannot write this model as ONNX ({reason}); export .safetensors"
            ) from None
    assert program is not None  # it is None without dynamo alone
    return program.model_proto


def _example(batch: int, height: int, width: int, trained: TrainedModel) -> dict[str, Tensor]:
    """Inputs of a model by name, always the same: noise, and tags of any ids of which some are padding."""
    rng = np.random.default_rng(0)
    inputs = {"images": torch.from_numpy(rng.integers(0, 256, (batch, height, width, 3), np.uint8))}
    if trained.tokenizer is not None:
        tokens = trained.tokenizer.tokens
        ids = rng.integers(0, trained.tokenizer.vocab_size, (batch, tokens))
        real = np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1))
        inputs |= {"text_ids": torch.from_numpy(ids * real), "text_mask": torch.from_numpy(real)}
    return inputs


# ---------------------------------------------------------------------- against PyTorch
def _check(content: bytes, model: _FromPixels, trained: TrainedModel, file: Path) -> float:
    """The largest difference of logits to PyTorch's, relative to the largest logit, on images of the model's size.

    Raises WorkError if that, or that on other sizes and numbers of images, is more than rounding explains.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    side = model.side
    differences = []
    for shape, allowed in (
        ((1, side, side), _NETWORK),
        ((3, 2 * side + 1, side + 7), _WITH_RESIZE),
        ((2, side // 2 + 1, side // 2 + 3), _WITH_RESIZE),
    ):
        inputs = _example(*shape, trained)
        try:
            logits, _ = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        except Exception as error:  # of onnxruntime's own kinds, where a layer has fixed a size that should be free
            reason = " ".join(str(error).split())
            raise WorkError(
                f"{file}: not written: onnxruntime cannot run the model on {shape[0]} images of {shape[1]} x "
                f"{shape[2]} pixels ({reason}); export .safetensors"
            ) from None
        with torch.no_grad():
            wanted, _ = model(*inputs.values())
        scale = max(float(wanted.abs().max()), 1e-3)
        differences.append(float((torch.from_numpy(logits) - wanted).abs().max()) / scale)
        if not differences[-1] <= allowed:  # nor NaN
            raise WorkError(
                f"{file}: not written: onnxruntime's logits differ from PyTorch's by {differences[-1]:.2g} of the "
                f"largest on {shape[0]} images of {shape[1]} x {shape[2]} pixels; export .safetensors"
            )
    return differences[0]
