"""`dist-train demo RUN`: a page on this machine on which one tries a finished run on images of one's own."""

from __future__ import annotations

import html
import math
import os
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dist_train.data.device import decoding_gpu
from dist_train.data.images import BadImage
from dist_train.data.loader import Batch
from dist_train.data.reader import ImageReader
from dist_train.data.tags import tag_line
from dist_train.errors import WorkError
from dist_train.train.engine import torch_device
from dist_train.train.pictures import to_pixels
from dist_train.use.look import find_importance, overlay
from dist_train.use.multilabel import predicts_tags, probabilities_of
from dist_train.use.trained import TrainedModel

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: it would tell its maker of each start

_LARGEST_FILE = "64mb"
_SHOWN = 5
"""Classes with their probabilities."""


class Viewer:
    """Answers one question at a time: DALI's pipeline and the model are one each.

    reader: of the run's images.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained
        config = trained.recipe.data
        self._reader = ImageReader(config, decoding_gpu(config, trained.place.device_id))
        self._device = torch_device(trained.place)
        self._lock = threading.Lock()

    def look(self, path: Path, tags: str = "") -> tuple[dict[str, float], Image.Image, str]:
        """The most probable classes of an image file with their probabilities, what the model looks at for the first,
        and a sentence about it. Raises BadImage for what is no image."""
        with self._lock, torch.no_grad():
            batch = self._batch(path.read_bytes(), tags)
            probabilities = probabilities_of(self.trained, self.trained.forward(batch))[0].cpu()
            best = probabilities.topk(min(_SHOWN, len(probabilities)))
            first = int(best.indices[0])
            importance = find_importance(self.trained.forward, batch, first, predicts_tags(self.trained))
        names = self.trained.class_names
        shares = {names[i]: value for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        picture = overlay(to_pixels(batch.images, self.trained.recipe.data)[0], importance)
        return shares, picture, _sentence(names[first], float(best.values[0]), float(importance.max()))

    def _batch(self, encoded: bytes, tags: str) -> Batch:
        images = self._reader.read(encoded).to(self._device)  # which data.device cpu leaves in main memory
        ids = mask = None
        if self.trained.tokenizer is not None:
            ids, mask = (part.to(images.device) for part in self.trained.tokenizer([tag_line(tags)]))
        none = torch.zeros(1, dtype=torch.int64)
        return Batch(images, none, torch.ones(1), ids, mask, none.numpy())


def _sentence(name: str, probability: float, fall: float) -> str:
    """In HTML, in which a class's name is text."""
    left = probability * math.exp(-max(fall, 0))
    return (
        f"Red: what counts for <b>{html.escape(name)}</b>. Covering the reddest part lowers its probability from "
        f"{probability:.0%} to about {left:.0%}."
    )


def build_page(trained: TrainedModel) -> Any:
    """The page as gradio.Blocks."""
    import gradio

    viewer = Viewer(trained)

    def answer(path: str | None, tags: str = "") -> tuple[dict[str, float] | None, Image.Image | None, str]:
        if path is None:
            return None, None, ""
        try:
            return viewer.look(Path(path), tags)
        except BadImage as problem:
            raise gradio.Error(html.escape(f"Not an image that can be used: {problem}")) from None

    with gradio.Blocks(title=f"dist-train: {trained.run.name}", analytics_enabled=False) as page:
        backbone, classes = trained.recipe.model.backbone, len(trained.class_names)
        gradio.HTML(f"<h2>{html.escape(trained.run.name)}</h2>{html.escape(backbone)}, {classes:,} classes")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"])
                inputs: list[Any] = [image]
                if trained.tokenizer is not None:
                    inputs.append(gradio.Textbox(label="Tags", placeholder="separated by commas"))
                button = gradio.Button("Predict", variant="primary")
            with gradio.Column():
                prediction = gradio.Label(num_top_classes=_SHOWN, label="Prediction")
                looked = gradio.Image(
                    label="Where the model looks", interactive=False, format="png", buttons=["download", "fullscreen"]
                )
                about = gradio.HTML()
        outputs = [prediction, looked, about]
        button.click(answer, inputs, outputs, api_name="predict")
        image.upload(answer, inputs, outputs)
    return page


def serve(trained: TrainedModel, port: int, host: str = "127.0.0.1") -> Any:
    """Start the page and return its gradio.Blocks, which `block_thread` keeps up. Raises WorkError where the port is
    taken."""
    import gradio

    page = build_page(trained)
    plain = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # its own come from Google
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=_LARGEST_FILE,
            footer_links=[],
            ssr_mode=False,
            theme=plain,
        )
    except (OSError, OverflowError) as error:  # the latter of a number that is no port
        raise WorkError(f"--port {port}: the page cannot be served there ({error}); choose another") from None
    return page
