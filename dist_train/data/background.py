"""Batches made off the training thread: a thread of its own makes them ahead, into a bounded queue.

Everything that a batch costs the host is paid in that thread; the thread that trains takes what is ready. What the
maker raises is raised there in its turn, after the batches made before. The thread ends with the batches, and when the
iterator over them is closed, forgotten or left by an exception, or the interpreter exits.

On a GPU the maker works on a CUDA stream of its own, so that nothing it waits for holds up the training step;
`_Handover` has what makes that safe.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.remote import IsStopped

log = logging.getLogger(__name__)

END_S = 10.0  # how long the end of the thread is waited for: it may be waiting for a silent server


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples.

    images: (B, 3, S, S) float32, normalised. labels: (B,) int64. weights: (B,) float32, 0 for the stand-in of a sample
    that cannot be used, else 1. text_ids, text_mask: (B, T) int64 and bool, or None. All on the loader's device.
    samples: (B,) indexes in the manifest's order. tags: (B, tags) bool, which tags a sample has, where the model is to
    predict them (data.labels tags); else None.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    text_ids: Tensor | None
    text_mask: Tensor | None
    samples: NDArray[np.int64]
    tags: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What the model is to predict: the tags where they are there, else the labels."""
        return self.labels if self.tags is None else self.tags


MakeBatches = Callable[[IsStopped], Generator[Batch, None, None]]


def made_ahead(make: MakeBatches, depth: int, device_id: int | None) -> Iterator[Batch]:
    """The batches of the generator that `make` returns, made in a thread, `depth` of them ready before they are taken.

    `make` is told how to find out that it is to stop; the generator is run and closed in the thread. device_id: the GPU
    that the batches are on, or None. Raises what the generator raises.
    """
    maker = _Maker(make, depth, device_id)
    try:  # from the start on: Ctrl-C may come at any time
        maker.start()
        while (batch := maker.take()) is not None:
            yield batch
    finally:
        maker.close()


class _Maker:
    """The thread, its queue, and how it ended."""

    def __init__(self, make: MakeBatches, depth: int, device_id: int | None) -> None:
        self._make, self._depth, self._handover = make, depth, _Handover(device_id)
        self._changed = threading.Condition()
        self._ready: deque[tuple[Batch, torch.cuda.Event | None]] = deque()
        self._error: BaseException | None = None
        self._stopped = self._ended = False
        # A daemon, as the interpreter waits for other threads before it calls anything that could tell them to end.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def start(self) -> None:
        """Let the thread begin."""
        atexit.register(self.close)
        self._thread.start()

    def take(self) -> Batch | None:
        """The next batch, None after the last. Raises what the maker of batches raised."""
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait()  # signals get through, so Ctrl-C does
            if not self._ready:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return None
            batch, done = self._ready.popleft()
            self._changed.notify_all()
        return self._handover.receive(batch, done)

    def close(self) -> None:
        """End the thread and drop what is ready. Calling it twice does no harm."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(END_S)
        if self._thread.is_alive():
            log.warning("the thread that makes batches still waits for its shards; it ends when they come")
        self._ready.clear()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            with self._handover.making(), closing(self._make(lambda: self._stopped)) as batches:
                for batch in batches:
                    if not self._put(batch):
                        break
        except BaseException as error:  # whatever it is, the thread that takes the batches has to know
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, batch: Batch) -> bool:
        """Wait for room in the queue; False: nobody wants the batch any more."""
        done = self._handover.made()
        with self._changed:
            while len(self._ready) >= self._depth and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._ready.append((batch, done))
                self._changed.notify_all()
            return not self._stopped


class _Handover:
    """How tensors pass from the stream that makes them to the stream that uses them; on the CPU there is nothing to do.

    The maker's stream marks with an event where a batch is complete, and the user's stream (not the host) waits for it.
    `record_stream` keeps the memory from going back to the maker before what the user's stream does with it is done.
    """

    def __init__(self, device_id: int | None) -> None:
        self.device_id = device_id

    @contextmanager
    def making(self) -> Iterator[None]:
        """While this lasts, the calling thread works on a stream of its own."""
        if self.device_id is None:
            yield
            return
        torch.cuda.set_device(self.device_id)
        with torch.cuda.stream(torch.cuda.Stream(self.device_id)):
            yield

    def made(self) -> torch.cuda.Event | None:
        """Called by the maker when all work on a batch is on its stream."""
        return None if self.device_id is None else torch.cuda.current_stream(self.device_id).record_event()

    def receive(self, batch: Batch, done: torch.cuda.Event | None) -> Batch:
        """Called by the user: the batch, safe on its current stream."""
        if done is not None:
            stream = torch.cuda.current_stream(self.device_id)
            stream.wait_event(done)
            for part in vars(batch).values():  # all there are: of one left out, the maker writes over what is in use
                if isinstance(part, Tensor):
                    part.record_stream(stream)
        return batch
