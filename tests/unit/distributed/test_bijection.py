"""The keyed bijection: a permutation for every count, of which every one is equally likely."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from moce_ds.distributed.randomness import shuffled


def test_it_is_a_permutation_for_every_count_to_10_000() -> None:
    for count in range(1, 10_001):
        numbers = shuffled(np.arange(count), count, key=7 * count)
        assert np.bincount(numbers, minlength=count).tolist() == [1] * count, count


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_of_few_numbers_is_equally_likely(count: int) -> None:
    keys, places = 40 * math.factorial(count), np.arange(count)
    drawn = Counter(tuple(shuffled(places, count, key)) for key in range(keys))
    assert chisquare([*drawn.values(), *[0] * (math.factorial(count) - len(drawn))]).pvalue > 1e-4


@pytest.mark.parametrize("count", [1000, 1009, 1024, 10**9])
def test_numbers_are_uniform_and_neighbours_unrelated(count: int) -> None:
    """Where a place lands, and how far its neighbour lands from it, in 32 equal parts of the range."""
    places = np.arange(1, 500)
    numbers = np.stack([shuffled(places, count, key) for key in range(60)])
    for found in (numbers, np.diff(numbers, axis=1) % count):
        parts = np.bincount((found.ravel() * 32) // count, minlength=32)
        expected = np.bincount((np.arange(count) * 32) // count) / count if count < 10**6 else np.full(32, 1 / 32)
        assert chisquare(parts, expected * found.size).pvalue > 1e-4


def test_keys_have_orders_of_their_own() -> None:
    assert len({tuple(shuffled(np.arange(50), 50, key)) for key in [*range(50), -1, 2**63 - 1]}) == 52


def test_part_of_the_places_is_the_same_part_of_the_order() -> None:
    order = shuffled(np.arange(1000), 1000, 3)
    places = np.array([[999, 0], [17, 512]])
    np.testing.assert_array_equal(shuffled(places, 1000, 3), order[places])
    assert places.tolist() == [[999, 0], [17, 512]]
