"""The formats in which a finished run leaves the house, by the name of what is to be written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.errors import UseError
from dist_train.machine import is_installed

if TYPE_CHECKING:
    from dist_train.use.trained import TrainedModel


def check_target(target: Path) -> None:
    """Raise UseError for what is none of the formats below, or needs a package that is missing. It is quick."""
    if target.suffix not in (".onnx", ".safetensors", "") and not target.is_dir():
        raise UseError(f"{target}: name a file .onnx or .safetensors, or a new folder without a dot")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not is_installed(name)]
    if target.suffix == ".onnx" and missing:
        raise UseError(f"{target}: needs {', '.join(missing)}; pip install 'dist-train[onnx]'")


def export_as(trained: TrainedModel, target: Path, licence: str | None = None) -> str:
    """Write FILE.onnx (`onnx_file`), FILE.safetensors (`export`) or a FOLDER in timm's format (`hub_folder`). Returns
    what it is and how it is loaded, in words. licence: for the folder's model card. Raises as `check_target`."""
    check_target(target)
    if target.suffix == ".safetensors":
        from dist_train.use.export import export

        return export(trained, target)
    if target.suffix == ".onnx":
        from dist_train.use.onnx_file import export_onnx  # of an extra

        return export_onnx(trained, target)
    from dist_train.use.hub_folder import export_hub_folder

    return export_hub_folder(trained, target, licence)
