"""Mixup, CutMix and the loss: what is mixed with what, in which ratio, and what that counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.utils.class_weight import compute_class_weight

from dist_train.config import DataConfig, OptimConfig
from dist_train.data.loader import Batch
from dist_train.train.losses import Objective, class_weights
from dist_train.train.mixing import Mix, mix_neighbours, symmetric_beta

SIZE, SIDE = 64, 12


def make_batch(bad: tuple[int, ...] = ()) -> Batch:
    """Every pixel different, so that one can tell where it is from."""
    images = torch.arange(SIZE * 3 * SIDE * SIDE, dtype=torch.float32).view(SIZE, 3, SIDE, SIDE) / 1e4
    weights = torch.ones(SIZE)
    weights[list(bad)] = 0
    return Batch(images, torch.arange(SIZE) % 5, weights, None, None, np.arange(SIZE))


def part(batch: Batch, first: int, last: int) -> Batch:
    chosen = slice(first, last)
    return Batch(batch.images[chosen], batch.labels[chosen], batch.weights[chosen], None, None, batch.samples[chosen])


def neighbour(i: int) -> int:
    return i + 1 if i % 2 == 0 else i - 1


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 4.0])
def test_ratios_are_beta_distributed(alpha: float) -> None:
    drawn = symmetric_beta(alpha, 3, np.arange(20_000))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_blends_each_sample_with_its_neighbour_in_the_share_of_its_label() -> None:
    batch = make_batch()
    mixed, mix = mix_neighbours(DataConfig(mixup=0.8), batch, seed=1, step=2, position=0)
    for i in range(SIZE):
        share, other = float(mix.share[i]), neighbour(i)
        expected = share * batch.images[i] + (1 - share) * batch.images[other]
        torch.testing.assert_close(mixed.images[i], expected, rtol=1e-5, atol=1e-5)
        assert mix.partner_labels[i] == batch.labels[other] and mix.share[other] == mix.share[i]
    assert len(set(mix.share.tolist())) == SIZE // 2 and (mixed.labels == batch.labels).all()


def test_cutmix_exchanges_one_box_whose_area_is_the_share_of_the_label() -> None:
    batch = make_batch()
    mixed, mix = mix_neighbours(DataConfig(cutmix=1.0), batch, seed=1, step=2, position=0)
    for i in range(SIZE):
        own = (mixed.images[i] == batch.images[i]).all(dim=0)
        assert ((mixed.images[i] == batch.images[neighbour(i)]).all(dim=0) == ~own).all()
        rows, columns = np.nonzero(~own.numpy())
        if len(rows):
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a whole rectangle
        assert float(own.float().mean()) == pytest.approx(float(mix.share[i]))
    assert 0.3 < float(mix.share.mean()) < 0.9 and len(set(mix.share.tolist())) > SIZE // 4


def test_with_both_each_pair_takes_one_of_the_two() -> None:
    batch = make_batch()
    mixed, _ = mix_neighbours(DataConfig(mixup=1.0, cutmix=1.0), batch, seed=1, step=2, position=0)
    cut = [
        bool(((mixed.images[i] == batch.images[i]) | (mixed.images[i] == batch.images[neighbour(i)])).all())
        for i in range(SIZE)
    ]
    assert cut[::2] == cut[1::2] and 8 <= sum(cut[::2]) <= 24


def test_the_mix_is_the_same_however_the_global_batch_is_divided_and_another_at_each_step() -> None:
    config, batch = DataConfig(mixup=0.4, cutmix=1.0), make_batch(bad=(5,))
    whole, mix = mix_neighbours(config, batch, seed=1, step=2, position=0)
    for size in (2, 8, 32):
        for first in range(0, SIZE, size):
            mixed, share = mix_neighbours(config, part(batch, first, first + size), seed=1, step=2, position=first)
            assert (mixed.images == whole.images[first : first + size]).all()
            assert (share.share == mix.share[first : first + size]).all()
    for other in ({"seed": 1, "step": 3}, {"seed": 2, "step": 2}):
        assert (mix_neighbours(config, batch, position=0, **other)[1].share != mix.share).sum() > SIZE // 2


@pytest.mark.parametrize("config", [DataConfig(mixup=1.0), DataConfig(cutmix=1.0)])
def test_a_sample_that_cannot_be_used_is_not_mixed_into_its_neighbour(config: DataConfig) -> None:
    batch = make_batch(bad=(4, 11))
    mixed, mix = mix_neighbours(config, batch, seed=1, step=2, position=0)
    for i in (4, 5, 10, 11):
        assert (mixed.images[i] == batch.images[i]).all() and mix.share[i] == 1
    assert (mix.share < 1).sum() > SIZE // 2


def test_class_weights_are_as_defined_and_have_mean_one_over_the_images() -> None:
    counts = [100, 7, 1, 32]
    labels = np.repeat(np.arange(4), counts)
    inverse = class_weights(OptimConfig(class_weights="inverse"), counts)
    assert inverse.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(4), y=labels).tolist())
    effective = class_weights(OptimConfig(class_weights="effective", class_weights_beta=0.9), counts)
    numbers = [sum(0.9**k for k in range(count)) for count in counts]  # 1 + beta + ... + beta^(n-1)
    assert [float(w / effective[0]) for w in effective] == pytest.approx([numbers[0] / n for n in numbers])
    assert float(effective[labels].mean()) == pytest.approx(1)
    assert class_weights(OptimConfig(class_weights="inverse"), [3, 0, 3]).isfinite().all()


def test_the_loss_is_that_of_smoothed_mixed_targets_by_class_and_sample_weights() -> None:
    """Written out by sample and class: target t, loss -sum t log p."""
    counts, smoothing = [5, 1, 3], 0.2
    config = OptimConfig(class_weights="inverse", label_smoothing=smoothing)
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels, partners = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 0, 1, 2])
    share, weights = torch.tensor([0.3, 0.3, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    expected = 0.0
    for i in range(4):
        for label, part_of_label in ((labels[i], share[i]), (partners[i], 1 - share[i])):
            target = [smoothing / 3 + (1 - smoothing) * (c == label) for c in range(3)]
            log_p = logits[i] - logits[i].exp().sum().log()
            cross_entropy = -sum(float(t) * float(p) for t, p in zip(target, log_p, strict=True))
            expected += float(weights[i] * part_of_label) * 9 / (3 * counts[label]) * cross_entropy / 4
    objective = Objective(config, counts, torch.device("cpu"))
    assert float(objective(logits, labels, weights, Mix(partners, share))) == pytest.approx(expected, rel=1e-6)
