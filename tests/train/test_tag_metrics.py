"""Average precision, F1 and thresholds of tags: scikit-learn's figures, ties included, on one rank and on several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from dist_train.config import DataConfig
from dist_train.data.loader import Batch, EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.targets import TagTargets
from dist_train.place import Place
from dist_train.train import multilabel
from dist_train.train.engine import init_process_group
from dist_train.train.multilabel import TagEvaluation, evaluate_tags
from dist_train.train.tagmetrics import count_hits, probabilities, ranked
from tests.harness import write_shard_set
from tests.train.forked_ranks import run_on

TAGS = [f"t{k}" for k in range(6)]  # sample n has tag k if bit k of n is set; t5 occurs in no set below
SAMPLES, BAD = 29, 7


def tags_of(number: int) -> str:
    return " ".join(["noise", *(tag for k, tag in enumerate(TAGS) if number >> k & 1)])


def truth_and_scores(samples: int, decimals: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) each. With one decimal most scores have ties; the last tag has no sample."""
    rng = np.random.default_rng(samples)
    truth = rng.random((6, samples)) < np.array([0.5, 0.1, 0.9, 0.3, 1.0, 0.0])[:, None]
    return truth, np.round(0.35 * truth + 0.65 * rng.random((6, samples)), decimals)


@pytest.mark.parametrize("decimals", [1, 2, 16])
@pytest.mark.parametrize("samples", [1, 40, 300])
@pytest.mark.filterwarnings("ignore:No positive class found")
def test_average_precision_and_f1_are_scikit_learns_and_no_threshold_does_better(samples: int, decimals: int) -> None:
    truth, scores = truth_and_scores(samples, decimals)
    precision, thresholds = ranked(scores, truth, default=0.25)
    assert precision == pytest.approx([average_precision_score(t, s) for t, s in zip(truth, scores, strict=True)])
    at = count_hits(scores, truth, thresholds)
    predicted = (scores >= thresholds[:, None]).T
    for ours, theirs in zip((at.precision, at.recall, at.f1), scikit_learn(truth.T, predicted, None), strict=False):
        assert ours == pytest.approx(theirs)
    occur = np.flatnonzero(truth.any(axis=1))
    for average in ("micro", "macro"):
        # Micro over all tags: what is predicted of a tag that no sample has is wrong. Macro over those that occur.
        labels = occur if average == "macro" else None
        expected = scikit_learn(truth.T, predicted, average, labels)
        figures = [at.figures()[f"{name}_{average}"] for name in ("precision", "recall", "f1")]
        assert figures == pytest.approx(expected[:3])
    for row in range(6):
        if not truth[row].any():
            assert thresholds[row] == 0.25
            continue
        candidates = np.unique(scores[row])
        f1 = [
            2 * (truth[row] & (scores[row] >= c)).sum() / (truth[row].sum() + (scores[row] >= c).sum())
            for c in candidates
        ]
        assert at.f1[row] == max(f1)
        chosen = candidates[np.flatnonzero(np.array(f1) == max(f1))[-1]]  # the highest of the best
        below = candidates[candidates < chosen].max(initial=0)
        assert thresholds[row] == pytest.approx((chosen + below) / 2)


def scikit_learn(
    truth: np.ndarray, predicted: np.ndarray, average: str | None, labels: np.ndarray | None = None
) -> tuple:
    return precision_recall_fscore_support(truth, predicted, average=average, labels=labels, zero_division=0)


def test_between_neighbouring_floats_the_threshold_is_the_upper_one() -> None:
    upper = 0.5
    lower = np.nextafter(upper, 0)
    _, thresholds = ranked(np.array([[lower, upper]]), np.array([[False, True]]), default=0)
    assert thresholds.tolist() == [upper]


def test_probabilities_tell_logits_apart_that_float32_would_not() -> None:
    high, higher = probabilities(torch.tensor([20.0, 21.0])).tolist()
    assert 0 < 1 - higher < 1 - high < 1e-8
    assert probabilities(torch.tensor([0.0])).item() == 0.5


# ---------------------------------------------------------------------- over a set
@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 samples in uneven shards, one of which is no image."""
    folder = tmp_path_factory.mktemp("sets") / "set"
    return write_shard_set(folder, {"val": [13, 1, 15]}, baked=16, text=tags_of, replace={BAD: b"no image"})


def logits_of(batch: Batch) -> torch.Tensor:
    """What a model would say: a function of the sample, with many ties."""
    table = np.random.default_rng(5).integers(-3, 4, (SAMPLES + 1, 6)) / 2  # the last row is of padding
    return torch.from_numpy(table[batch.samples]).float()


def evaluated(shards: Path, place: Place, tuned: object = "choose") -> TagEvaluation:
    config = DataConfig(shards=str(shards), image_size=16, crop_margin=0, threads=1, labels="tags")
    manifest = read_manifest(shards)
    loader = EvalLoader(config, manifest, "val", place, batch_size=4, tag_targets=TagTargets(TAGS))
    return evaluate_tags(logits_of, loader, SAMPLES, 0.6, tuned)


def everything(result: TagEvaluation) -> dict[str, object]:
    assert result.tuned is not None
    arrays = {
        "precision": result.average_precision,
        "thresholds": result.tuned.thresholds,
        "hits": result.tuned.hits,
        "predicted": result.at_threshold.predicted,
    }
    return {**{name: array.tolist() for name, array in arrays.items()}, **result.figures()}


def evaluate_on_a_rank(shards: Path, folder: Path) -> None:
    """What each rank does."""
    place = init_process_group(60)
    for at_a_time in (2**22, 64):  # one round in which a rank has nothing; and several
        multilabel._AT_A_TIME = at_a_time
        document = json.dumps(everything(evaluated(shards, place)))
        (folder / f"{at_a_time}-{place.rank}.json").write_text(document)


@pytest.mark.filterwarnings("ignore:No positive class found")
def test_an_evaluation_is_exact_with_ties_and_the_same_to_the_bit_over_any_number_of_ranks(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = np.delete(np.arange(SAMPLES), BAD)
    truth = (usable[:, None] >> np.arange(6)) & 1 > 0
    empty = np.empty(0)
    logits = logits_of(Batch(*[torch.empty(0)] * 3, None, None, usable))  # type: ignore[arg-type]
    scores = torch.sigmoid(logits.double()).numpy()
    alone = evaluated(shards, Place())
    expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(6)]
    assert alone.average_precision == pytest.approx(expected) and expected[5] == 0 and empty.size == 0
    assert alone.mean_average_precision == pytest.approx(np.mean(expected[:5]))
    at = scikit_learn(truth, scores >= 0.6, "macro", np.arange(5))
    figures = alone.figures()
    assert [figures[f"{name}_macro"] for name in ("precision", "recall", "f1")] == pytest.approx(at[:3])
    assert (figures["samples"], figures["bad_samples"], figures["tags_that_occur"]) == (SAMPLES - 1, 1, 5)
    bce = torch.nn.functional.binary_cross_entropy(torch.from_numpy(scores), torch.from_numpy(truth).double())
    assert figures["loss"] == pytest.approx(bce.item(), rel=1e-6)
    monkeypatch.setattr(multilabel, "_AT_A_TIME", 64)
    assert everything(evaluated(shards, Place())) == everything(alone)
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_on(ranks, folder, evaluate_on_a_rank, shards, folder)
        documents = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        assert len(documents) == 2 * ranks
        for document in documents:
            assert document.pop("loss") == pytest.approx(alone.loss, rel=1e-12)
            assert document == {name: value for name, value in everything(alone).items() if name != "loss"}


def test_thresholds_that_were_chosen_before_are_applied_as_they_are(shards: Path) -> None:
    given = np.array([0.2, 0.5, 0.6, 0.7, 0.9, 0.1])
    result = evaluated(shards, Place(), given)
    assert result.tuned is not None and (result.tuned.thresholds == given).all()
    plain = evaluated(shards, Place(), None)
    assert plain.tuned is None and not any(name.startswith("tuned") for name in plain.figures())
    assert result.at_threshold.hits.tolist() == plain.at_threshold.hits.tolist()
