"""Which tokens there are: a WordPiece vocabulary's, one a line of a file, or the most frequent tags of a shard set.

Imports nothing slow, so that a wrong file is reported at once.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from dist_train.config import DataConfig
from dist_train.data.manifest import Manifest, check_has_tags
from dist_train.data.plan import evaluation_batches, needs_of
from dist_train.errors import UseError, WorkError
from dist_train.files import write_atomically

TAGS_NAME = "tags.txt"
"""The file of a run's folder with its frequent tags, one a line."""
WHOLE_TAGS = "tags"
"""The value of data.tokenizer for one token a tag."""


def read_vocabulary(name_or_file: str) -> dict[str, int] | None:
    """The tokens of a vocabulary file with their ids; None for what is no file but a tokenizer on the hub.

    Raises UseError for a path that is no file, and for a file that is no vocabulary.
    """
    path = Path(name_or_file)
    if os.path.isfile(path):
        try:
            # By ends of lines alone: splitlines would also cut at U+2028 and its like, which may be tokens.
            tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UseError(f"data.tokenizer {path}: cannot be read as text ({error})") from None
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
        if missing:
            raise UseError(f"{path}: not a WordPiece vocabulary, it lacks {', '.join(missing)}")
        return {token: i for i, token in enumerate(tokens)}
    if name_or_file.endswith(".txt") or (os.sep in name_or_file and path.parent.exists()):
        problem = "a folder; name the vocab.txt in it" if path.is_dir() else "no such file"
        raise UseError(f"data.tokenizer {name_or_file}: {problem}")
    return None


def find_frequent_tags(config: DataConfig, manifest: Manifest) -> list[str]:
    """The data.tag_vocabulary most frequent tags of the train split, without those on fewer than data.tag_min_count
    samples; most frequent first, ties in order of code points.

    Exact: reads each sample's tags once, about half a minute for a million samples on a local disk.
    """
    from dist_train.data.fetch import ShardFetcher  # slow

    check_has_tags(config, manifest)
    split = manifest.split("train")
    fetcher = ShardFetcher(config.shards, split, len(manifest.classes), config=config, texts_only=True)
    counts: Counter[str] = Counter()
    batches = evaluation_batches(split.shard_samples, 4096, rank=0, world_size=1)
    with fetcher.following(lambda: needs_of(batches)):
        for i, positions in enumerate(batches):
            fetcher.advance(i)
            for text in fetcher.fetch(positions, with_text=True).texts:
                counts.update(set(text.split()))
    frequent = [tag for tag, count in counts.items() if count >= config.tag_min_count]
    return sorted(frequent, key=lambda tag: (-counts[tag], tag))[: config.tag_vocabulary]


def write_tags(run: Path, tags: list[str]) -> None:
    """Write the list of tags into the run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / TAGS_NAME, "".join(f"{tag}\n" for tag in tags).encode())


def read_frequent_tags(run: Path) -> list[str]:
    """The tags that a run found most frequent. Raises WorkError where it has no list of them."""
    try:
        return (run / TAGS_NAME).read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise WorkError(f"{run / TAGS_NAME}: cannot be read ({error}); the model reads tags by this list") from None
