"""How well a model predicts the tags of a split: exact, each sample exactly once, the same at any world size.

Every rank keeps the logits of its own samples in main memory (4 bytes a sample and tag, and 1 for the truth). What is
asked of a tag needs all samples, in order: tags are dealt out to the ranks, some at a time, and a rank gets all the
samples' logits of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.loader import EvalLoader
from dist_train.errors import WorkError
from dist_train.place import Place
from dist_train.train.evaluate import Forward, check_counts, padded
from dist_train.train.losses import tag_losses
from dist_train.train.tagmetrics import Floats, Hits, count_hits, mean_over, probabilities, ranked

Choose = Literal["choose"]
CHOOSE: Choose = "choose"

_AT_A_TIME = 2**22  # logits: some hundred megabytes while they are ranked


@dataclass(frozen=True)
class TagEvaluation:
    """What a model knows of a split's tags. average_precision: (T,), 0 for tags that no sample has. loss: mean binary
    cross-entropy over samples and tags.

    at_threshold: counts at the recipe's threshold, the same for all tags. tuned: counts at thresholds of their own that
    were chosen on val, or None without such.
    """

    average_precision: Floats
    at_threshold: Hits
    tuned: Hits | None
    loss: float
    samples: int
    bad_samples: int

    @property
    def mean_average_precision(self) -> float:
        """Over the tags that occur in the split."""
        return mean_over(self.average_precision, self.at_threshold.positives > 0)

    @property
    def score(self) -> float:
        """By which the best checkpoint is chosen."""
        return self.mean_average_precision

    def figures(self) -> dict[str, Any]:
        """As metrics.jsonl and summary.json hold it."""
        tuned = self.tuned.figures() if self.tuned is not None else {}
        return {
            "map": self.mean_average_precision,
            **self.at_threshold.figures(),
            **{f"tuned_{name}": value for name, value in tuned.items()},
            "loss": self.loss,
            "tags_that_occur": int((self.at_threshold.positives > 0).sum()),
            "samples": self.samples,
            "bad_samples": self.bad_samples,
        }


@torch.no_grad()
def evaluate_tags(
    forward: Forward,
    loader: EvalLoader,
    expected_samples: int,
    threshold: float,
    tuned: Floats | Choose | None = None,
) -> TagEvaluation:
    """Evaluate over all ranks (each calls this); `forward` gives the logits of a batch.

    threshold: of the figures with the same one for all tags. tuned: (T,) thresholds that were chosen before; or
    `choose`, to choose them here, which is for val alone: on the split that they were chosen on, figures look better
    than they are. A sample that cannot be used is not counted but reported. Raises WorkError if the samples counted
    and reported are not `expected_samples`, or none could be used.
    """
    assert loader.tag_targets is not None
    logits, truth, sums = _forward_all(forward, loader)
    place, tags = loader.place, len(loader.tag_targets.tags)
    if place.world_size > 1:
        torch.distributed.all_reduce(sums)
    loss_sum, samples, bad = float(sums[0]), int(sums[1]), int(sums[2])
    check_counts(samples, bad, expected_samples)

    # Of each tag, by the one rank that has it; zero on the others.
    precision, thresholds, *counts = (np.zeros(tags) for _ in range(7))
    for chosen, scores, has in _dealt_out(logits, truth, samples, place, sums.device):
        precision[chosen], best = ranked(scores, has, threshold)
        thresholds[chosen] = 0 if tuned is None else best if isinstance(tuned, str) else tuned[chosen]
        plain = count_hits(scores, has, np.full(len(scores), threshold))
        own = count_hits(scores, has, thresholds[chosen])
        found = (plain.positives, plain.hits, plain.predicted, own.hits, own.predicted)
        for column, values in zip(counts, found, strict=True):
            column[chosen] = values
    everything = torch.from_numpy(np.stack([precision, thresholds, *counts])).to(sums.device)
    if place.world_size > 1:
        torch.distributed.all_reduce(everything)
    precision, thresholds, *counts = everything.cpu().numpy()
    positives, hits, predicted, own_hits, own_predicted = (column.astype(np.int64) for column in counts)
    return TagEvaluation(
        precision,
        Hits(np.full(tags, threshold), hits, predicted, positives),
        Hits(thresholds, own_hits, own_predicted, positives) if tuned is not None else None,
        loss_sum / samples,
        samples,
        bad,
    )


def chosen_thresholds(of_val: Any) -> Floats | None:
    """The thresholds that an evaluation on val has chosen; None where there was none, or it was not of tags."""
    return of_val.tuned.thresholds if isinstance(of_val, TagEvaluation) and of_val.tuned is not None else None


def thresholds_to_keep(evaluations: dict[str, Any]) -> dict[str, list[float]]:
    """What `CheckpointWriter.note_evaluation` takes: thresholds chosen on val, for the raw and the averaged weights."""
    chosen = {
        name: chosen_thresholds(evaluations.get(split)) for name, split in (("raw", "val"), ("averaged", "val_ema"))
    }
    return {name: thresholds.tolist() for name, thresholds in chosen.items() if thresholds is not None}


def _forward_all(forward: Forward, loader: EvalLoader) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's usable samples the logits, (N, T) float32, and truth, (N, T) bool, on the CPU; and on the device
    the sum of their losses, their number and that of the bad ones, float64."""
    assert loader.tag_targets is not None
    rows, tags = sum(len(positions) for positions in loader.batches), len(loader.tag_targets.tags)
    logits, truth = torch.empty(rows, tags), torch.empty(rows, tags, dtype=torch.bool)
    filled, sums = 0, None
    for batch in loader:
        # All passes have one shape: a compiled model would be compiled again for a short last batch.
        given = forward(padded(batch, loader.batch_size))[: len(batch.labels)].float()
        if sums is None:
            sums = torch.zeros(3, dtype=torch.float64, device=given.device)
        assert batch.tags is not None
        valid = batch.weights > 0
        sums[0] += tag_losses(given[valid], batch.tags[valid]).double().sum()
        sums[1] += valid.sum()
        sums[2] += (~valid).sum()
        usable, has = given[valid].cpu(), batch.tags[valid].cpu()
        logits[filled : filled + len(usable)], truth[filled : filled + len(usable)] = usable, has
        filled += len(usable)
    if sums is None:
        raise WorkError("the split to evaluate on holds no samples")
    return logits[:filled], truth[:filled], sums


def _dealt_out(
    logits: Tensor, truth: Tensor, samples: int, place: Place, device: torch.device
) -> Iterator[tuple[slice, Floats, NDArray[np.bool_]]]:
    """This rank's tags, some at a time: which they are, and of all samples of all ranks, in any order, the
    probabilities and the truth, (tags, samples). All ranks go through it together.

    samples: of all ranks. device: where ranks exchange tensors.
    """
    step = max(1, _AT_A_TIME // samples)
    parts = [slice(first, first + step) for first in range(0, logits.shape[1], step)]
    if place.world_size == 1:
        for part in parts:
            yield part, probabilities(logits[:, part].T).numpy(), truth[:, part].T.numpy()
        return
    rows = torch.zeros(place.world_size, dtype=torch.int64, device=device)
    rows[place.rank] = len(logits)
    torch.distributed.all_reduce(rows)
    sizes = rows.tolist()
    for first in range(0, len(parts), place.world_size):
        mine = None
        for owner, part in enumerate(parts[first : first + place.world_size]):
            columns = logits[:, part], truth[:, part].byte()
            gathered = [_gathered(values, sizes, owner, place, device) for values in columns]
            if owner == place.rank:
                mine = part, probabilities(gathered[0].T).numpy(), gathered[1].T.numpy().astype(bool)
        if mine is not None:  # only now: meanwhile the others wait for nobody
            yield mine


def _gathered(rows: Tensor, sizes: list[int], owner: int, place: Place, device: torch.device) -> Tensor:
    """All ranks' rows on the owner, on the CPU; on the others nothing of use. sizes: each rank's number of rows."""
    padded_rows = rows.new_zeros(max(sizes), rows.shape[1])
    padded_rows[: len(rows)] = rows
    own = padded_rows.to(device)
    if place.rank != owner:
        torch.distributed.gather(own, None, dst=owner)
        return rows[:0]
    received = [torch.empty_like(own) for _ in sizes]
    torch.distributed.gather(own, received, dst=owner)
    return torch.cat([part[:size].cpu() for part, size in zip(received, sizes, strict=True)])
