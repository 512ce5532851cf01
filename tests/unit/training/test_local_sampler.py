"""Batches dealt to ranks: which table orders them, that each is ordered once, and threads that ask at once.

Axes: N images, M clusters, L expert layers, E experts, G images of a micro-batch over all ranks.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import numpy as np
import pytest

from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.moe.placement import default_placement, local_order
from moce_ds.training.local_sampler import LEAD, LocalSampler

N, M, L, E, W, EP, G = 500, 20, 2, 4, 4, 2, 64
IDS_N = np.random.default_rng(0).integers(M, size=N).astype(np.int32)
SLOT_LE = default_placement(L, E)
FIRST_ML, SECOND_ML = np.random.default_rng(1).integers(E, size=(2, M, L))


@dataclass(frozen=True)
class Counted(ShuffledSampler):
    """Lists the batches that it was asked for."""

    asked: list[int] = field(default_factory=list)

    def batch(self, index: int) -> ReadList:
        self.asked.append(index)
        return super().batch(index)


def sampler() -> LocalSampler:
    return LocalSampler(Counted(RandomOrder(N, seed=3), G), IDS_N, SLOT_LE, W, EP, [(0, FIRST_ML)])


def ordered(index: int, expert_ML: np.ndarray) -> np.ndarray:
    ids_G = ShuffledSampler(RandomOrder(N, seed=3), G).batch(index).ids
    order_G = local_order(IDS_N[ids_G].astype(np.int64), expert_ML, SLOT_LE, W, EP)
    assert order_G.tolist() != list(range(G))  # else nothing would be seen of the table
    return ids_G[order_G]


def test_a_table_orders_the_batches_from_its_first_on() -> None:
    own = sampler()
    before = [own.batch(index).ids for index in range(5)]
    own.use(SECOND_ML, next_batch=2)
    for index in (*range(5), 2 + LEAD - 1):
        np.testing.assert_array_equal(own.batch(index).ids, ordered(index, FIRST_ML))
    np.testing.assert_array_equal(before, [own.batch(index).ids for index in range(5)])
    np.testing.assert_array_equal(own.batch(2 + LEAD).ids, ordered(2 + LEAD, SECOND_ML))
    resumed = sampler()
    resumed.tables = LocalSampler.tables_from_tree(own.to_tree())
    np.testing.assert_array_equal(resumed.batch(2 + LEAD).ids, ordered(2 + LEAD, SECOND_ML))


def test_a_batch_that_is_read_before_its_table_is_known_is_an_error() -> None:
    own = sampler()
    own.batch(2 + LEAD)
    with pytest.raises(AssertionError, match=f"batch {2 + LEAD} was read before the table"):
        own.use(SECOND_ML, next_batch=2)
    own.use(SECOND_ML, next_batch=3)


def test_threads_get_the_same_batches_and_each_is_ordered_once() -> None:
    own, threads = sampler(), 8
    together = Barrier(threads)

    def ask(_: int) -> list[list[int]]:
        together.wait()
        return [own.batch(index).ids.tolist() for index in range(LEAD)]

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(ask, range(threads)))
    assert answers == [[ordered(index, FIRST_ML).tolist() for index in range(LEAD)]] * threads
    assert isinstance(own.sampler, Counted) and own.sampler.asked == list(range(LEAD))


def test_batches_of_long_ago_are_not_kept() -> None:
    own = sampler()
    for index in (*range(100), 0):
        own.batch(index)
    assert isinstance(own.sampler, Counted) and own.sampler.asked == [*range(100), 0]
