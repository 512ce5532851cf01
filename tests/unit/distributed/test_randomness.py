"""Hashed random numbers: the published generator, pure, and uniform."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from moce_ds.distributed.randomness import CROP, FLIP, hashed, uniform

COUNTERS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)


def splitmix(*counters: int) -> int:
    """SplitMix64's finaliser over the counters, in Python's unbounded integers."""
    word = 2**64 - 1
    state = 0
    for counter in counters:
        z = ((state ^ (counter & word)) + 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        state = z ^ (z >> 31)
    return state


def test_first_number_is_the_published_one() -> None:
    """SplitMix64 seeded with 0 begins with this number (Vigna's reference code)."""
    assert int(hashed(0)[()]) == 0xE220A8397B1DCDAF


@given(COUNTERS)
def test_equals_the_generator_in_plain_integers(counters: list[int]) -> None:
    assert int(hashed(*counters)[()]) == splitmix(*counters)


def test_each_element_is_what_it_would_be_alone() -> None:
    ids_B, tries_K = np.array([3, 10**12, 0]), np.arange(4)
    together = hashed(CROP, 7, ids_B[:, None], tries_K)
    assert together.shape == (3, 4)
    assert [[int(hashed(CROP, 7, int(i), int(k))[()]) for k in tries_K] for i in ids_B] == together.tolist()


@pytest.mark.parametrize("draw", [lambda n: uniform(CROP, 0, 0, n), lambda n: uniform(FLIP, n, 3, 5)])
def test_numbers_are_uniform_and_neighbours_independent(draw: Callable[[np.ndarray], np.ndarray]) -> None:
    numbers = draw(np.arange(50_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_no_two_uses_share_numbers() -> None:
    drawn = [hashed(what, seed, np.arange(50)[:, None], np.arange(50)) for what in range(6) for seed in range(3)]
    assert len(np.unique(np.stack(drawn))) == 6 * 3 * 50 * 50
