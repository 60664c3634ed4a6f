"""A finished run as a folder in the format that timm shares models in, with a model card; and pushed to the hub.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and `hf-hub:USER/NAME` once it is pushed.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import save_for_hf
from torch import nn

from dist_train.config import recipe_to_dict
from dist_train.errors import UseError, WorkError, written
from dist_train.files import sync
from dist_train.models.backbones import timm_name
from dist_train.models.build import to_timm_state_dict
from dist_train.models.classifier import Classifier
from dist_train.models.pretrained import first_line
from dist_train.models.saved import read_step
from dist_train.train.checkpoint import read_state
from dist_train.train.record import read_evaluations
from dist_train.use.export import check_fits, describe_crop
from dist_train.use.trained import TrainedModel

_SAME = 1e-4
"""Largest difference of timm's logits that passes, relative to the largest logit."""
_OF_THIS_MACHINE = {"data": ("shards", "cache", "cache_gb", "threads", "prefetch"), "train": ("run", "wandb_project")}
"""Keys of a recipe that say nothing about the model, and may say more than one wants to publish."""


def export_hub_folder(trained: TrainedModel, folder: Path, licence: str | None = None) -> str:
    """Write config.json, model.safetensors and README.md into a new folder, whole or not at all, after timm has loaded
    them and given the model's logits. Returns how they are loaded, in words.

    licence: of the model, as the hub names it (apache-2.0, cc-by-nc-4.0, ...); None leaves it open. Raises UseError for
    a folder that holds something and for a model that timm has no place for.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UseError(f"{folder}: is there already; name a new folder, or delete it")
    with _draft(trained, folder.absolute().parent, folder, licence) as draft, written(folder, "choose another"):
        os.replace(draft, folder)
        sync(folder.absolute().parent)
    return f"{folder}: loads by timm.create_model('local-dir:{folder}', pretrained=True)"


def push_to_hub(trained: TrainedModel, name: str, licence: str | None = None, public: bool = False) -> str:
    """Upload such a folder to `name`, USER/NAME, on the Hugging Face hub, which makes a repository there if there is
    none: a private one unless `public`. Returns where it is, in words.

    Raises UseError without a token, WorkError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if not get_token():
        raise UseError(f"--hub {name}: no token of the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="dist-train")
    with tempfile.TemporaryDirectory() as parent, _draft(trained, Path(parent), Path(name), licence, name) as draft:
        try:
            made = api.create_repo(name, private=not public, exist_ok=True)
            message = f"Model after step {read_step(trained.checkpoint)}"
            api.upload_folder(repo_id=made.repo_id, folder_path=draft, commit_message=message)
        except HFValidationError as error:
            raise UseError(f"--hub {name}: {first_line(error)}") from None
        except (OSError, RuntimeError, ValueError) as error:  # of huggingface_hub, and of what it talks HTTP with
            raise WorkError(f"--hub {name}: not uploaded ({first_line(error)})") from None
        except Exception as error:
            if not type(error).__module__.startswith(("http", "requests")):
                raise
            raise WorkError(f"--hub {name}: the hub cannot be reached ({first_line(error)})") from None
    return f"{made}: loads by timm.create_model('hf-hub:{made.repo_id}', pretrained=True)"


@contextmanager
def _draft(
    trained: TrainedModel, parent: Path, named: Path, licence: str | None, hub_name: str | None = None
) -> Iterator[Path]:
    """The folder under a temporary name, checked; it is gone afterwards unless it was given another name."""
    ours = copy.deepcopy(trained.model).cpu()
    model = _timm_model(trained, ours)
    with written(named, "choose another"):
        draft = parent / f".{named.name}.{os.getpid()}.tmp"
        shutil.rmtree(draft, ignore_errors=True)  # of a process of that number that was killed
        draft.mkdir(parents=True)
    try:
        with written(named, "choose another"):
            data = trained.recipe.data
            preprocessing = {
                "input_size": (3, data.image_size, data.image_size),
                "interpolation": "bilinear",
                "crop_pct": 1.0 if data.eval_crop == "squash" else data.eval_crop_pct,
                "crop_mode": data.eval_crop,
                "mean": tuple(data.mean),
                "std": tuple(data.std),
            }
            save_for_hf(
                model,
                str(draft),
                {"label_names": trained.class_names},
                safe_serialization=True,
                data_config=preprocessing,
            )
            card = model_card(trained, hub_name, licence)
            (draft / "README.md").write_text(card, encoding="utf-8")
            for file in draft.iterdir():
                sync(file)
        _check(ours, timm.create_model(f"local-dir:{draft}", pretrained=True), data.image_size, named)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _timm_model(trained: TrainedModel, ours: Classifier) -> nn.Module:
    """timm's model with the run's weights."""
    recipe = trained.recipe
    weights, extra = to_timm_state_dict(ours)
    if extra:
        text = " and reads tags" if recipe.model.text_tokens else ""
        raise UseError(
            f"timm has no place for this model, which has the {recipe.model.head} head{text}: export it as FILE.onnx, "
            "or as FILE.safetensors, whose backbone timm loads"
        )
    name, arguments = timm_name(recipe.model.backbone, recipe.data.image_size)
    arguments["num_classes"] = len(trained.class_names)
    check_fits(weights, name, arguments)
    model = timm.create_model(name, **arguments)
    model.load_state_dict(weights, strict=True)
    return model


@torch.no_grad()
def _check(ours: Classifier, loaded: nn.Module, side: int, named: Path) -> None:
    """Raise WorkError where timm's logits of two images of noise are not the model's."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    wanted = ours(images)
    difference = float((loaded.eval()(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))
    if not difference <= _SAME:
        raise WorkError(
            f"{named}: not written: timm's logits differ from the model's by {difference:.2g} of the largest; export "
            "it as FILE.onnx"
        )


# ---------------------------------------------------------------------- the card
def model_card(trained: TrainedModel, hub_name: str | None, licence: str | None) -> str:
    """README.md: what the hub reads about a model, its results, its data, and how one uses it."""
    recipe, state = trained.recipe, read_state(trained.checkpoint)
    front: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm"],
    }
    if licence:
        front["license"] = licence
    settings = recipe_to_dict(recipe)
    for section, keys in _OF_THIS_MACHINE.items():
        for key in keys:
            settings[section].pop(key, None)
    for entries in settings.values():
        for key, value in entries.items():
            if isinstance(value, str) and os.sep in value:  # nor where something lay
                entries[key] = Path(value).name
    of_tags = recipe.data.labels == "tags"
    source = f"hf-hub:{hub_name}" if hub_name else "local-dir:FOLDER"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {recipe.model.backbone}, {len(trained.class_names)} {"tags" if of_tags else "classes"}

Trained with dist-train for images of {recipe.data.image_size} pixels, {state.step:,} steps,
{"averaged" if trained.averaged else "raw"} weights. Names of {"tags" if of_tags else "classes"} are in `config.json`.

## Results

{_results(trained, state.step)}
## Data

Shard set with the digest `{state.manifest_digest}`.

## Use

The model sees {describe_crop(recipe.data)}; timm's transform does it.

```python
import timm
import torch
from PIL import Image

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.jpg").convert("RGB"))
with torch.no_grad():
    probabilities = model(image[None]).{"sigmoid()" if of_tags else "softmax(dim=1)"}[0]
best = probabilities.topk(min(5, len(probabilities)))
names = model.pretrained_cfg["label_names"]
print([(names[i], float(p)) for p, i in zip(best.values, best.indices)])
```

## Recipe

```yaml
{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()}
```
"""


def _results(trained: TrainedModel, step: int) -> str:
    """A table of the evaluations of just these weights in the record of the run that they are of: a checkpoint that
    was given by its folder may be another's."""
    of_tags = trained.recipe.data.labels == "tags"
    first, second = ("map", "f1_micro") if of_tags else ("top1", "top5")
    lines = []
    for entry in read_evaluations(trained.checkpoint.absolute().parents[1]):
        split, averaged = entry["split"].removesuffix("_ema"), entry["split"].endswith("_ema")
        if entry["step"] == step and averaged == trained.averaged:
            lines.append(f"| {split} | {entry['samples']:,} | {entry[first]:.4f} | {entry[second]:.4f} |\n")
    if not lines:
        return "These weights were not evaluated during training.\n"
    names = "mAP | micro F1" if of_tags else "top-1 | top-5"
    return f"| split | images | {names} |\n|---|---|---|---|\n" + "".join(lines)
