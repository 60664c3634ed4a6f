"""Starting weights: from timm's hub, a file or a run, fitted to a model's tensors, with an account of what went where.

Names are timm's throughout ("plain" names, see `build.plain_weights`). A file either fits or is refused: every
tensor of the backbone must be in it with the same shape, position embeddings apart, which are resampled to the
model's grid; and it may hold nothing else but heads and text. So the weights of another architecture never load
partly and unnoticed. Nor does a classifier of other classes, where what is read knows its classes: checkpoints and
exports do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer, load_state_dict
from torch import Tensor
from torch.nn import functional

from dist_train.errors import UseError, WorkError
from dist_train.models.heads import OWN_PREFIXES
from dist_train.models.lora import merge_adapters, scale_of_recipe
from dist_train.models.names import FILE_TYPES, is_paper_name
from dist_train.models.pretrained import (
    AVERAGED,
    HUB_FOLDER,
    first_line,
    fit_by_timm,
    hub_folder_file,
    hub_tag,
    read_hub,
    read_hub_folder,
    read_metadata,
)
from dist_train.models.saved import (
    EXTRA_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    choose_checkpoint,
    read_averaged_weights,
    read_class_names,
    read_document,
    read_weights,
)

# May be new in the model or unused in the file: classifiers, the layer before one, heads that timm's models do not
# have, text. Everything else is the backbone.
_OWN_HEADS = "|".join(OWN_PREFIXES)
NOT_BACKBONE = re.compile(
    rf"(head(\.fc)?|head_dist|fc|fc_norm|classifier|pre_logits(\.fc)?|norm|({_OWN_HEADS}|text)\.\w+)\.(weight|bias)"
)
_IS_OURS = re.compile(rf"({_OWN_HEADS}|text)\.")
_CLASSIFIER = re.compile(rf"(head(\.fc)?|fc|classifier|({_OWN_HEADS})\.classifier)\.(weight|bias)")


@dataclass
class LoadReport:
    """What became of the weights that a model started from. All names are plain names."""

    source: str
    """As in the recipe: none, hub, hub:TAG, the file or the folder."""
    loaded: int = 0
    """Tensors of the model that were set from the source."""
    resized: list[str] = field(default_factory=list)
    """Of those, the ones that were resampled to another size."""
    new: list[str] = field(default_factory=list)
    """Tensors of the model that keep their initial values."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the source that the model has no place for, sorted."""
    note: str = ""
    """Of weights that know their classes: which checkpoint it was, and what became of the classifier."""

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.loaded} tensors loaded"]
        for what, names in (("resized", self.resized), ("new", self.new), ("unused", self.unused)):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            parts.append(f"{len(names)} {what}" + (f" ({shown})" if names else ""))
        return f"weights {self.source}: " + "; ".join([*parts, *([self.note] if self.note else [])])


def load_weights(
    own: dict[str, Tensor],
    source: str,
    backbone: str,
    pos_resize: Literal["timm", "reference"],
    class_names: Sequence[str] = (),
    image_size: int = 0,
    classifiers: Sequence[str] = ("head",),
) -> LoadReport:
    """Fill `own`, a model's tensors by plain name, in place from `source` (see ModelConfig.weights).

    A head or text tensor loads if its name and shape are in the source and stays new otherwise; so does the classifier
    of a source whose classes are not `class_names`, where both are known. Raises UseError for a source that cannot be
    (unknown tag, no such file or folder, unknown file type) and WorkError for one that cannot be fetched or read or
    does not fit; `own` may then be half filled. image_size: of the model; timm fits what is of a timm name to it.
    classifiers: what timm calls the backbone's.
    """
    if source == "none":
        return LoadReport(source, new=list(own))
    tag = hub_tag(source)
    if tag is not None:
        return _fit(own, read_hub(backbone, tag, image_size), source, pos_resize, classifiers)
    theirs, classes, which, head = _read_path(source)
    of_checkpoint = any(name.startswith("backbone.") for name in theirs)
    if of_checkpoint:
        theirs = to_plain_names(theirs, classifiers[0], head or _head_of(theirs, source))
    other = bool(classes) and bool(class_names) and list(classes) != list(class_names)
    if other:
        theirs = {name: tensor for name, tensor in theirs.items() if not _is_classifier(name, classifiers)}
    given = {name: tensor.shape for name, tensor in theirs.items()}
    if not is_paper_name(backbone):
        # A checkpoint's classifier is not for timm to fit, which may have two, or more around one.
        ours = {
            name: tensor
            for name, tensor in theirs.items()
            if _IS_OURS.match(name) or (of_checkpoint and _is_classifier(name, classifiers))
        }
        timms = {name: tensor for name, tensor in theirs.items() if name not in ours}
        theirs = fit_by_timm(backbone, image_size, timms, source) | ours
    report = _fit(own, theirs, source, pos_resize, classifiers)
    resized = [name for name, shape in given.items() if name in own and shape != own[name].shape]
    report.resized = [name for name in resized if name not in report.new]
    if other:
        which.append(f"without its classifier, of {len(classes)} classes that are not the {len(class_names)} here")
    elif classes:
        new = any(_is_classifier(name, classifiers) for name in report.new)
        which.append("without its classifier, of another head" if new else "with its classifier")
    report.note = ", ".join(which)
    return report


# ---------------------------------------------------------------- reading


def _read_path(source: str) -> tuple[dict[str, Tensor], list[str], list[str], str]:
    """(tensors, the names of the classes if it knows them, which checkpoint it is, its head) of a file ("" for the
    head), run or checkpoint."""
    path, averaged = Path(source.removesuffix(AVERAGED)), source.endswith(AVERAGED)
    if path.name in (WEIGHTS_NAME, EXTRA_NAME) and (path.parent / STATE_NAME).is_file():
        path, averaged = path.parent, path.name == EXTRA_NAME
    if not path.is_dir():
        if averaged:
            raise UseError(f"model.weights: {AVERAGED} goes behind the folder of a run or checkpoint; {path} is none")
        return read_file(path), _classes_of_export(path), [], ""
    if (path / HUB_FOLDER).is_file():
        names = read_hub_folder(path).get("label_names")
        classes = [str(name) for name in names] if isinstance(names, list) else []
        return read_file(hub_folder_file(path)), classes, [], ""
    if not ((path / "checkpoints").is_dir() or (path / STATE_NAME).is_file()):
        raise UseError(f"model.weights: {path} is neither a run's folder nor a checkpoint's; give the file in it")
    if (path / STATE_NAME).is_file():
        chosen = choose_checkpoint(path, str(path.absolute()), "model.weights")
    else:
        chosen = choose_checkpoint(path, "last" if averaged else "auto", "model.weights")
    tensors = (read_averaged_weights if averaged else read_weights)(chosen.checkpoint)
    recipe = read_document(chosen.checkpoint)["recipe"]
    tensors = merge_adapters(tensors, scale_of_recipe(recipe))
    which = f"{'averaged weights of ' if averaged else ''}{chosen}"
    return tensors, read_class_names(chosen.checkpoint), [which], recipe["model"]["head"]


def _classes_of_export(path: Path) -> list[str]:
    """The names of the classes in the metadata of what `dist-train export` wrote; [] for other files."""
    try:
        classes = json.loads(read_metadata(path).get("classes", "[]"))
    except ValueError:
        return []
    return [str(name) for name in classes] if isinstance(classes, list) else []


def _head_of(tensors: dict[str, Tensor], source: str) -> str:
    """The head of tensors that are named as in a checkpoint, in a file without its recipe: cls or ifa."""
    names = {name for name in tensors if name.startswith("head.")}
    if names <= {"head.classifier.weight", "head.classifier.bias"}:
        return "cls"
    if "head.aggregate.weight" in names:
        return "ifa"
    raise UseError(f"model.weights: nothing in {source} says which head it has; give the folder of its checkpoint")


def to_plain_names(tensors: dict[str, Tensor], classifier: str, head: str) -> dict[str, Tensor]:
    """The tensors of a `Classifier`, as in a checkpoint, by plain name.

    classifier: what timm calls the backbone's. head: the name of the head.
    """
    of_head = ("head.", OWN_PREFIXES[head]) if head in OWN_PREFIXES else ("head.classifier.", f"{classifier}.")
    prefixes = [("backbone.", ""), of_head, ("text.", "text.")]
    plain = {}
    for name, tensor in tensors.items():
        old, new = next(((old, new) for old, new in prefixes if name.startswith(old)), ("", ""))
        plain[new + name.removeprefix(old)] = tensor
    return plain


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file by plain name, on the CPU. Nothing is unpickled but tensors.

    .safetensors; .pth, .pt, .bin: a state dictionary by itself or under "state_dict" or "model"; .npz: a ViT in the
    layout of the JAX original. Raises UseError for no such file or another type, WorkError if it cannot be read.
    """
    if path.suffix not in FILE_TYPES:
        raise UseError(
            f"model.weights: {str(path)!r} is not none, hub, hub:TAG or a file of type {', '.join(FILE_TYPES)}, "
            "nor the folder of a run or checkpoint"
        )
    if not path.is_file():
        raise UseError(f"model.weights: there is no file {path}")
    try:
        if path.suffix == ".npz":
            tensors = _read_jax_vit(path)
        else:
            # timm takes care of weights_only, of the keys "state_dict" and "model", and of wrappers' prefixes.
            tensors = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # safetensors, pickle, zip, numpy and timm each have errors of their own
        if "weights_only" in str(error):
            raise WorkError(
                f"{path}: holds pickled objects other than tensors, which are never loaded; save the model's state "
                f"dictionary alone, best as .safetensors"
            ) from error
        raise WorkError(f"{path}: not a readable weights file ({first_line(error)}); get it again") from error
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise WorkError(f"{path}: holds no tensors by name; give the file of a model's state dictionary")
    return tensors


def _read_jax_vit(path: Path) -> dict[str, Tensor]:
    """Tensors of a ViT saved by the JAX original, by timm's reader, on the grid they were trained on."""
    with np.load(path, allow_pickle=False) as arrays:
        prefix = "opt/target/" if "opt/target/embedding/kernel" in arrays else ""
        if f"{prefix}embedding/kernel" not in arrays:
            raise ValueError("no embedding/kernel: not the layout of the JAX original's ViT")
        patch, _, _, dim = arrays[f"{prefix}embedding/kernel"].shape
        positions = arrays[f"{prefix}Transformer/posembed_input/pos_embedding"].shape[1]
        heads = arrays[f"{prefix}Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape[1]
        blocks = {name.split("/encoderblock_")[1].split("/")[0] for name in arrays if "/encoderblock_" in name}
        classes = len(arrays[f"{prefix}head/bias"]) if f"{prefix}head/bias" in arrays else 0
    # A model of the file's own size, on the meta device so that nothing random is drawn, for timm to read into.
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=math.isqrt(positions - 1) * patch,
            patch_size=patch,
            num_classes=classes,
            embed_dim=dim,
            depth=len(blocks),
            num_heads=heads,
            weight_init="skip",
        )
    model.to_empty(device="cpu")
    model.load_pretrained(str(path))
    return model.state_dict()


# ---------------------------------------------------------------- fitting


def _is_classifier(name: str, classifiers: Sequence[str]) -> bool:
    return bool(_CLASSIFIER.fullmatch(name)) or name.rpartition(".")[0] in classifiers


def _goes_with_classifier(name: str, classifiers: Sequence[str]) -> bool:
    """Whether a tensor stands beside a classifier in timm's model, which drops both where there are no classes: as
    `head.bn` beside `head.linear`."""
    return any(name.startswith(f"{classifier.rpartition('.')[0]}.") for classifier in classifiers if "." in classifier)


@torch.no_grad()
def _fit(
    own: dict[str, Tensor],
    theirs: dict[str, Tensor],
    source: str,
    pos_resize: Literal["timm", "reference"],
    classifiers: Sequence[str],
) -> LoadReport:
    report = LoadReport(source)
    missing = []
    for name, tensor in own.items():
        value = theirs.get(name)
        if value is not None and name == "pos_embed" and value.shape != tensor.shape:
            value = resize_position_embeddings(value, tensor.shape[1], pos_resize, source)
            report.resized.append(name)
        if value is not None and value.shape == tensor.shape:
            tensor.copy_(value)
            report.loaded += 1
        elif NOT_BACKBONE.fullmatch(name) or _is_classifier(name, classifiers):
            report.new.append(name)
        elif value is not None:
            raise WorkError(
                f"model.weights {source}: {name} is {_dimensions(value)}, the model's is {_dimensions(tensor)}; "
                f"give the weights of this backbone, or set model.backbone to theirs"
            )
        elif not name.endswith("num_batches_tracked"):  # a count that old files lack and that nothing here reads
            missing.append(name)
    if missing:
        raise WorkError(
            f"model.weights {source}: has {report.loaded} of the model's tensors but not {missing[0]} and "
            f"{len(missing) - 1} others of its backbone; give the weights of this backbone"
        )
    report.unused = sorted(name for name in theirs if name not in own or name in report.new)
    foreign = [
        name
        for name in report.unused
        if not (NOT_BACKBONE.fullmatch(name) or _is_classifier(name, classifiers))
        and not _goes_with_classifier(name, classifiers)
    ]
    if foreign:
        raise WorkError(
            f"model.weights {source}: has {len(foreign)} tensors that the backbone has no place for, as {foreign[0]}; "
            f"it is of another architecture"
        )
    return report


def resize_position_embeddings(
    embeddings: Tensor, positions: int, pos_resize: Literal["timm", "reference"], source: str
) -> Tensor:
    """Position embeddings (1, 1 + g*g, D) of a g x g grid and [CLS], resampled to (1, `positions`, D).

    The entry of [CLS] stays as it is. `timm`: bicubic, antialiased; `reference`: bilinear with aligned corners,
    no antialias. Raises WorkError, naming `source`, if either grid is not square.
    """
    given = embeddings.shape[1] if embeddings.ndim == 3 else 0
    old, new = math.isqrt(max(given - 1, 0)), math.isqrt(positions - 1)
    if old < 1 or old * old + 1 != given:
        raise WorkError(
            f"model.weights {source}: pos_embed is {_dimensions(embeddings)}, not [CLS] and a square grid; "
            f"give the weights of this backbone"
        )
    if pos_resize == "timm":
        return resample_abs_pos_embed(embeddings, new_size=[new, new], old_size=[old, old], num_prefix_tokens=1)
    cls, grid = embeddings[:, :1], embeddings[:, 1:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = functional.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def _dimensions(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "one number"
