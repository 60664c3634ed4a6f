"""Batches with state: plan + fetch + augment + pipeline + text, in a thread of its own (`background.py`).

The state of a loader is one integer, the number of samples consumed; whatever has been prepared ahead is not state. A
training loader is endless: the run is the concatenation of its epochs.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from nvidia.dali.tensors import TensorCPU
from PIL import Image
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.augment import draw_augmentation, has_operations, needs_sizes, no_augmentation
from dist_train.data.background import Batch, made_ahead
from dist_train.data.device import decoding_gpu
from dist_train.data.fetch import FetchedBatch, ShardFetcher
from dist_train.data.images import to_ppm
from dist_train.data.manifest import Manifest, check_has_tags
from dist_train.data.pipeline import ImagePipeline, UndecodableError, load_compiled_passes
from dist_train.data.plan import EpochPlan, Need, Positions, evaluation_batches, micro_batch_of, needs_of
from dist_train.data.quarantine import Quarantine
from dist_train.data.remote import IsStopped
from dist_train.data.tags import shuffle_tags
from dist_train.data.targets import TagTargets
from dist_train.data.tokenizer import TagTokenizer
from dist_train.place import Place
from dist_train.ranges import check_section

log = logging.getLogger(__name__)

UNDER_WAY = 2  # batches in DALI's hands: one is decoded while the one before is finished


class _Loader:
    """What training and evaluation share: positions in, batches out, bad samples replaced and recorded."""

    train = False
    seed = 0  # of the augmentation and of the order of tags; only training has them

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        split: str,
        place: Place,
        *,
        batch_size: int,
        tokenizer: TagTokenizer | None = None,
        quarantine: Path | None = None,
        tag_targets: TagTargets | None = None,
    ) -> None:
        check_section("data", config)
        if tokenizer is not None or tag_targets is not None:
            check_has_tags(config, manifest)
        self.config, self.manifest, self.place = config, manifest, place
        self.batch_size, self.tokenizer, self.split, self.tag_targets = batch_size, tokenizer, split, tag_targets
        self._texts_read, self._texts_are_looked_at = 0, place.rank == 0
        self.bad = Quarantine(quarantine, split, config.max_bad_samples, place.rank)
        self.threads = config.threads or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
        self.device_id = decoding_gpu(config, place.device_id)
        self._noted_odd = False
        self._kept: ImagePipeline | None = None  # for the next iteration: on a GPU, DALI takes 1.6 s to build one
        if self.device_id is None:
            load_compiled_passes(self.train and has_operations(config))  # not when the first batch waits for it
        self.fetcher = ShardFetcher(
            config.shards,
            manifest.split(split),
            len(manifest.classes),
            config=config,
            baked=manifest.baked_size(),
            ranks=place.local_world_size,
            threads=self.threads,
            with_sizes=needs_sizes(config, self.train),
        )

    def __iter__(self) -> Iterator[Batch]:
        return made_ahead(self._make, self.config.prefetch, self.place.device_id)

    def _make(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        """The batches, as they are made by the thread that is ahead."""
        raise NotImplementedError

    def _batches(self, positions: Iterator[Positions], depth: int = UNDER_WAY) -> Generator[Batch, None, None]:
        """Batches for a sequence of non-empty positions, `depth` of them under way; there must be that many."""
        pipeline, self._kept = self._kept, None
        under_way: deque[tuple[Positions, FetchedBatch]] = deque()
        try:
            while True:
                fresh = []
                while len(under_way) < depth and (chosen := next(positions, None)) is not None:
                    under_way.append((chosen, self._fetch(chosen)))
                    fresh.append(under_way[-1])
                if not under_way:
                    if pipeline is not None and pipeline.depth == depth:  # else one for the last few of few
                        self._kept, pipeline = pipeline, None
                    return
                if pipeline is None:
                    pipeline, fresh = self._pipeline(self.batch_size, len(under_way)), list(under_way)
                try:
                    for entry in fresh:
                        self._feed(pipeline, *entry)
                    batch = self._finish(pipeline.take(), *under_way[0])
                except UndecodableError as error:  # DALI's pipeline is then unusable
                    self._find_undecodable(under_way, error)
                    pipeline.close()
                    pipeline = None
                    continue
                under_way.popleft()
                yield batch
        finally:
            if pipeline is not None:
                pipeline.close()

    def _fetch(self, positions: Positions) -> FetchedBatch:
        with_text = self.tokenizer is not None or self.tag_targets is not None
        fetched = self.fetcher.fetch(positions, with_text)
        if fetched.odd:
            self._note_odd(positions, fetched.odd[0])
            left_out = self.bad.among(positions.sample)
            self.fetcher.convert(positions, fetched, [i for i in fetched.odd if not left_out[i]])
        for i, problem in fetched.problems.items():
            self._leave_out(positions, i, problem)
        return fetched

    def _pipeline(self, batch_size: int, depth: int) -> ImagePipeline:
        return ImagePipeline(
            self.config,
            train=self.train,
            baked=self.manifest.baked_size(),
            batch_size=batch_size,
            threads=self.threads,
            device_id=self.device_id,
            depth=depth,
        )

    def _feed(self, pipeline: ImagePipeline, positions: Positions, fetched: FetchedBatch) -> None:
        images, sizes, bad = fetched.images, fetched.sizes, self.bad.among(positions.sample)
        if bad.any():
            images = [self._stand_in if left_out else image for left_out, image in zip(bad, images, strict=True)]
            if sizes is not None:
                sizes = np.where(bad[:, None], np.int32(self._stand_in_side), sizes)
        if self.train:
            parameters = draw_augmentation(self.config, self.seed, positions.epoch, positions.sample, sizes)
        else:
            parameters = no_augmentation(len(images))
        pipeline.feed(images, parameters, sizes)

    def _finish(self, images: Tensor, positions: Positions, fetched: FetchedBatch) -> Batch:
        weights = torch.from_numpy(~self.bad.among(positions.sample))
        gpu = self.place.device_id

        def on_device(tensor: Tensor) -> Tensor:
            if gpu is None or tensor.is_cuda:
                return tensor
            return tensor.pin_memory().to(torch.device("cuda", gpu), non_blocking=True)

        tokens = self._tokens(self.tokenizer, positions, fetched.texts) if self.tokenizer else ()
        ids, mask = map(on_device, tokens) if tokens else (None, None)
        return Batch(
            on_device(images),
            on_device(torch.from_numpy(fetched.labels)),
            on_device(weights.float()),
            ids,
            mask,
            positions.sample,
            on_device(self.tag_targets(fetched.texts)) if self.tag_targets else None,
        )

    def _tokens(self, tokenizer: TagTokenizer, positions: Positions, texts: list[str]) -> tuple[Tensor, Tensor]:
        if self.train and self.config.tag_order == "shuffle":
            texts = shuffle_tags(texts, self.seed, positions.epoch, positions.sample)
        ids, mask = tokenizer(texts)
        if self._texts_are_looked_at:
            self._look_for_unknown_tags(tokenizer, texts, ids)
        return ids, mask

    def _look_for_unknown_tags(self, tokenizer: TagTokenizer, texts: list[str], ids: Tensor) -> None:
        """Say, once, that there are texts of which the model knows no tag: they tell it nothing."""
        self._texts_read += len(texts)
        if unknown := tokenizer.without_known_tags(texts, ids):
            log.warning(
                "%s: of %d of the first %d texts the model knows no tag, such as '%.80s'; see data.tokenizer",
                self.split,
                len(unknown),
                self._texts_read,
                texts[unknown[0]],
            )
            self._texts_are_looked_at = False

    def _find_undecodable(self, under_way: deque[tuple[Positions, FetchedBatch]], error: UndecodableError) -> None:
        """Decode the batches under way one image at a time: what fails is converted, or left out if it cannot be.

        Raises `error` if nothing fails.
        """
        probe: ImagePipeline | None = None
        found = False
        for positions, fetched in under_way:
            bad = self.bad.among(positions.sample)
            for i in np.flatnonzero(~bad).tolist():
                one = slice(i, i + 1)
                probe = probe or self._pipeline(batch_size=1, depth=1)
                try:
                    sizes = None if fetched.sizes is None else fetched.sizes[one]
                    alone = FetchedBatch(fetched.images[one], fetched.labels[one], [], sizes=sizes)
                    self._feed(probe, positions[one], alone)
                    probe.take()
                except UndecodableError as failure:
                    probe.close()
                    probe, found = None, True
                    problem = failure.reason()
                    if i not in fetched.odd:
                        self.fetcher.convert(positions, fetched, [i])
                        fetched.odd.append(i)
                        problem = fetched.problems.get(i, "")
                    if problem:
                        self._leave_out(positions, i, problem)
        if probe is not None:
            probe.close()
        if not found:
            raise error

    def _note_odd(self, positions: Positions, i: int) -> None:
        """Say once that images are converted as they are read: it is what makes such a set slow."""
        if not self._noted_odd:
            self._noted_odd = True
            name = self.fetcher.name(int(positions.shard[i]), int(positions.place[i]))
            log.info("%s and images like it are converted each time they are read; `shards build` does it once", name)

    def _leave_out(self, positions: Positions, i: int, reason: str) -> None:
        name = self.fetcher.name(int(positions.shard[i]), int(positions.place[i]))
        self.bad.add(int(positions.sample[i]), name, int(positions.epoch[i]), reason)

    @property
    def _stand_in_side(self) -> int:
        return self.manifest.baked_size() or self.config.image_size

    @cached_property
    def _stand_in(self) -> TensorCPU:
        """A grey image in the place of one that cannot be used; it has weight 0."""
        grey = Image.new("RGB", (self._stand_in_side,) * 2, (128, 128, 128))
        return TensorCPU(np.frombuffer(to_ppm(grey), np.uint8))


class TrainLoader(_Loader):
    """An endless iterator over one rank's micro-batches.

    batch_size: the global batch. micro_batch: samples of one micro-batch of this rank; batch_size / world_size must be
    a multiple. samples_consumed: where to start, in samples of the whole run; the one integer that is the state.
    """

    train = True

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        place: Place,
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
        samples_consumed: int = 0,
        tokenizer: TagTokenizer | None = None,
        quarantine: Path | None = None,
        tag_targets: TagTargets | None = None,
    ) -> None:
        super().__init__(
            config,
            manifest,
            "train",
            place,
            batch_size=micro_batch,
            tokenizer=tokenizer,
            quarantine=quarantine,
            tag_targets=tag_targets,
        )
        self.seed = seed
        self.plan = EpochPlan(self.fetcher.split.shard_samples, batch_size, seed, config.streams, config.shuffle_window)
        micro_batch_of(batch_size, place.world_size, micro_batch)
        self.start = samples_consumed
        ranks = place.local_world_size
        node = self.plan.shards_ahead(self.start, place.rank // ranks * ranks, place.world_size, ranks)
        # One rank may have all that it can ahead of training, and one in hand, where another has nothing.
        self.fetcher.shards.check_room(node, (config.prefetch + UNDER_WAY + 2) * batch_size)

    def _make(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        with self.fetcher.following(self._needs, stopped):
            yield from self._batches(self._positions())

    def names_of_first_batch(self) -> list[str]:
        """Names of this rank's samples of the first global batch."""
        with self.fetcher.following(self._needs):
            batch = self.plan.batch(self.start, self.place.rank, self.place.world_size)
            return [self.fetcher.name(*where) for where in zip(batch.shard.tolist(), batch.place.tolist(), strict=True)]

    def _needs(self) -> Iterator[Need]:
        return self.plan.shards_ahead(self.start, self.place.rank, self.place.world_size)

    def _positions(self) -> Iterator[Positions]:
        consumed = self.start
        for step in self.plan.batches(self.start, self.place.rank, self.place.world_size):
            self.fetcher.advance(consumed)
            for first in range(0, len(step), self.batch_size):
                yield step[first : first + self.batch_size]
            consumed += self.plan.batch_size


class EvalLoader(_Loader):
    """One rank's batches of an evaluation: over all ranks, each sample of the split exactly once, in order.

    Every rank has the same number of batches; a last one may be short or empty.
    """

    @cached_property
    def batches(self) -> list[Positions]:
        """Which samples each batch has."""
        counts = self.fetcher.split.shard_samples
        return evaluation_batches(counts, self.batch_size, self.place.rank, self.place.world_size)

    def __len__(self) -> int:
        return len(self.batches)

    def _make(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        filled = [positions for positions in self.batches if len(positions)]
        if filled:
            with self.fetcher.following(lambda: needs_of(filled), stopped):
                yield from self._batches(self._positions(filled), min(UNDER_WAY, len(filled)))
        side = self.config.image_size
        for empty in self.batches[len(filled) :]:
            yield self._finish(torch.zeros(0, 3, side, side), empty, FetchedBatch([], np.zeros(0, np.int64), []))

    def _positions(self, filled: list[Positions]) -> Iterator[Positions]:
        for i, positions in enumerate(filled):
            self.fetcher.advance(i)
            yield positions
