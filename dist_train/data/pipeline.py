"""Encoded images in, normalised float tensors (3, S, S) out, on the CPU or the GPU.

Where to crop, whether to flip and how to change the colours come in as per-sample arguments (`augment.py`); DALI's own
random generators are not used. Crop and resize are one step: cutting image_size of (image_size + crop_margin) from the
resized square is the same as resizing that share of the original. Images baked to that square are cut without any
resampling. `graph.py` has what DALI does of it; `colour.py` and `colour_triton.py` change the colours; `operations.py`
and `operations_torch.py` have what comes before (RandAugment) and after (blur, erasing).
"""

from __future__ import annotations

import os
import stat
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, blur_kernels, colour_parameters, has_operations, needs_sizes
from dist_train.data.auto_augment import affine_maps
from dist_train.data.crops import Regions, regions_of_boxes, regions_of_centres
from dist_train.data.graph import cpu_graph, crop_input, gpu_graph, region_inputs


def load_compiled_passes(operations: bool = False) -> None:
    """Load what the CPU pipeline computes with, once a process: it takes a second, which a GPU's process can save.
    operations: also those of RandAugment, blur and erasing.

    The compiled code is kept beside the source or in the user's cache; where neither can be written, as by a user
    without a home in a container, in a folder of the user's own among the temporary files.
    """
    try:
        _import_compiled_passes(operations)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        import numba

        numba.config.CACHE_DIR = str(_own_temporary_folder())
        _import_compiled_passes(operations)


def _import_compiled_passes(operations: bool) -> None:
    import dist_train.data.colour
    import dist_train.data.resize

    if operations:
        import dist_train.data.operations  # noqa: F401


def _own_temporary_folder() -> Path:
    """The same for all processes of a user. Numba runs what it finds there: nobody else may have put it."""
    folder = Path(tempfile.gettempdir()) / f"dist-train-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp())


class UndecodableError(RuntimeError):
    """DALI gave up a batch, as it does for any bad image in it."""

    def reason(self) -> str:
        """The line of DALI's long message that says what is wrong with the image."""
        cause = str(self).partition("encountered:")[2] or str(self)
        lines = [line.strip(" :") for line in cause.splitlines() if line.strip(" :")]
        return f"cannot be decoded ({lines[0][:200] if lines else type(self).__name__})"


class ImagePipeline:
    """Decodes and augments batches given in order; keeps up to `depth` of them under way.

    train: random crop, flip and all that follows, else a resize, of the whole or of the centre. baked: side in pixels
    of the square that every image of the set was resized to, or None. device_id: the GPU, or None for the CPU. depth:
    batches under way; there must be at least that many in all. Use: `feed` a batch `depth` times, then alternate `take`
    and `feed`; `close` in the end. A batch with an undecodable image raises UndecodableError in `feed` or `take`; the
    object is then unusable.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        train: bool,
        baked: int | None,
        batch_size: int,
        threads: int,
        device_id: int | None,
        depth: int,
    ) -> None:
        self.train = train
        self.device_id = device_id
        self.depth = depth
        self._size, self._square = config.image_size, config.image_size + config.crop_margin
        self._eval_share = config.eval_crop_pct
        self._by_size = needs_sizes(config, train)
        self._cut_only = not self._by_size and baked == (self._square if train else self._size)
        self._fed = 0
        self._has_operations = train and has_operations(config)
        self._under_way: deque[tuple[Augmentation, NDArray[np.float32], Regions | None]] = deque()
        self._workers = threads
        self._threads = ThreadPoolExecutor(threads, "augment")
        self._memory = _Memory((batch_size, 3, self._size, self._size), depth + config.prefetch)
        mean, std = np.array(config.mean), np.array(config.std)
        self._normalise = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        make = pipeline_def(cpu_graph if device_id is None else gpu_graph)
        self._pipeline: Pipeline = make(
            config,
            train,
            self._cut_only,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=depth,
        )
        self._pipeline.build()

    def feed(
        self,
        images: Sequence[TensorCPU | NDArray[np.uint8]],
        augmentation: Augmentation,
        sizes: NDArray[np.int32] | None = None,
    ) -> None:
        """Hand in one batch: encoded images, which must stay unchanged until taken, and their parameters.

        sizes: (B, 2), height and width, upright; needed where `needs_sizes` says so.
        """
        # Lists of DALI's own are taken as they are: looking into any other costs feed_input 10 us an image.
        views = [image if isinstance(image, TensorCPU) else TensorCPU(image) for image in images]
        encoded = TensorListCPU(views, contiguous=False)  # type: ignore[call-overload]  # which its stub lacks
        self._pipeline.feed_input("images", encoded)
        regions = self._regions_by_size(augmentation, sizes) if self._by_size else None
        if regions is not None:
            for name, values in region_inputs(regions, self.device_id is not None).items():
                self._pipeline.feed_input(name, TensorListCPU(values))
        elif self.train:
            self._pipeline.feed_input("crop", TensorListCPU(crop_input(augmentation, self._cut_only)))
        self._under_way.append((augmentation, colour_parameters(augmentation), regions))
        self._fed += 1
        if self._fed >= self.depth:  # DALI's first schedule_run starts `depth` batches at once
            with _undecodable():
                self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The oldest batch under way: (B, 3, S, S) float32 on the pipeline's device, the caller's to keep.

        On a GPU it is written in the order of the thread's current stream, and DALI has none of its memory.
        """
        return self._take_on_cpu() if self.device_id is None else self._take_on_gpu(self.device_id)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _take_on_gpu(self, device_id: int) -> torch.Tensor:
        """Change the colours of what DALI decoded and resized."""
        from dist_train.data import operations_torch
        from dist_train.data.colour_torch import fastest_colour_change

        device = torch.device("cuda", device_id)
        stream = torch.cuda.current_stream(device)
        with _undecodable():
            (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        augmentation, colours, _ = self._under_way.popleft()
        operations, last = self._operations(augmentation)
        pixels = torch.from_dlpack(output.as_tensor())
        if operations:
            pixels = operations_torch.apply_operations(pixels, *operations)
        tensor = fastest_colour_change(device, self._size)(
            pixels,
            torch.from_numpy(colours).pin_memory().to(device, non_blocking=True),
            *(tuple(values.tolist()) for values in self._normalise),
        )
        if last:
            operations_torch.blur_and_erase(tensor, *last)
        # DALI does not say in which order with the stream's work its memory is used again. Only the thread that makes
        # batches waits here.
        stream.synchronize()
        self._pipeline.release_outputs()
        return tensor

    def _take_on_cpu(self) -> torch.Tensor:
        """Resize, augment and colour what DALI decoded, the batch shared out among the threads."""
        from dist_train.data.colour import change_colours
        from dist_train.data.resize import resize_region

        with _undecodable():
            outputs = self._pipeline.share_outputs()
        augmentation, colours, regions = self._under_way.popleft()
        batch = len(colours)
        target = self._memory.take(batch)
        if self._cut_only:
            pixels = np.asarray(outputs[0].as_tensor())
        else:
            pixels = np.empty((batch, self._size, self._size, 3), np.uint8)
            decoded = [np.asarray(image) for image in outputs[0]]
            if regions is not None:
                start, length, origin, full = regions.start, regions.length, regions.origin, regions.full
            else:
                start, length, origin, full = self._regions(decoded, augmentation, outputs[1:])
        operations, last = self._operations(augmentation)
        if operations or last:
            from dist_train.data.operations import apply_operations, blur_and_erase
        if operations and self._cut_only:
            pixels = pixels.copy()  # operations work in place, and the memory is DALI's

        def part(first: int, end: int) -> None:
            if not self._cut_only:
                for i in range(first, end):
                    resize_region(decoded[i], origin[i], full[i], start[i], length[i], pixels[i])
            some = slice(first, end)
            if operations:
                apply_operations(pixels[some], *(values[some] for values in operations))
            change_colours(pixels[some], colours[some], *self._normalise, target[some])
            if last:
                blur_and_erase(target[some], *(values[some] for values in last))

        bounds = [batch * i // self._workers for i in range(self._workers + 1)]
        for done in [self._threads.submit(part, *ends) for ends in pairwise(bounds)]:
            done.result()
        self._pipeline.release_outputs()
        return torch.from_numpy(target)

    def _operations(self, augmentation: Augmentation) -> tuple[tuple[NDArray[Any], ...], tuple[NDArray[Any], ...]]:
        """What `apply_operations` and `blur_and_erase` take beside the images, (B, ...) each; empty if there is nothing
        to do."""
        if not self._has_operations:
            return (), ()
        return _operation_parameters(augmentation, self._size), _last_parameters(augmentation)

    def _regions_by_size(self, augmentation: Augmentation, sizes: NDArray[np.int32] | None) -> Regions:
        if self.train:
            return regions_of_boxes(augmentation.box)
        if sizes is None:
            raise ValueError("data.eval_crop center needs the images' sizes")
        return regions_of_centres(sizes, self._size, self._eval_share)

    def _regions(
        self, decoded: list[NDArray[np.uint8]], augmentation: Augmentation, places: Sequence[Any]
    ) -> tuple[NDArray[Any], ...]:
        """What to resize: start, length, origin of what was decoded, size of the whole; (B, 2), (y, x) in pixels."""
        if not self.train:
            full = np.array([image.shape[:2] for image in decoded], np.int32)
            nothing = np.zeros_like(full)
            return nothing.astype(np.float64), full.astype(np.float64), nothing, full
        origin, full = (np.asarray(place.as_tensor()) for place in places)
        return augmentation.crop / self._square * full, self._size / self._square * full, origin, full


def _operation_parameters(augmentation: Augmentation, side: int) -> tuple[NDArray[Any], ...]:
    operations, magnitudes = augmentation.operations, augmentation.magnitudes
    if not operations.size:
        return ()
    return augmentation.flip, operations, magnitudes, affine_maps(operations, magnitudes, side)


def _last_parameters(augmentation: Augmentation) -> tuple[NDArray[Any], ...]:
    blurred = augmentation.blur > 0
    if not blurred.any() and not augmentation.erased.any():
        return ()
    return blurred, blur_kernels(np.where(blurred, augmentation.blur, 1)), augmentation.erased


class _Memory:
    """Arrays for finished batches. One that its user has dropped is used again: the pages of new memory cost as much as
    the colour change. shape: of the largest. spare: most arrays that are kept for later."""

    def __init__(self, shape: tuple[int, ...], spare: int) -> None:
        self._shape, self._spare = shape, spare
        self._free: list[NDArray[np.float32]] = []

    def take(self, batch: int) -> NDArray[np.float32]:
        """The first `batch` rows of an array that nobody uses."""
        whole = self._free.pop() if self._free else np.empty(self._shape, np.float32)
        rows = whole[:batch]
        weakref.finalize(rows, self._put_back, whole).atexit = False  # tensors and their views hold `rows`
        return rows

    def _put_back(self, whole: NDArray[np.float32]) -> None:
        if len(self._free) < self._spare:
            self._free.append(whole)


@contextmanager
def _undecodable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UndecodableError(str(error)) from error
