"""Batches: the same samples and pixels whatever the world size, micro-batch or resumption; bad files left out."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data import loader as loader_module
from dist_train.data.loader import Batch, EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.pipeline import ImagePipeline
from dist_train.errors import UseError, WorkError
from dist_train.place import Place
from tests.harness import CLASSES, jpeg_bytes, smooth_image

TARS = [37, 100, 64, 51]
MakeSet = Callable[..., Path]


def config_for(root: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=1, shuffle_window=32), **changes)


def train_batches(
    config: DataConfig, steps: int, batch: int, world_size: int = 1, micro: int = 0, start: int = 0, seed: int = 0
) -> list[list[Batch]]:
    """Per step, the micro-batches of all ranks."""
    share = batch // world_size
    micro = micro or share
    per_step: list[list[Batch]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        loader = TrainLoader(
            config,
            read_manifest(config.shards),
            Place(rank, world_size),
            batch_size=batch,
            micro_batch=micro,
            seed=seed,
            samples_consumed=start,
        )
        taken = list(islice(loader, steps * share // micro))
        for i, one in enumerate(taken):
            per_step[i * micro // share].append(one)
    return per_step


def contents(step: list[Batch]) -> dict[int, tuple[NDArray[np.float32], int]]:
    """Pixels and label by sample."""
    return {
        int(sample): (image.numpy().copy(), int(label))
        for batch in step
        for sample, image, label in zip(batch.samples, batch.images, batch.labels, strict=True)
    }


def assert_same(a: list[list[Batch]], b: list[list[Batch]]) -> None:
    assert len(a) == len(b)
    for one, other in zip(map(contents, a), map(contents, b), strict=True):
        assert one.keys() == other.keys()
        for sample in one:
            assert one[sample][1] == other[sample][1]
            assert (one[sample][0] == other[sample][0]).all()


def test_labels_and_pictures_belong_together(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"train": TARS}))
    for step in train_batches(config, 3, 36):
        for sample, (_, label) in contents(step).items():
            assert label == sample % CLASSES


@pytest.mark.parametrize("baked", [None, 20])
def test_world_sizes_1_2_3_have_the_same_global_batches_and_pixels(shard_set: MakeSet, baked: int | None) -> None:
    config = config_for(shard_set({"train": TARS}, baked=baked))
    straight = train_batches(config, 15, 36)  # 540 samples: over the end of two epochs of 252
    assert_same(straight, train_batches(config, 15, 36, world_size=2, micro=9))
    assert_same(straight, train_batches(config, 15, 36, world_size=3, micro=4))


EVERYTHING: dict[str, object] = {
    "crop": "random_resized",
    "auto_augment": "randaugment",
    "erasing": 0.5,
    "blur": 0.3,
    "grey": 0.2,
}


@pytest.mark.parametrize("baked", [None, 20])
def test_with_every_augmentation_pixels_depend_on_neither_ranks_nor_threads_nor_resumption(
    shard_set: MakeSet, baked: int | None
) -> None:
    """Over the end of an epoch of 90 samples; one of them is odd, so that it is converted, and one is bad."""
    gif = io.BytesIO()
    smooth_image(7, 20 if baked else 60, 20 if baked else 30).convert("P").save(gif, "GIF")
    root = shard_set({"train": [40, 50]}, baked=baked, replace={7: gif.getvalue(), 11: b"not an image"})
    config = config_for(root, **EVERYTHING)
    straight = train_batches(config, 8, 18)
    assert_same(straight, train_batches(replace(config, threads=3), 8, 18, world_size=2, micro=3))
    assert_same(straight, train_batches(config, 8, 18, world_size=3, micro=6))
    assert_same(straight[3:], train_batches(config, 5, 18, start=3 * 18, micro=9))
    plain = train_batches(config_for(root), 1, 18)
    assert [list(contents(step)) for step in plain] == [list(contents(step)) for step in straight[:1]]
    pairs = [(contents(plain[0])[sample][0], contents(straight[0])[sample][0]) for sample in contents(plain[0])]
    assert sum((one != other).any() for one, other in pairs) >= 17


def test_a_run_stopped_after_any_step_and_resumed_gives_the_same_rest(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"train": TARS}))
    straight = train_batches(config, 9, 36)
    for step in range(1, 9):
        assert_same(straight[step:], train_batches(config, 9 - step, 36, start=36 * step, micro=12))


def test_each_sample_comes_once_per_epoch_over_ranks(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"train": TARS}))
    seen = Counter(sample for step in train_batches(config, 14, 36, world_size=3) for sample in contents(step))
    assert set(seen) == set(range(252)) and set(seen.values()) == {2}


def test_seeds_and_epochs_change_the_pixels_of_a_sample(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"train": [8]}))
    first, second = (contents(step) for step in train_batches(config, 2, 8))
    other = contents(train_batches(config, 1, 8, seed=1)[0])
    assert all((first[s][0] != second[s][0]).any() for s in first)
    assert all((first[s][0] != other[s][0]).any() for s in first)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_sample_once_in_order_and_an_empty_rank_takes_part(
    shard_set: MakeSet, world_size: int
) -> None:
    config = config_for(shard_set({"val": [3, 0, 4]}))
    manifest = read_manifest(config.shards)
    seen, counts = [], set()
    for rank in range(world_size):
        loader = EvalLoader(config, manifest, "val", Place(rank, world_size), batch_size=1)
        batches = list(loader)
        counts.add(len(batches))
        assert all(len(b.images) == len(b.labels) == len(b.samples) for b in batches)
        seen += [int(s) for b in batches for s in b.samples]
    assert seen == list(range(7)) and len(counts) == 1


def test_undecodable_images_are_left_out_with_weight_0_and_a_record(shard_set: MakeSet, tmp_path: Path) -> None:
    broken = {5: b"not an image at all", 40: jpeg_bytes(40)[:60], 41: b""}
    config = config_for(shard_set({"train": [30, 34]}, replace=broken))
    good = config_for(shard_set({"train": [30, 34]}, name="good"))
    loader = TrainLoader(
        config,
        read_manifest(config.shards),
        Place(),
        batch_size=16,
        micro_batch=8,
        seed=0,
        quarantine=tmp_path / "quarantine.jsonl",
    )
    got = list(islice(loader, 8))
    expected = contents([b for step in train_batches(good, 4, 16) for b in step])
    weights = {int(s): float(w) for b in got for s, w in zip(b.samples, b.weights, strict=True)}
    assert sorted(weights) == list(range(64))
    assert {sample for sample, weight in weights.items() if weight == 0} == set(broken)
    for sample, (pixels, label) in contents(got).items():
        if sample not in broken:
            assert label == sample % CLASSES
            assert (pixels == expected[sample][0]).all()
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {record["sample"] for record in records} == set(broken) and len(records) == 3
    assert {record["name"] for record in records} == {
        "train-000000.tar:000005",
        "train-000001.tar:000040",
        "train-000001.tar:000041",
    }


def test_too_many_undecodable_images_end_the_run_with_one_line(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"train": [16]}, replace={i: b"x" for i in range(4)}), max_bad_samples=3)
    with pytest.raises(WorkError, match=r"more than data\.max_bad_samples \(3\)"):
        train_batches(config, 1, 16)


def test_an_undecodable_image_in_evaluation_keeps_its_place(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"val": [9]}, replace={4: b"x"}))
    loader = EvalLoader(config, read_manifest(config.shards), "val", Place(), batch_size=4)
    batches = list(loader)
    assert [int(s) for b in batches for s in b.samples] == list(range(9))
    assert torch.cat([b.weights for b in batches]).tolist() == [float(i != 4) for i in range(9)]


@pytest.mark.parametrize("samples, bad, built", [(9, (), 1), (3, (), 1), (9, (1,), 2), (9, (8,), 3)])
def test_an_evaluation_made_again_has_the_same_batches_of_the_same_pipeline(
    shard_set: MakeSet, monkeypatch: pytest.MonkeyPatch, samples: int, bad: tuple[int, ...], built: int
) -> None:
    """An image that cannot be decoded costs the first way through its pipeline; one for the last batch alone is no use
    for the next."""
    made: list[int] = []

    class Counted(ImagePipeline):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.extend([0] if more["batch_size"] > 1 else [])  # not those that look for the bad one

    monkeypatch.setattr(loader_module, "ImagePipeline", Counted)
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(file, "PNG")
    png = file.getvalue()
    pixels = b"IDAT" + bytes(20)  # with a right checksum, so that only decoding shows that they are damaged
    damaged = png[:33] + struct.pack(">I", 20) + pixels + struct.pack(">I", zlib.crc32(pixels)) + png[-12:]
    config = config_for(shard_set({"val": [samples]}, replace={i: damaged for i in bad}))
    loader = EvalLoader(config, read_manifest(config.shards), "val", Place(), batch_size=4)
    first, second, third = (contents(list(loader)) for _ in range(3))
    assert set(first) == set(range(samples))
    for sample, (pixels, label) in first.items():
        for again in (second, third):
            assert np.array_equal(again[sample][0], pixels) and again[sample][1] == label
    assert len(made) == built


def test_a_missing_shard_ends_the_run_with_its_name(shard_set: MakeSet) -> None:
    root = shard_set({"train": [8]})
    (root / "train-000000.tar").unlink()
    with pytest.raises(WorkError, match=r"train-000000\.tar: cannot be read"):
        train_batches(config_for(root), 1, 8)


def test_micro_batches_that_do_not_divide_are_refused_with_the_numbers_that_would(shard_set: MakeSet) -> None:
    config = config_for(shard_set({"train": [8]}))
    with pytest.raises(UseError, match=r"micro_batch_size 3 does not divide the 8 .* these do: 1, 2, 4, 8"):
        train_batches(config, 1, 8, micro=3)


def test_text_asked_of_shards_without_tags_is_refused(shard_set: MakeSet, shared_data: Path) -> None:
    from dist_train.data.tokenizer import TagTokenizer

    root = shard_set({"train": [8]})
    tokenizer = TagTokenizer(str(shared_data / "text" / "bert-base-uncased-vocab.txt"), 16)
    with pytest.raises(UseError, match="asks for tags, but the shard set"):
        TrainLoader(
            config_for(root), read_manifest(root), Place(), batch_size=8, micro_batch=8, seed=0, tokenizer=tokenizer
        )


def test_tags_come_as_wordpiece_ids_with_a_mask(shard_set: MakeSet, shared_data: Path) -> None:
    from dist_train.data.tokenizer import TagTokenizer

    vocabulary = (shared_data / "text" / "bert-base-uncased-vocab.txt").read_text().splitlines()
    root = shard_set({"train": [6]}, text=True)
    tokenizer = TagTokenizer(str(shared_data / "text" / "bert-base-uncased-vocab.txt"), 16)
    loader = TrainLoader(
        config_for(root), read_manifest(root), Place(), batch_size=6, micro_batch=6, seed=0, tokenizer=tokenizer
    )
    batch = next(iter(loader))
    assert batch.text_ids is not None and batch.text_mask is not None
    for sample, ids, mask in zip(batch.samples.tolist(), batch.text_ids, batch.text_mask, strict=True):
        words = ["[CLS]", "red", "hair", *["cat", "ears"] * (sample % 3), "smile", "[SEP]"]
        assert [vocabulary[i] for i in ids[mask].tolist()] == words
        assert ids.shape == (16,) and (ids[~mask] == 0).all()
