"""Batches of images: a pure function of the reading order and the batch index, independent of the number of ranks.

Epochs form one endless stream of orders (`reading_order`), cut into batches of equal size. So every image is read
exactly once per epoch, no batch is short, and nothing is dropped or repeated at the end of an epoch.

Axes: G global batch, B one rank's part of it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moce_ds.data.reading_order import Order


def number_of_steps(epochs: float, images: int, batch_size: int) -> int:
    """Global batches of a run: the last one completes the last epoch."""
    return max(1, math.ceil(epochs * images / batch_size))


@dataclass(frozen=True)
class ReadList:
    """Images to read, in order: their ids and the epoch of each read. Both int64, same length."""

    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]

    def __getitem__(self, places: slice) -> "ReadList":
        """The images at some positions."""
        return ReadList(self.ids[places], self.epochs[places])

    def part(self, rank: int, world_size: int) -> "ReadList":
        """The consecutive part of one rank: [G] -> [G / world_size]."""
        size = len(self.ids) // world_size
        return self[rank * size : (rank + 1) * size]


@dataclass(frozen=True)
class ShuffledSampler:
    """Global batches of the endless stream of epochs, `batch_size` images at a time."""

    order: Order
    batch_size: int

    def batch(self, index: int) -> ReadList:
        """The global batch with this index, [G]: positions index * G to (index + 1) * G of the stream."""
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.order.count)
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.order.ids(int(epoch), offsets[here])
        return ReadList(ids, epochs)


@dataclass(frozen=True)
class SequentialSampler:
    """One pass in the order of the ids, from `first` to `last` (exclusive); the last batch may be short."""

    first: int
    last: int
    batch_size: int

    @property
    def num_batches(self) -> int:
        """Number of batches in the pass."""
        return -(-(self.last - self.first) // self.batch_size)

    def batch(self, index: int) -> ReadList:
        """The batch with this index, at most `batch_size` long; epoch 0."""
        start = self.first + index * self.batch_size
        ids = np.arange(start, min(start + self.batch_size, self.last), dtype=np.int64)
        return ReadList(ids, np.zeros_like(ids))
