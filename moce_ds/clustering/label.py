"""The pass that labels every image: processes share the blocks of features, and rank 0 writes the ids as they come.

Memory does not grow with the images, except for the least typical 5% of them (4 bytes each, on rank 0).

Axes: N images of a block, M clusters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from torch import Tensor

from moce_ds.clustering.points import ROWS, normalised_on_device
from moce_ds.common.errors import DataError
from moce_ds.data.clusters import LOW, Clusters, ids_writer
from moce_ds.data.feature_store import FeatureSet
from moce_ds.distributed.in_order import own_units, take_in_order
from moce_ds.distributed.runtime import Runtime

_BINS = 1024
"""Bins of the cosines from -1 to 1, per cluster."""

_ROWS = 2**22
"""Cosines that are read at a time."""

_NOT_LOW = 2.0  # larger than any cosine


def label_all(
    features: FeatureSet,
    clusters: Clusters,
    take: Callable[[Tensor], object],
    runtime: Runtime,
    watch: Callable[[int], object],
) -> None:
    """Label every image; a collective.

    Args:
        clusters: without sizes and cosines.
        take: gets the labels of each block: `Labels.take` on rank 0, `ignore` on the other ranks.
        watch: called after each block of this process with its number of images.

    Raises:
        ArtefactError: a block is damaged, or the ids cannot be written.
    """
    like = torch.empty(2, features.block_rows, dtype=torch.int32)  # ids, and the bits of the float32 cosines
    results = _labelled(features, clusters, like, runtime, watch)
    take_in_order(results, features.num_blocks, like, take, runtime)


def ignore(result: Tensor) -> None:
    """What the ranks without labels do with the results of all."""


def _labelled(
    features: FeatureSet, clusters: Clusters, like: Tensor, runtime: Runtime, watch: Callable[[int], object]
) -> Iterator[Tensor]:
    """The ids, and the bits of the cosines, of this process's blocks."""
    assign = clusters.assign_with_cosine if runtime.device.type == "cpu" else on_device(clusters, runtime.device)
    for half_ND in map(features.block, own_units(features.num_blocks, runtime)):
        result = torch.zeros_like(like)
        for first in range(0, len(half_ND), ROWS):
            ids_N, cosine_N = assign(half_ND[first : first + ROWS])
            result[0, first : first + len(ids_N)] = torch.from_numpy(ids_N)
            result[1, first : first + len(ids_N)] = torch.from_numpy(cosine_N.view(np.int32))
        yield result
        watch(len(half_ND))


def on_device(clusters: Clusters, device: torch.device) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """`Clusters.assign_with_cosine`, computed on a device; equal up to rounding."""
    mean_D, embeddings_MD, duals_M = (
        torch.from_numpy(tensor).to(device) for tensor in (clusters.mean_D, clusters.embeddings_MD, clusters.duals_M)
    )

    def assign(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine_NM = normalised_on_device(features_ND, mean_D) @ embeddings_MD.T
        ids_N = (cosine_NM / clusters.eps + duals_M).argmax(dim=1)
        cosine_N = cosine_NM.gather(1, ids_N[:, None])[:, 0]
        if not cosine_N.isfinite().all():
            raise DataError("A feature to be labelled is not finite: is this the right encoder?")
        return ids_N.cpu().numpy(), cosine_N.cpu().numpy()

    return assign


class Labels:
    """The labels of all blocks, taken in the order of the images.

    Args:
        write: appends ids to ids.npy.
        scratch: an empty file for the cosines.
    """

    def __init__(
        self, write: Callable[[np.ndarray], object], scratch: IO[bytes], features: FeatureSet, num_clusters: int
    ) -> None:
        self._write, self._scratch = write, scratch
        self._features = features
        self._block = 0
        self._sizes_M = np.zeros(num_clusters, dtype=np.int64)
        self._sums_M = np.zeros(num_clusters)
        self._histogram_MB = np.zeros((num_clusters, _BINS), dtype=np.int64)

    @classmethod
    @contextmanager
    def written(cls, folder: Path, features: FeatureSet, num_clusters: int) -> "Iterator[Labels]":
        """Labels whose ids are in `folder` when the block ends, and whose scratch file is gone then."""
        with TemporaryFile(dir=folder) as scratch, ids_writer(folder, features.count) as write:
            yield cls(write, scratch, features, num_clusters)

    def take(self, result: Tensor) -> None:
        """Take the result of the next block."""
        rows = len(self._features.block_ids(self._block))
        ids_N, bits_N = result[:, :rows].numpy()
        cosine_N = bits_N.view(np.float32)
        self._block += 1
        self._write(ids_N)
        self._scratch.write(np.stack([ids_N, bits_N], axis=1).tobytes())
        self._sizes_M += np.bincount(ids_N, minlength=len(self._sizes_M))
        np.add.at(self._sums_M, ids_N, cosine_N.astype(np.float64))  # one by one: the same bits whatever the blocks
        np.add.at(self._histogram_MB.reshape(-1), ids_N * np.int64(_BINS) + _bin_of(cosine_N), 1)

    def measured(self, clusters: Clusters) -> Clusters:
        """The clusters with the sizes and cosines of all images."""
        cosine_M = self._sums_M / np.maximum(self._sizes_M, 1)
        low_M = self._low_cosines()
        return replace(clusters, sizes_M=self._sizes_M, cosine_M=cosine_M.astype(np.float32), low_cosine_M=low_M)

    def _low_cosines(self) -> np.ndarray:
        """The cosine below which the least typical images of each cluster are, float32 [M].

        With Weibull's quantile, a new image of the cluster is below it with probability `LOW`, even in small clusters.
        The lowest images of a cluster determine it; the histogram tells which cosines may be among them.
        """
        needed_M = np.minimum(np.ceil(LOW * (self._sizes_M + 1)) + 1 + self._sizes_M // 2**20, self._sizes_M)
        highest_M = (self._histogram_MB.cumsum(axis=1) < needed_M[:, None]).sum(axis=1)  # bin of the last one needed
        found = [low for rows in self._pairs() if len(low := rows[_bin_of(_cosines(rows)) <= highest_M[rows[:, 0]]])]
        pairs = np.concatenate(found)
        pairs = pairs[np.argsort(pairs[:, 0])]
        of_cluster = np.split(_cosines(pairs), np.searchsorted(pairs[:, 0], np.arange(1, len(needed_M))))
        return np.array(
            [_low(part, size) for part, size in zip(of_cluster, self._sizes_M.tolist(), strict=True)], np.float32
        )

    def _pairs(self) -> Iterator[np.ndarray]:
        """The ids and the bits of the cosines, int32 [N, 2], from the scratch file."""
        self._scratch.seek(0)
        for _ in range(0, self._features.count, _ROWS):
            yield np.frombuffer(self._scratch.read(8 * _ROWS), dtype=np.int32).reshape(-1, 2)


def _cosines(pairs_N2: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs_N2[:, 1]).view(np.float32)


def _bin_of(cosine_N: np.ndarray) -> np.ndarray:
    return ((cosine_N + 1) * (_BINS / 2)).astype(np.int64).clip(0, _BINS - 1)


def _low(lowest: np.ndarray, size: int) -> float:
    """The quantile of `size` cosines from the `lowest` of them."""
    if not size:
        return 1.0
    cosines = np.full(size, _NOT_LOW, dtype=np.float32)
    cosines[: len(lowest)] = lowest
    return float(np.quantile(cosines, LOW, method="weibull"))
