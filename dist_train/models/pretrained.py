"""What timm knows of pretrained weights: which there are of a backbone, how they are fitted to it at another
image size, and by which mean and deviation their images were normalised.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from dist_train.config import ModelConfig
from dist_train.errors import UseError, WorkError
from dist_train.models.backbones import timm_name
from dist_train.models.names import is_paper_name
from dist_train.models.saved import STATE_NAME, choose_checkpoint, read_document
from dist_train.models.timm_models import classifier_names, timm_arguments

HUB_TAGS = ("orig_in21k", "augreg_in21k", "tv_in1k", "ra_in1k")
"""What plain `hub` takes for a paper's name, the first that timm has: the paper's ViTs, the smaller ViTs, the ResNets,
EfficientNet."""
HUB_FOLDER = "config.json"
"""The file by which a folder in the format of timm's hub is known."""
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
AVERAGED = ":ema"
"""Behind a run's or checkpoint's folder: its averaged weights."""
_HALF = (0.5, 0.5, 0.5)

Triple = tuple[float, float, float]


# ---------------------------------------------------------------- timm's hub
def hub_name(backbone: str, tag: str = "") -> str:
    """timm's name for the pretrained weights `tag` of `backbone`, as `vit_base_patch16_224.orig_in21k`.

    Without a tag, for a paper's name, the first of HUB_TAGS that there is, and of several training resolutions the
    lowest; for a timm name the tag in it, or else timm's default. Raises UseError if timm has no such weights.
    """
    if not is_paper_name(backbone):
        return _timm_hub_name(backbone, tag)
    pattern = re.compile(rf"{re.escape(backbone)}(_(\d+))?\.(.+)")
    matches = [match for name in timm.list_pretrained(f"{backbone}*") if (match := pattern.fullmatch(name))]
    matches.sort(key=lambda match: int(match[2] or 0))
    names: dict[str, str] = {}
    for match in matches:
        names.setdefault(match[3], match[0])
    if not names:
        raise UseError(f"model.weights: timm has no pretrained weights for {backbone}; use none, or give a file")
    for wanted in [tag] if tag else HUB_TAGS:
        if wanted in names:
            return names[wanted]
    raise _unknown_tag(backbone, tag, names)


def _timm_hub_name(backbone: str, tag: str) -> str:
    architecture, _, own = backbone.partition(".")
    if tag and own and tag != own:
        raise UseError(f"model.weights hub:{tag} is not the tag in model.backbone {backbone}; give one of them")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if not tags:
        raise UseError(f"model.weights: timm has no pretrained weights for {architecture}; use none, or give a file")
    default = timm.get_pretrained_cfg(architecture)
    wanted = tag or own or (default.tag if default and default.tag in tags else tags[0])
    if wanted not in tags:
        raise _unknown_tag(architecture, wanted, tags)
    return f"{architecture}.{wanted}"


def _unknown_tag(backbone: str, tag: str, tags: Sequence[str] | dict[str, str]) -> UseError:
    nearest = difflib.get_close_matches(tag, tags, n=1, cutoff=0.0)[0]
    return UseError(
        f"model.weights: timm has no weights {tag or 'of the default tags'} for {backbone}; "
        f"the nearest is hub:{nearest} (there are {', '.join(sorted(tags))})"
    )


def hub_tag(source: str) -> str | None:
    """The tag of model.weights `hub:TAG`, "" of `hub`, None of anything else."""
    return source.removeprefix("hub").removeprefix(":") if source == "hub" or source.startswith("hub:") else None


def read_hub(backbone: str, tag: str = "", image_size: int = 0) -> dict[str, Tensor]:
    """Pretrained tensors of `backbone` by plain name, through timm: of a paper's name at the size they were trained at,
    else as timm fits them to `image_size`.

    Raises UseError if timm does not know them and WorkError if they are neither in the local cache nor
    available from the hub.
    """
    name = hub_name(backbone, tag)
    arguments = {} if is_paper_name(backbone) else timm_arguments(backbone, image_size)
    try:
        with torch.random.fork_rng(devices=[]):
            # With its own number of classes, because only then timm insists that no tensor is missing.
            return timm.create_model(name, pretrained=True, **arguments).state_dict()
    except Exception as error:  # the hub's client raises errors of several libraries
        raise WorkError(
            f"model.weights: cannot get {name} from the hub or its local cache ({first_line(error)}); fetch it "
            f"where there is a network and use the same HF_HOME with HF_HUB_OFFLINE=1, or give a file"
        ) from error


def fit_by_timm(backbone: str, image_size: int, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of a file as timm's model of that name holds them at `image_size`: in today's names, with positions and
    windows resampled, all of it by timm's own code for that architecture. Raises WorkError where one is missing, has no
    place or has another shape.
    """
    with torch.random.fork_rng(devices=[]):
        arguments = timm_arguments(backbone, image_size)
        with torch.device("meta"):
            classifier = classifier_names(timm.create_model(backbone, **arguments))[0]
        weight = tensors.get(f"{classifier}.weight")
        classes = 0 if weight is None else len(weight)
        given = {"state_dict": dict(tensors), "num_classes": classes, "label_offset": 0}
        try:
            model = timm.create_model(
                backbone, pretrained=True, num_classes=classes, pretrained_cfg_overlay=given, **arguments
            )
        except Exception as error:  # of an architecture's own conversion, or of torch for what does not fit
            why = " ".join(str(error).split())[:300]
            raise WorkError(
                f"model.weights {source}: does not fit {backbone} ({why}); give the weights of this backbone, or set "
                "model.backbone to theirs"
            ) from error
    return model.state_dict()


def hub_folder_file(folder: Path) -> Path:
    """The weights in a folder of the hub's format. Raises UseError where there are none."""
    for name in _FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UseError(f"model.weights: {folder} has a {HUB_FOLDER} but none of {', '.join(_FOLDER_WEIGHTS)}")


def read_hub_folder(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder in the format of timm's hub says. Raises WorkError where it cannot be read."""
    try:
        document = json.loads((folder / HUB_FOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkError(f"{folder / HUB_FOLDER}: cannot be read ({first_line(error)}); get it again") from None
    return document if isinstance(document, dict) else {}


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# ---------------------------------------------------------------- mean and deviation
def normalisation(config: ModelConfig, image_size: int) -> tuple[Triple, Triple]:
    """Mean and deviation of the images that the starting weights were trained on: what data.mean and data.std `auto`
    are. 0.5 without weights; of a file that does not say, those of timm's default weights for the backbone."""
    source = config.weights
    if source == "none":
        return _HALF, _HALF
    tag = hub_tag(source)
    if tag is not None:
        return _of_timm(hub_name(config.backbone, tag))
    path = Path(source.removesuffix(AVERAGED))
    found: dict[str, Any] = {}
    if (path / HUB_FOLDER).is_file():
        document = read_hub_folder(path)
        described = document.get("pretrained_cfg", document)
        found = described if isinstance(described, dict) else {}
    elif (path / "checkpoints").is_dir():
        found = read_document(choose_checkpoint(path, "auto", "model.weights").checkpoint)["recipe"]["data"]
    elif (path / STATE_NAME).is_file() or (path.parent / STATE_NAME).is_file():
        folder = path if path.is_dir() else path.parent
        found = read_document(folder)["recipe"]["data"]
    else:
        found = read_metadata(path)
    mean, std = _triple(found.get("mean")), _triple(found.get("std"))
    return (mean, std) if mean and std else _of_timm(timm_name(config.backbone, image_size)[0])


def _of_timm(name: str) -> tuple[Triple, Triple]:
    described = timm.get_pretrained_cfg(name)
    mean, std = (None, None) if described is None else (_triple(described.mean), _triple(described.std))
    return mean or _HALF, std or _HALF


def _triple(value: Any) -> Triple | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
        return None
    return float(value[0]), float(value[1]), float(value[2])


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors; {} of any other."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise WorkError(f"{path}: not a readable weights file ({first_line(error)}); get it again") from None
