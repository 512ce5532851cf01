"""Reading images where their experts live: the same global batches, their images dealt to ranks by route.

Reading runs ahead of training, so a batch is dealt by the route table of some steps before. That moves a few images
more, and changes nothing else. Every change of table takes force at an agreed batch, on all ranks alike.

Axes: M clusters, L expert layers, E experts, G images of a micro-batch over all ranks.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.moe.placement import local_order

LEAD = 8
"""Batches between a new table and the first batch dealt by it: more than the loader ever reads ahead."""


@dataclass
class LocalSampler:
    """A sampler whose batches are those of `sampler`, their images ordered by `local_order`.

    Attributes:
        tables: (first batch, expert_ML) in rising order; the last one that a batch has reached counts.
    """

    sampler: ShuffledSampler
    ids_N: NDArray[np.int32]
    slot_LE: NDArray[np.int64]
    world_size: int
    ep_size: int
    tables: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)

    def batch(self, index: int) -> ReadList:
        """The micro-batch with this index, [G], rank after rank."""
        plain = self.sampler.batch(index)
        expert_ML = [table for first, table in self.tables if first <= index][-1]
        clusters_G = self.ids_N[plain.ids].astype(np.int64)
        order_G = local_order(clusters_G, expert_ML, self.slot_LE, self.world_size, self.ep_size)
        return ReadList(plain.ids[order_G], plain.epochs[order_G])

    def use(self, expert_ML: NDArray[np.int64], next_batch: int) -> None:
        """Deal by another table, from `LEAD` batches after `next_batch` on; older tables out of use are dropped."""
        current = [i for i, (first, _) in enumerate(self.tables) if first <= next_batch]
        self.tables = [*self.tables[current[-1] if current else 0 :], (next_batch + LEAD, expert_ML)]

    def to_tree(self) -> list[dict[str, Any]]:
        """The tables as plain data for a checkpoint."""
        return [{"first": first, "expert_ML": table.tolist()} for first, table in self.tables]

    @staticmethod
    def tables_from_tree(tree: list[dict[str, Any]]) -> list[tuple[int, NDArray[np.int64]]]:
        """The inverse of `to_tree`."""
        return [(item["first"], np.array(item["expert_ML"], dtype=np.int64)) for item in tree]
