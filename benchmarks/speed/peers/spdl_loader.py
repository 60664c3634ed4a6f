"""SPDL: a pipeline of threads over the same tars; FFmpeg decodes, crops and scales. It has no colour jitter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import spdl.io
import torch
from spdl.pipeline import PipelineBuilder
from torchvision.transforms import v2

from benchmarks.speed.peers import MEAN, STD, Task
from benchmarks.speed.peers.torchvision_v2 import TarImages

NOTE = "RandomResizedCrop and flip as FFmpeg filters, scaled by swscale; no colour jitter"


def prepare(task: Task) -> None:
    """Decode an image: where FFmpeg's libraries are missing that fails, and a pipeline would go on without end."""
    spdl.io.decode_packets(spdl.io.demux_image(TarImages(task.tars, bytes, bytes)[0][0]))


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    encoded = TarImages(task.tars, bytes, lambda data: data)
    draw_box = v2.RandomResizedCrop(task.size, *task.crop_range)

    def decode(data: bytes) -> Any:
        packets = spdl.io.demux_image(data)
        box = draw_box.make_params([torch.empty(1, packets.codec.height, packets.codec.width, device="meta")])
        filters = [f"crop={box['width']}:{box['height']}:{box['left']}:{box['top']}:exact=1"]
        filters += [f"scale={task.size}:{task.size}:flags=bilinear", *(["hflip"] if random.random() < 0.5 else [])]
        return spdl.io.decode_packets(packets, filter_desc=",".join([*filters, "format=pix_fmts=rgb24"]))

    def finish(frames: list[Any]) -> torch.Tensor:
        images = spdl.io.to_torch(spdl.io.convert_frames(frames))  # (B, H, W, 3) uint8
        return ((images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()

    builder = (
        PipelineBuilder()
        .add_source(_endless(encoded))
        .pipe(decode, concurrency=task.threads)
        .aggregate(task.batch_size, drop_last=True)
        .pipe(finish)
        .add_sink(4)
    )
    pipeline = builder.build(num_threads=task.threads)
    with pipeline.auto_stop():
        yield from pipeline


def _endless(encoded: TarImages) -> Iterator[bytes]:
    while True:
        for index in torch.randperm(len(encoded)).tolist():
            yield encoded[index][0]
