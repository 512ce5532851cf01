"""Batches whose images are already on the ranks of their experts, as far as possible.

Axes: L expert layers, M clusters, E experts, W ranks, B images of a rank, G = W B,
N images of the shard set.
"""

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.moe.placement import local_order

LEAD = 8
"""Batches between a new table and the first batch that it orders: more than the loader ever reads ahead."""

_KEPT = 2 * LEAD  # batches: those that the loader reads ahead, and those that training has just used


@dataclass
class LocalSampler:
    """Assigns the images of each global batch to the ranks that hold their experts (`local_order`).

    The global batches are those of `sampler`. The loader reads ahead, so a batch is ordered by the route table of a few
    steps before: slightly more images move between ranks, and the result is the same. All ranks change to a new table
    at the same batch. The loader asks for a batch from its own thread, training asks for the same batch later: each is
    ordered once, and training does not wait for one that is being ordered for the loader.

    Attributes:
        tables: (first batch, expert_ML) in rising order; a batch uses the last table that begins at or before it.
    """

    sampler: ShuffledSampler
    ids_N: NDArray[np.int32]
    slot_LE: NDArray[np.int64]
    world_size: int
    ep_size: int
    tables: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)
    _ordered: dict[int, ReadList] = field(default_factory=dict, init=False, repr=False)
    _last: int = field(default=-1, init=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @property
    def batch_size(self) -> int:
        """G."""
        return self.sampler.batch_size

    def batch(self, index: int) -> ReadList:
        """The micro-batch with this index, [G], rank after rank. Any thread may ask; nobody may write into it."""
        if (kept := self._ordered.get(index)) is not None:  # without the lock
            return kept
        with self._lock:
            if index not in self._ordered:
                self._ordered[index] = self._order(index)
                self._last = max(self._last, index)
                if len(self._ordered) > _KEPT:
                    del self._ordered[next(iter(self._ordered))]
            return self._ordered[index]

    def _order(self, index: int) -> ReadList:
        plain = self.sampler.batch(index)
        expert_ML = [table for first, table in self.tables if first <= index][-1]
        clusters_G = self.ids_N[plain.ids].astype(np.int64)
        order_G = local_order(clusters_G, expert_ML, self.slot_LE, self.world_size, self.ep_size)
        return ReadList(plain.ids[order_G], plain.epochs[order_G])

    def use(self, expert_ML: NDArray[np.int64], next_batch: int) -> None:
        """Use another table, from `LEAD` batches after `next_batch`; tables that no later batch uses are dropped."""
        with self._lock:
            assert self._last < next_batch + LEAD, f"batch {self._last} was read before the table that orders it"
            current = [i for i, (first, _) in enumerate(self.tables) if first <= next_batch]
            self.tables = [*self.tables[current[-1] if current else 0 :], (next_batch + LEAD, expert_ML)]

    def to_tree(self) -> list[dict[str, Any]]:
        """The tables as plain data for a checkpoint."""
        return [{"first": first, "expert_ML": table.tolist()} for first, table in self.tables]

    @staticmethod
    def tables_from_tree(tree: list[dict[str, Any]]) -> list[tuple[int, NDArray[np.int64]]]:
        """The inverse of `to_tree`."""
        return [(item["first"], np.array(item["expert_ML"], dtype=np.int64)) for item in tree]
