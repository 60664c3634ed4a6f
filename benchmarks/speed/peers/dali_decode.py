"""A ceiling: our reading and DALI's decoding of whole images, nothing after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from benchmarks.speed.peers import Task
from benchmarks.speed.peers.bytes_only import encoded_batches

NOTE = "decodes whole images (ours only the region it needs), does nothing else"


def batches(task: Task) -> Iterator[Any]:
    """Batches of decoded images of their own sizes."""

    @pipeline_def(batch_size=task.batch_size, num_threads=task.threads, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1, no_copy=True)
        return fn.decoders.image(encoded, output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    source = encoded_batches(task)
    held = [next(source)]  # what DALI works on must stay mapped
    pipeline.feed_input("images", held[0])
    while True:
        held = [held[-1], next(source)]
        pipeline.feed_input("images", held[-1])
        pipeline.schedule_run()
        (output,) = pipeline.share_outputs()
        yield output
        pipeline.release_outputs()
