"""The order of the images in an epoch, place by place: a pure function of (seed, epoch, place).

Legend: N images of the set, K blocks of consecutive images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moce_ds.data.shard_manifest import ShardFile
from moce_ds.distributed.randomness import BLOCKS, SHUFFLE, WINDOW, hashed, shuffled

_WHOLE = 1 << 21
"""Images of a set whose whole permutation is made at once, 16 MiB, as in all earlier versions: runs that these began
resume in the same order. The order of a larger set is computed place by place."""

BLOCK_BYTES = 1 << 24
"""Bytes of a block, on average over the set: 16 MiB, which disks, Lustre and object stores read at full speed. Another
value would change the order of runs that are resumed."""


class Order(Protocol):
    """The order of the `count` images of each epoch."""

    @property
    def count(self) -> int:
        """N."""
        ...

    def ids(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images at some places, 0 to N - 1, of an epoch."""
        ...


@dataclass(frozen=True)
class RandomOrder:
    """Every order of the images is equally likely."""

    count: int
    seed: int

    def ids(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images at some places of an epoch."""
        if self.count <= _WHOLE:
            return permutation(self.count, self.seed, epoch)[places]
        return shuffled(places, self.count, _key(SHUFFLE, self.seed, epoch))


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """Blocks in a random order, whose images are shuffled within windows.

    The blocks of an epoch, one after the other in a random order, are a sequence of images. It is cut into windows of
    equal length, and the images of each window are shuffled. So a run that reads a window needs only the few blocks in
    it, and each block lies in one piece on the storage.

    Attributes:
        first_K1: the first image of each block, and N; int64, rising.
        window: images of a window; the last one of an epoch may have fewer.
    """

    first_K1: NDArray[np.int64]
    window: int
    seed: int

    @property
    def count(self) -> int:
        """N."""
        return int(self.first_K1[-1])

    def ids(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images at some places of an epoch."""
        in_sequence = np.empty_like(places)
        window_of = places // self.window
        for window in np.unique(window_of):
            here = window_of == window
            begin, size = self._extent(int(window))
            key = _key(WINDOW, self.seed, epoch, int(window))
            in_sequence[here] = begin + shuffled(places[here] - begin, size, key)
        block_K, begin_K1 = self._sequence(epoch)
        slots = np.searchsorted(begin_K1, in_sequence, side="right") - 1
        return self.first_K1[block_K[slots]] + in_sequence - begin_K1[slots]

    def blocks(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks of a window, in the order of the sequence, and the place where each begins."""
        block_K, begin_K1 = self._sequence(epoch)
        begin, size = self._extent(window)
        first, last = np.searchsorted(begin_K1, (begin, begin + size - 1), side="right") - 1
        return block_K[first : last + 1], begin_K1[first : last + 1]

    def _extent(self, window: int) -> tuple[int, int]:
        begin = window * self.window
        return begin, min(self.window, self.count - begin)

    def _sequence(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks in the order of an epoch, [K], and the place where each begins, [K + 1]."""
        return _sequence(self, epoch)


def blocks_of(shards: Sequence[ShardFile]) -> NDArray[np.int64]:
    """The first image of each block of a set, and N: int64 [K + 1].

    A block has consecutive images of one shard, equally many but for the last block of each shard.
    """
    counts = [shard.count for shard in shards]
    ends = np.cumsum(counts)
    images = max(1, round(BLOCK_BYTES * int(ends[-1]) / sum(shard.bytes for shard in shards)))
    first = [np.arange(end - count, end, images) for count, end in zip(counts, ends, strict=True)]
    return np.concatenate([*first, ends[-1:]]).astype(np.int64)


@lru_cache(maxsize=2)  # a batch spans at most two epochs, unless the set is smaller than the batch
def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The whole order of an epoch, [count]."""
    key = int(hashed(SHUFFLE, seed, epoch)[()])
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


@lru_cache(maxsize=2)
def _sequence(order: BlockOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    places = np.arange(len(order.first_K1) - 1, dtype=np.int64)
    block_K = shuffled(places, len(places), _key(BLOCKS, order.seed, epoch))
    return block_K, np.concatenate([[0], np.cumsum(np.diff(order.first_K1)[block_K])])


def _key(purpose: int, *counters: int) -> int:
    return int(hashed(purpose, *counters).astype(np.int64)[()])
