"""The formats in which a finished run leaves the house, by the name of what is to be written."""

from __future__ import annotations

from pathlib import Path

from dist_train.use.export import export
from dist_train.use.trained import TrainedModel


def export_as(trained: TrainedModel, target: Path, licence: str | None = None) -> str:
    """Write FILE.onnx (`onnx_file`), FILE.safetensors (`export`) or a FOLDER in timm's format (`hub_folder`). Returns
    what it is and how it is loaded, in words. licence: for the folder's model card."""
    if target.suffix == ".safetensors":
        return export(trained, target)
    if target.suffix == ".onnx":
        from dist_train.use.onnx_file import export_onnx  # of an extra

        return export_onnx(trained, target)
    from dist_train.use.hub_folder import export_hub_folder

    return export_hub_folder(trained, target, licence)
