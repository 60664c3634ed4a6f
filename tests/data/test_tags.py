"""Tags: the same ids as transformers' own tokenizer, one token a tag, and orders that depend on nothing else."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config import DataConfig
from dist_train.data.fetch import ShardFetcher
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import ShardInfo, SplitInfo, read_manifest
from dist_train.data.plan import evaluation_batches
from dist_train.data.tags import shuffle_tags, tag_line
from dist_train.data.tarindex import index_tar, write_index
from dist_train.data.tokenizer import TagTokenizer
from dist_train.data.vocabulary import find_frequent_tags
from dist_train.errors import UseError
from dist_train.place import Place
from shards.sources import read_source
from tests.harness import jpeg_bytes, write_shard_set, write_tar

LINES = [
    "1girl red_hair cat_ears smile",
    "",
    "  hatsune_miku   twintails:3 ^_^ ;) 80's_style",
    "Éclair ネコ jalapeño_(food) ﬁancée",
    " ".join(f"tag_{n}_unpronounceable{n}" for n in range(40)),
    "[SEP] [MASK] [CLS]",
]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("red hair smile", "red hair smile"),
        ("red hair, smile", "red_hair smile"),
        (" red  hair ,smile,, ", "red_hair smile"),
        ("red hair\r\nsmile\n", "red_hair smile"),
        ("red hair\rsmile", "red_hair smile"),
        ("red hair,", "red_hair"),
        ("\ufeffred_hair\tsmile\u3000hat", "red_hair smile hat"),
        (" \ufeffred hair\n\ufeff80's_style", "red_hair 80's_style"),  # files with a mark each, joined
        (r"hat \(red\), \\(o\\)", "hat_(red) (o)"),
        (" ", ""),
    ],
)
def test_a_text_is_one_line_of_tags_wherever_it_comes_from(tmp_path: Path, text: str, line: str) -> None:
    """Beside an image, in a CSV file, in a tar that is built or adopted, and from there to training and predict."""
    assert tag_line(text) == tag_line(line) == line
    image = jpeg_bytes(0)
    for name in ("folder/c/1", "folder/c/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.jpg").write_bytes(image)
        (tmp_path / f"{name}.txt").write_bytes((text if name[-1] == "1" else "other").encode())
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "class", "tags"], ["folder/c/1.jpg", "c", text]])
    (tmp_path / "tars").mkdir()
    tar = tmp_path / "tars/train-0.tar"
    write_tar(tar, [{"jpg": image, "cls": b"0", "txt": text.encode()}])
    for source in (tmp_path / "folder", tmp_path / "list.csv", tmp_path / "tars"):
        assert read_source(source)[0].tags == line
    write_index(tar, index_tar(tar))
    shard = ShardInfo(tar.name, 1, tar.stat().st_size, "")
    fetcher = ShardFetcher(tmp_path / "tars", SplitInfo(1, (shard,)), 1)
    assert fetcher.fetch(evaluation_batches([1], 1, 0, 1)[0], with_text=True).texts == [line]


def test_texts_of_which_no_tag_is_known_are_named_once_with_their_number(
    tmp_path: Path, vocabulary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_shard_set(tmp_path / "set", {"train": [6]}, text=True)  # "red hair [cat ears] * (n mod 3) smile"
    config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=1)

    def warnings(tokenizer: TagTokenizer) -> list[str]:
        caplog.clear()
        loader = EvalLoader(config, read_manifest(root), "train", Place(), batch_size=4, tokenizer=tokenizer)
        for _ in range(2):
            assert len(list(loader)) == 2
        return [record.getMessage() for record in caplog.records if "no tag" in record.getMessage()]

    (line,) = warnings(TagTokenizer("tags", 8, ["cat"]))
    assert line.startswith("train: of 2 of the first 4 texts the model knows no tag, such as 'red hair smile'")
    assert len(warnings(TagTokenizer("tags", 1, ["smile"]))) == 1  # what is cut is not known either
    assert warnings(TagTokenizer("tags", 8, ["smile"])) == warnings(TagTokenizer(str(vocabulary), 8)) == []
    unknown = TagTokenizer(str(vocabulary), 8)
    lines = ["smile \U0001f600", "\U0001f600", ""]
    assert unknown.without_known_tags(lines, unknown(lines)[0]) == [1]


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> Path:
    return shared_data / "text" / "bert-base-uncased-vocab.txt"


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_wordpiece_is_that_of_transformers_own_tokenizer(vocabulary: Path, tmp_path: Path, tokens: int) -> None:
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "vocab.txt").write_bytes(vocabulary.read_bytes())
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = TagTokenizer(str(vocabulary), tokens)(LINES)
    assert ids.shape == mask.shape == (len(LINES), tokens) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    for line, row, real in zip(LINES, ids.tolist(), mask.tolist(), strict=True):
        expected = reference(line, truncation=True, max_length=tokens)["input_ids"]
        assert row == expected + [0] * (tokens - len(expected))
        assert real == [True] * len(expected) + [False] * (tokens - len(expected))


def test_the_id_of_a_token_is_its_line_whatever_the_lines_hold(tmp_path: Path) -> None:
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "\u2028", "\x85", "\x1c", "red", "hair"]
    (tmp_path / "vocab.txt").write_bytes("\n".join([*lines, ""]).encode())
    tokenizer = TagTokenizer(str(tmp_path / "vocab.txt"), 5)
    assert tokenizer(["red hair"])[0].tolist() == [[2, 8, 9, 3, 0]]
    assert tokenizer.vocab_size == len(lines)


def test_whole_tags_are_one_token_each_with_padding_0_and_unknown_1() -> None:
    tokenizer = TagTokenizer("tags", 4, ["1girl", "smile", "red_hair"])
    ids, mask = tokenizer(["smile 1girl", "red_hair nobody smile", "", "1girl smile red_hair smile 1girl"])
    assert tokenizer.vocab_size == 5
    assert ids.tolist() == [[3, 2, 0, 0], [4, 1, 3, 0], [0, 0, 0, 0], [2, 3, 4, 3]]
    assert (mask == (ids > 0)).all()
    assert tokenizer([])[0].shape == (0, 4)


def test_by_frequency_the_rare_and_the_unknown_are_what_is_cut() -> None:
    frequent = ["1girl", "smile", "red_hair"]
    ids, _ = TagTokenizer("tags", 3, frequent, by_frequency=True)(["zebra red_hair apple 1girl smile", "b a smile"])
    assert ids.tolist() == [[2, 3, 4], [3, 1, 1]]


def test_wordpiece_reads_the_tags_by_frequency_too(vocabulary: Path) -> None:
    frequent = TagTokenizer(str(vocabulary), 8, ["smile", "red"], by_frequency=True)
    plain = TagTokenizer(str(vocabulary), 8)
    assert frequent(["blue red smile"])[0].tolist() == plain(["smile red blue"])[0].tolist()


def test_a_shuffled_line_keeps_its_tags_and_depends_on_seed_epoch_and_sample_alone() -> None:
    line = " ".join(f"tag{n}" for n in range(12))
    texts = [line] * 6 + ["", "alone"]
    epochs, samples = np.array([0, 0, 0, 1, 1, 1, 0, 0]), np.array([5, 6, 7, 5, 6, 7, 8, 9])
    shuffled = shuffle_tags(texts, 3, epochs, samples)
    assert [sorted(text.split()) for text in shuffled] == [sorted(text.split()) for text in texts]
    assert len(set(shuffled)) == 8  # each sample and epoch has an order of its own
    backwards = shuffle_tags(texts[::-1], 3, epochs[::-1], samples[::-1])
    assert backwards[::-1] == shuffled
    one_by_one = [shuffle_tags([t], 3, epochs[[i]], samples[[i]])[0] for i, t in enumerate(texts)]
    assert one_by_one == shuffled
    assert shuffle_tags(texts, 4, epochs, samples)[:6] != shuffled[:6]


def test_a_shuffle_favours_no_place() -> None:
    samples = np.arange(6000)
    shuffled = shuffle_tags(["a b c"] * 6000, 0, np.zeros(6000, np.int64), samples)
    counts = Counter(shuffled)
    assert len(counts) == 6
    assert all(900 < count < 1100 for count in counts.values())  # 3.4 standard deviations


def test_the_most_frequent_tags_are_counted_over_the_train_split_alone(tmp_path: Path) -> None:
    root = write_shard_set(tmp_path / "set", {"train": [4, 3], "val": [9]}, text=True)
    config = DataConfig(shards=str(root))
    # Sample n has "red hair [cat ears] * (n mod 3) smile"; a tag counts once a sample, ties go by name.
    assert find_frequent_tags(config, read_manifest(root)) == ["hair", "red", "smile", "cat", "ears"]
    assert find_frequent_tags(replace(config, tag_vocabulary=2), read_manifest(root)) == ["hair", "red"]
    with pytest.raises(UseError, match="asks for tags, but the shard set"):
        find_frequent_tags(config, read_manifest(write_shard_set(tmp_path / "none", {"train": [4]})))


def ids_by_sample(root: Path, order: str, world_size: int, start: int = 0) -> list[dict[int, list[int]]]:
    """Token ids of each sample in each of two epochs, from `start` samples on."""
    config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=1, tag_order=order)
    epochs: list[dict[int, list[int]]] = [{}, {}]
    for rank in range(world_size):
        loader = TrainLoader(
            config,
            read_manifest(root),
            Place(rank, world_size),
            batch_size=12,
            micro_batch=6,
            seed=1,
            samples_consumed=start,
            tokenizer=TagTokenizer("tags", 3, ["hair", "red", "smile", "cat", "ears"]),
        )
        steps = (48 - start) // 12
        for i, batch in enumerate(islice(loader, steps * 2 // world_size)):
            assert batch.text_ids is not None
            epoch = (start // 12 + i * world_size // 2) // 2
            epochs[epoch].update(zip(batch.samples.tolist(), batch.text_ids.tolist(), strict=True))
    return epochs


def test_training_shuffles_tags_alike_over_world_sizes_and_resumption_and_evaluation_does_not(tmp_path: Path) -> None:
    root = write_shard_set(tmp_path / "set", {"train": [10, 14], "val": [4]}, text=True)
    given = ids_by_sample(root, "given", 1)
    shuffled = ids_by_sample(root, "shuffle", 1)
    assert all(len(epoch) == 24 for epoch in shuffled)
    assert given[0] == given[1]
    assert shuffled[0] != shuffled[1] != given[0] != shuffled[0]
    assert ids_by_sample(root, "shuffle", 2) == shuffled
    assert ids_by_sample(root, "shuffle", 1, start=24)[1] == shuffled[1]
    lost = {tuple(sorted({2, 3, 4, 5, 6} - set(ids))) for ids in shuffled[0].values()}
    assert len(lost) > 3  # the cut at 3 tokens takes other tags

    config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=1, tag_order="shuffle")
    tokenizer = TagTokenizer("tags", 3, ["hair", "red"])
    (batch,) = EvalLoader(config, read_manifest(root), "val", Place(), batch_size=4, tokenizer=tokenizer)
    assert batch.text_ids is not None
    assert [ids[:2] for ids in batch.text_ids.tolist()] == [[3, 2]] * 4  # "red hair ..."
