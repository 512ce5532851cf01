"""Counter-based random numbers: a function of their purpose, not of who draws them or when.

Crops, flips and masks are looked up by (seed, epoch, image id). So they do not depend on the number of ranks, on
threads, or on where a run was resumed. The generator applies the SplitMix64 finaliser (Steele, Lea and Flood, 2014) to
the counters one after the other.

`shuffled` computes an order of n numbers place by place, in constant memory, by a keyed bijection. The numbers below
a * b, with a = ceil(sqrt(n)) and b = ceil(n / a), are pairs (left below a, right below b). Each round of a Feistel
network adds a hash of one half to the other, modulo a or b in turn. A round can be undone, so all together are a
bijection. Fewer than a of the a * b numbers are not below n. A number that lands on one of them takes the rounds again
until it lands below n (cycle walking), which leaves a bijection of the numbers below n. Source: Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

import math

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 16
"""Fewer leave the orders of six numbers measurably unequal (`tests/unit/distributed/test_bijection.py`)."""


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers: each bit of the result depends on all bits of the argument."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def hashed(*counters: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 hashed bits for each element of the broadcast `counters` (integers of any sign)."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            word = np.asarray(counter, dtype=np.int64).astype(np.uint64)
            state = _mix((state ^ word) + _GOLDEN)
    return state.reshape(np.broadcast_shapes(*(np.shape(c) for c in counters)))


def uniform(*counters: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """One number in [0, 1) for each element of the broadcast `counters`."""
    return (hashed(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(places: NDArray[np.int64], count: int, key: int) -> NDArray[np.int64]:
    """The numbers that stand at some places in the order of `count` numbers that `key` determines.

    Args:
        places: 0 to count - 1, any shape.
        count: 1 to 2^62.
        key: any int64; each key has an order of its own.

    Returns:
        int64, the shape of `places`; distinct places have distinct numbers, 0 to count - 1.
    """
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    keys = hashed(key, np.arange(_ROUNDS))
    numbers = _rounds(places.astype(np.uint64), np.uint64(a), np.uint64(b), keys)
    while (outside := numbers >= count).any():
        numbers[outside] = _rounds(numbers[outside], np.uint64(a), np.uint64(b), keys)
    return numbers.astype(np.int64)


def _rounds(numbers: NDArray[np.uint64], a: np.uint64, b: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    right, left = np.divmod(numbers, a)
    for of_left, of_right in zip(keys[::2], keys[1::2], strict=True):
        left = _added(left, right, of_left, a)
        right = _added(right, left, of_right, b)
    return right * a + left


def _added(to: NDArray[np.uint64], half: NDArray[np.uint64], key: np.uint64, limit: np.uint64) -> NDArray[np.uint64]:
    """A hash of the other half, 0 to limit - 1, added modulo `limit`, which is below 2^32."""
    total = to + ((_mix(half ^ key) >> np.uint64(32)) * limit >> np.uint64(32))
    total -= limit * (total >= limit)
    return total


# The first counter of every draw is its purpose, so that two uses never share numbers.
CROP, FLIP, MASK, GATE_NOISE, SHUFFLE, INIT, ROUTE, AUGMENT, FORWARD, BLOCKS, WINDOW = range(11)
