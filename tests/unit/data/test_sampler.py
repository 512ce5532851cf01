"""The sampler: every image once an epoch, the same global batch for any world, nothing remembered."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moce_ds.data.reading_order import RandomOrder, permutation
from moce_ds.data.sampler import ReadList, SequentialSampler, ShuffledSampler

COUNT, BATCH, SEED = st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**63 - 1)


@given(COUNT, BATCH, SEED, st.integers(1, 3))
def test_every_image_exactly_once_an_epoch(count: int, batch: int, seed: int, epochs: int) -> None:
    sampler = ShuffledSampler(RandomOrder(count, seed), batch)
    batches = [sampler.batch(index) for index in range(-(-count * epochs // batch))]
    assert all(len(one.ids) == len(one.epochs) == batch for one in batches)
    ids, of_epoch = (np.concatenate([getattr(one, name) for one in batches]) for name in ("ids", "epochs"))
    assert (np.diff(of_epoch) >= 0).all()
    for epoch in range(epochs):
        assert sorted(ids[of_epoch == epoch]) == list(range(count))


@given(COUNT, st.integers(1, 8), st.sampled_from([1, 2, 4]), SEED, st.integers(0, 1000))
def test_ranks_share_one_global_batch(count: int, part: int, world: int, seed: int, index: int) -> None:
    whole = ShuffledSampler(RandomOrder(count, seed), 4 * part).batch(index)
    parts = [
        ShuffledSampler(RandomOrder(count, seed), 4 * part).batch(index).part(rank, world) for rank in range(world)
    ]
    assert {len(one.ids) for one in parts} == {4 * part // world}
    np.testing.assert_array_equal(np.concatenate([one.ids for one in parts]), whole.ids)
    np.testing.assert_array_equal(np.concatenate([one.epochs for one in parts]), whole.epochs)


@given(COUNT, BATCH, SEED, st.permutations(range(6)))
def test_a_batch_depends_on_seed_and_index_only(count: int, batch: int, seed: int, order: list[int]) -> None:
    in_order = [ShuffledSampler(RandomOrder(count, seed), batch).batch(index).ids.tolist() for index in range(6)]
    sampler = ShuffledSampler(RandomOrder(count, seed), batch)
    permutation.cache_clear()
    assert {index: sampler.batch(index).ids.tolist() for index in order} == dict(enumerate(in_order))


@given(st.integers(1, 30), st.integers(1, 30), SEED, st.integers(0, 20))
def test_accumulation_cuts_the_same_stream(part: int, count: int, seed: int, step: int) -> None:
    """A step in three micro-batches reads what it reads in one."""
    whole = ShuffledSampler(RandomOrder(count, seed), 3 * part).batch(step)
    parts = [ShuffledSampler(RandomOrder(count, seed), part).batch(3 * step + k).ids for k in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.ids)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
def test_sequential_sampler_reads_a_range_once_in_order(first: int, length: int, batch: int) -> None:
    sampler = SequentialSampler(first, first + length, batch)
    batches = [sampler.batch(index) for index in range(sampler.num_batches)]
    assert [len(one.ids) for one in batches[:-1]] == [batch] * (len(batches) - 1)
    assert [i for one in batches for i in one.ids.tolist()] == list(range(first, first + length))
    assert all(one.ids.dtype == one.epochs.dtype == np.int64 and not one.epochs.any() for one in batches)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_part_is_consecutive(rank: int) -> None:
    part = ReadList(np.arange(6), np.arange(6) // 3).part(rank, 2)
    assert part.ids.tolist() == [[0, 1, 2], [3, 4, 5]][rank] and part.epochs.tolist() == [rank] * 3
