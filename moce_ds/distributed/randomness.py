"""Counter-based random numbers: a function of their purpose, not of who draws them or when.

Crops, flips and masks are looked up by (seed, epoch, image id). So they do not depend on the number of ranks, on
threads, or on where a run was resumed. The generator applies the SplitMix64 finaliser (Steele, Lea and Flood, 2014) to
the counters one after the other.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
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


# The first counter of every draw is its purpose, so that two uses never share numbers.
CROP, FLIP, MASK, GATE_NOISE, SHUFFLE, INIT, ROUTE, AUGMENT, FORWARD = range(9)
