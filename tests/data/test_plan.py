"""The order of the samples: exactly once per epoch, the same for every world size, the same after a resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.draws import random_bits
from dist_train.data.plan import EpochPlan, choose_streams, evaluation_batches, rank_batch
from dist_train.errors import UseError

TARS = [37, 100, 64, 51]


def run_samples(plan: EpochPlan, world_size: int, total: int, start: int = 0) -> list[int]:
    """Samples of the run from `start` on, batch by batch, each batch as a sorted set of all ranks' samples."""
    out: list[int] = []
    for consumed in range(start, total, plan.batch_size):
        batch = np.concatenate([plan.batch(consumed, rank, world_size).sample for rank in range(world_size)])
        out += sorted(batch.tolist())
    return out


@pytest.mark.parametrize("world_size", range(1, 8))
def test_252_samples_in_uneven_tars_come_exactly_once_per_epoch_over_three_epochs(world_size: int) -> None:
    plan = EpochPlan(TARS, batch_size=84, seed=0, shuffle_window=16)  # 84 divides over 1, 2, 3, 4, 6, 7 ranks
    if 84 % world_size:
        plan = EpochPlan(TARS, batch_size=4 * world_size, seed=0, shuffle_window=16)
    seen = Counter()
    steps = -(-3 * 252 // plan.batch_size)
    for step in range(steps):
        for rank in range(world_size):
            chosen = plan.batch(step * plan.batch_size, rank, world_size)
            assert len(chosen) == plan.batch_size // world_size
            seen.update(zip(chosen.epoch.tolist(), chosen.sample.tolist(), strict=True))
    assert set(seen.values()) == {1}
    for epoch in range(3):
        assert {sample for e, sample in seen if e == epoch} == set(range(252))


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.one_of(st.just(0), st.integers(0, 60), st.just(700)), min_size=1, max_size=12).filter(any),
    share=st.integers(1, 5),
    world_size=st.integers(1, 64),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 50),
    data=st.data(),
)
def test_any_split_any_world_size_every_epoch_holds_each_sample_once(
    shards: list[int], share: int, world_size: int, seed: int, window: int, data: st.DataObject
) -> None:
    total = sum(shards)
    batch = share * world_size
    streams = data.draw(st.sampled_from([0, *(d for d in range(1, batch + 1) if batch % d == 0)]), "streams")
    plan = EpochPlan(shards, batch, seed, streams, window)
    steps = -(-2 * total // plan.batch_size)
    seen = Counter()
    for step in range(steps):
        for rank in range(world_size):
            chosen = plan.batch(step * plan.batch_size, rank, world_size)
            seen.update(zip(chosen.epoch.tolist(), chosen.sample.tolist(), strict=True))
    assert set(seen.values()) == {1}
    for epoch in range(2):
        assert {sample for e, sample in seen if e == epoch} == set(range(total))


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0),
    resumed=st.integers(0, 30),
    worlds=st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12])),
)
def test_global_batches_do_not_depend_on_world_size_or_on_where_the_run_was_resumed(
    shards: list[int], resumed: int, worlds: tuple[int, int]
) -> None:
    def plan() -> EpochPlan:
        return EpochPlan(shards, batch_size=12, seed=3, shuffle_window=7)

    total = 40 * 12
    straight = run_samples(plan(), worlds[0], total)
    again = run_samples(plan(), worlds[1], total, start=resumed * 12)
    assert again == straight[resumed * 12 :]


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0),
    consumed=st.integers(0, 400),
    batch=st.sampled_from([1, 3, 12, 60]),
    window=st.integers(1, 20),
    together=st.integers(1, 500),
)
def test_batches_one_after_the_other_are_those_asked_for_alone(
    shards: list[int], consumed: int, batch: int, window: int, together: int
) -> None:
    """Whatever number of them is located at once: within a window, over windows, over epochs."""
    plan, alone = (EpochPlan(shards, batch, seed=3, shuffle_window=window) for _ in range(2))
    for rank in range(world_size := 3 if batch % 3 == 0 else 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_train.data.plan._LOCATED_AT_ONCE", together)
            for step, got in zip(range(60), plan.batches(consumed, rank, world_size), strict=False):
                expected = alone.batch(consumed + step * batch, rank, world_size)
                for name, values in vars(expected).items():
                    assert np.array_equal(getattr(got, name), values), (rank, step, name)


def test_the_order_follows_the_written_definition() -> None:
    """Brute force: build the whole epoch from the module's four sentences, with lists."""
    from dist_train.data.draws import permutation

    shards, batch, seed, streams, window = [5, 0, 13, 9, 2], 6, 11, 3, 4
    plan = EpochPlan(shards, batch, seed, streams, window)
    first = [sum(shards[:i]) for i in range(len(shards))]
    for epoch in range(3):
        line = [first[s] + i for s in permutation(len(shards), seed, 1, epoch) for i in range(shards[s])]
        lengths = [len(range(s, len(line), streams)) for s in range(streams)]
        queues = []
        for s in range(streams):
            part = line[sum(lengths[:s]) : sum(lengths[: s + 1])]
            windows = [part[i : i + window] for i in range(0, len(part), window)]
            queues.append([w[i] for n, w in enumerate(windows) for i in permutation(len(w), seed, 2, epoch, s, n)])
        expected = [queues[p % streams][p // streams] for p in range(len(line))]
        got = {}
        for consumed in range(0, 4 * len(line), batch):
            chosen = plan.batch(consumed)
            positions = np.arange(consumed, consumed + batch)
            order = np.argsort(positions % len(line) % streams, kind="stable")
            got |= {int(positions[o]): int(sample) for o, sample in zip(order, chosen.sample, strict=True)}
        assert [got[epoch * len(line) + p] for p in range(len(line))] == expected


def test_a_rank_keeps_to_its_own_streams_and_so_to_its_part_of_the_shards() -> None:
    plan = EpochPlan([100] * 64, batch_size=64, seed=0, shuffle_window=4096)
    shards_of = [set() for _ in range(8)]
    for consumed in range(0, 6400 - 64, 64):
        for rank in range(8):
            shards_of[rank] |= set(plan.batch(consumed, rank, 8).shard.tolist())
    assert all(len(shards) == 8 for shards in shards_of)
    assert len(set.union(*shards_of)) == 64


def test_a_node_of_many_reads_hardly_more_than_its_share() -> None:
    plan = EpochPlan([100] * 1600, batch_size=512, seed=0, shuffle_window=64)  # 64 streams over 16 nodes of 4 ranks
    shards = set()
    for consumed in range(0, 160_000 - 512, 512):
        for rank in range(20, 24):
            shards |= set(plan.batch(consumed, rank, 64).shard.tolist())
    assert len(shards) <= 1.05 * 100


def test_epochs_and_seeds_have_different_orders() -> None:
    plan = EpochPlan(TARS, batch_size=252, seed=0)
    orders = [plan.batch(epoch * 252).sample.tolist() for epoch in range(3)]
    orders.append(EpochPlan(TARS, batch_size=252, seed=1).batch(0).sample.tolist())
    assert len({tuple(order) for order in orders}) == 4


def test_place_in_shard_and_sample_index_agree() -> None:
    plan = EpochPlan(TARS, batch_size=63, seed=5)
    starts = np.cumsum([0, *TARS[:-1]])
    chosen = plan.batch(63)
    assert (starts[chosen.shard] + chosen.place == chosen.sample).all()
    assert (chosen.place < np.array(TARS)[chosen.shard]).all()


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(0, 50), min_size=1, max_size=10),
    batch=st.integers(1, 40),
    world_size=st.integers(1, 20),
)
def test_evaluation_counts_each_sample_once_with_equally_many_batches_on_every_rank(
    shards: list[int], batch: int, world_size: int
) -> None:
    ranks = [evaluation_batches(shards, batch, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    samples = [int(s) for batches in ranks for positions in batches for s in positions.sample]
    assert samples == list(range(sum(shards)))
    assert all(len(positions) <= batch for batches in ranks for positions in batches)


def test_streams_are_the_largest_divisor_of_the_batch_up_to_64_or_an_eighth_of_it() -> None:
    batches = (16, 48, 64, 100, 256, 7, 131, 1024, 65536)
    assert [choose_streams(batch, 0) for batch in batches] == [16, 48, 64, 50, 64, 7, 1, 128, 8192]
    with pytest.raises(UseError, match=r"data\.streams 5 does not divide train\.batch_size 64; these do: 1, 2, 4"):
        choose_streams(64, 5)


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers_that_would() -> None:
    with pytest.raises(UseError, match="64 does not divide over 3 ranks; use 63 or 66"):
        rank_batch(64, 3)
    with pytest.raises(UseError, match="2 does not divide over 3 ranks; use 3,"):
        rank_batch(2, 3)


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0),
    share=st.integers(1, 5),
    world_size=st.integers(1, 4),
    start=st.integers(0, 300),
    window=st.integers(1, 50),
)
def test_shards_ahead_name_what_each_batch_touches_and_what_its_windows_hold(
    shards: list[int], share: int, world_size: int, start: int, window: int
) -> None:
    batch = share * world_size
    plan = EpochPlan(shards, batch, seed=1, shuffle_window=window)
    start -= start % batch
    end = start + 2 * sum(shards) + batch
    # Everything that any rank touches while a window of every stream passes, before and after.
    reach = plan.streams * window + batch
    touched = {
        at: set(plan.batch(at).shard.tolist()) for at in range(max(0, start - reach // batch * batch), end, batch)
    }
    named_by_rank = []
    for rank in range(world_size):
        named, needs = {}, plan.shards_ahead(start, rank, world_size)
        now, after = next(needs), next(needs)
        for at in range(start, end, batch):
            while after.position <= at:
                now, after = after, next(needs)
            named[at] = set(now.shards)
            assert set(plan.batch(at, rank, world_size).shard.tolist()) <= named[at]
            if at + reach < end:
                assert named[at] <= set().union(*(touched[t] for t in touched if abs(t - at) <= reach))
        named_by_rank.append(named)
    needs = plan.shards_ahead(start, 0, world_size, ranks=world_size)
    first = next(needs)
    assert set(first.shards) == set().union(*(named[start] for named in named_by_rank))


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_numbers_and_arrays_of_them_draw_the_same_bits(counters: list[int]) -> None:
    (in_an_array,) = random_bits(*(np.array([counter]) for counter in counters))
    assert random_bits(*counters) == in_an_array
