"""The points that clusters are fitted on: L2-normalised features of this process, in units that the processes share.

A unit does not depend on the number of processes, so sums over units do not either (`distributed/in_order.py`).

Axes: N points (of one unit), D feature width.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moce_ds.data.clusters import normalised
from moce_ds.data.feature_store import FeatureSet
from moce_ds.distributed.in_order import own_units
from moce_ds.distributed.runtime import Runtime

ROWS = 8192
"""Points of a unit in memory; the [N, M] cosines of one unit are in memory at a time."""


class Points(Protocol):
    """Points of the fit.

    Attributes:
        count: points of all processes.
        units: their number of units.
    """

    count: int
    units: int

    def blocks(self) -> Iterator[Tensor]:
        """This process's units in their order, float32 [N, D] on its device."""
        ...


class KeptPoints:
    """A sample in memory: this process's units, and on rank 0 all of them.

    Args:
        ids: images of the sample, in increasing order.
        mean_D: subtracted before the features are normalised.
    """

    def __init__(self, features: FeatureSet, ids: np.ndarray, mean_D: np.ndarray, runtime: Runtime) -> None:
        self.count, self.dim, self.units = len(ids), features.dim, -(-len(ids) // ROWS)
        own = own_units(self.units, runtime)
        self.all_ND: np.ndarray | None = None
        if runtime.is_main:
            self.all_ND = _normalise(features.rows(ids), mean_D)
            units = torch.from_numpy(self.all_ND).split(ROWS)
            self._own = [units[unit].to(runtime.device) for unit in own]
        else:
            parts = (features.rows(ids[unit * ROWS : (unit + 1) * ROWS]) for unit in own)
            self._own = [torch.from_numpy(_normalise(part_ND, mean_D)).to(runtime.device) for part_ND in parts]

    def blocks(self) -> Iterator[Tensor]:
        """This process's units in their order, float32 [N, D] on its device."""
        return iter(self._own)


class StreamedPoints:
    """Points that are read from the disk in every pass. A unit holds the points of at most ROWS images of a block.

    Args:
        ids: images to fit on, in increasing order; None: all.
        mean_D: subtracted before the features are normalised.
    """

    def __init__(self, features: FeatureSet, ids: np.ndarray | None, mean_D: np.ndarray, runtime: Runtime) -> None:
        self.count = features.count if ids is None else len(ids)
        last = features.block_ids(features.num_blocks - 1)
        self._per_block = -(-features.block_rows // ROWS)
        self.units = (features.num_blocks - 1) * self._per_block - (-len(last) // ROWS)
        self._features, self._runtime, self._ids = features, runtime, ids
        self._mean_D = torch.from_numpy(mean_D).to(runtime.device)

    def blocks(self) -> Iterator[Tensor]:
        """This process's units in their order, float32 [N, D] on its device."""
        for unit in own_units(self.units, self._runtime):
            k, place = divmod(unit, self._per_block)
            yield normalised_on_device(self._chosen(k, place * ROWS), self._mean_D)

    def _chosen(self, k: int, row: int) -> np.ndarray:
        """The features of block k to fit on, from this row, float16 [N, D]."""
        features_ND = self._features.block(k)[row : row + ROWS]
        if self._ids is None:
            return features_ND
        start = self._features.block_ids(k).start + row
        first, last = np.searchsorted(self._ids, (start, start + len(features_ND)))
        return features_ND[self._ids[first:last] - start]


def normalised_on_device(features_ND: np.ndarray, mean_D: Tensor) -> Tensor:
    """`normalised`, computed on the device of `mean_D`: float32 [N, D].

    Args:
        features_ND: copied to the device in its own dtype.
    """
    points_ND = torch.from_numpy(np.array(features_ND)).to(mean_D.device).to(torch.float32).sub_(mean_D)
    points_ND /= points_ND.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    return points_ND


def _normalise(features_ND: np.ndarray, mean_D: np.ndarray) -> np.ndarray:
    """`normalised`, in place and in parts: needs no second copy of the features."""
    for first in range(0, len(features_ND), ROWS):
        features_ND[first : first + ROWS] = normalised(features_ND[first : first + ROWS], mean_D)
    return features_ND
