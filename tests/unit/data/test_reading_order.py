"""Reading orders: every image once an epoch, and blocks that keep to their windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moce_ds.data import reading_order
from moce_ds.data.reading_order import BlockOrder, Order, RandomOrder, permutation

SEED = st.integers(0, 2**63 - 1)


def block_order(sizes: list[int], window: int, seed: int) -> BlockOrder:
    return BlockOrder(np.concatenate([[0], np.cumsum(sizes)]), window, seed)


def epoch_of(order: Order, epoch: int) -> list[int]:
    return order.ids(epoch, np.arange(order.count)).tolist()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40), SEED, st.integers(0, 3))
def test_blocks_are_read_once_an_epoch_each_window_from_its_own(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    order = block_order(sizes, window, seed)
    ids = epoch_of(order, epoch)
    assert sorted(ids) == list(range(sum(sizes)))
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    for number, begin in enumerate(range(0, len(ids), window)):
        read = block_of[ids[begin : begin + window]]
        blocks_K, begin_K = order.blocks(epoch, number)
        assert set(read) == set(blocks_K.tolist())
        assert (np.diff(begin_K) == np.array(sizes)[blocks_K[:-1]]).all() and begin_K[0] <= begin


def test_a_place_does_not_depend_on_the_places_beside_it() -> None:
    order = block_order([5, 7, 3, 6, 5, 4], 8, seed=2)
    ids = epoch_of(order, 1)
    assert [int(order.ids(1, np.array([place]))[0]) for place in range(30)] == ids


def test_blocks_and_images_within_a_window_are_shuffled_anew_each_epoch() -> None:
    order = block_order([10] * 20, 50, seed=0)
    orders = [epoch_of(order, epoch) for epoch in range(4)] + [epoch_of(block_order([10] * 20, 50, 1), 0)]
    assert len({tuple(ids) for ids in orders}) == 5
    assert len({tuple(sorted(set(np.array(ids[:50]) // 10))) for ids in orders}) > 1  # other blocks in the first window
    assert all((np.abs(np.diff(ids)) > 1).mean() > 0.8 for ids in orders)


@pytest.mark.parametrize("window", [200, 1000])
def test_a_window_of_the_whole_set_is_a_random_order(window: int) -> None:
    """The first image of an epoch is any: in 32 equal parts of the set, each comes about equally often."""
    order = block_order([5] * 40, window, seed=0)
    first = [int(order.ids(epoch, np.array([0]))[0]) for epoch in range(1600)]
    drawn = np.bincount(np.array(first) * 32 // 200)
    assert min(drawn) > 25 and max(drawn) < 85


def test_epochs_and_seeds_have_random_orders_of_their_own() -> None:
    assert len({tuple(epoch_of(RandomOrder(50, seed), epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_random_orders_are_uniform() -> None:
    """Each of the 6 orders of 3 images comes about equally often."""
    drawn = [tuple(epoch_of(RandomOrder(3, 0), epoch)) for epoch in range(3000)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 6 and min(counts) > 400 and max(counts) < 600


def test_the_order_of_a_large_set_is_made_place_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_order, "_WHOLE", 999)
    made = permutation.cache_info().misses
    assert sorted(epoch_of(RandomOrder(1000, 0), 0)) == list(range(1000))
    assert permutation.cache_info().misses == made
    assert len(set(RandomOrder(10**12, 0).ids(3, np.arange(1000)).tolist())) == 1000
