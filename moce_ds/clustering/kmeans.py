"""Spherical k-means: with faiss for points in memory, and in exact sums for points that pass in blocks.

This is the only module that imports faiss, and it does so only when k-means is called.

Axes: N points (of one block), M clusters, D feature width.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from moce_ds.clustering.balanced_assignment import Blocks
from moce_ds.common.errors import ConfigError, DataError
from moce_ds.distributed.in_order import sum_exactly
from moce_ds.distributed.runtime import Runtime

_FINENESS = 2.0**30
"""Steps per unit in which the sums of a block are rounded. Sums of 2^32 points of norm 1 fit into 63 bits."""

_FINITE_ROWS = 65536


def kmeans(
    features_ND: np.ndarray,
    num_clusters: int,
    seed: int,
    iterations: int,
    watch: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Centroids that maximise the cosine of each point to its centroid; on all GPUs that faiss finds, else on the CPU.

    Args:
        features_ND: L2-normalised, float32 (faiss's `spherical` normalises centroids only, never the data). All are
            used: faiss's own limit of 256 points per centroid, applied silently, is lifted.
        watch: called after each iteration.

    Returns:
        float32 [M, D], rows of norm 1. The same seed gives bit-identical results on the CPU.

    Raises:
        DataError: fewer points than clusters, or features that are not finite.
        ConfigError: faiss is not installed.
    """
    last_MD = np.empty(0)
    for centroids_MD in kmeans_steps(features_ND, num_clusters, seed, iterations):
        last_MD = centroids_MD
        watch()
    return unit_centroids(last_MD)


def kmeans_steps(features_ND: np.ndarray, num_clusters: int, seed: int, iterations: int) -> Iterator[np.ndarray]:
    """The centroids of faiss, float32 [M, D], after each iteration. Arguments and errors as `kmeans`."""
    count, dim = features_ND.shape
    if count < num_clusters:
        raise DataError(f"{count} images cannot form {num_clusters} clusters: set num_clusters to {count} or less.")
    _check_finite(features_ND)
    faiss = _import_faiss()
    solver = faiss.Kmeans(
        dim,
        num_clusters,
        niter=1,
        seed=seed,
        spherical=True,
        gpu=hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=count,
    )
    points_ND = np.ascontiguousarray(features_ND, dtype=np.float32)
    centroids_MD = None
    for _ in range(iterations):  # one at a time, because faiss reports no progress itself
        solver.train(points_ND, init_centroids=centroids_MD)
        centroids_MD = solver.centroids
        yield centroids_MD


def unit_centroids(centroids_MD: np.ndarray) -> np.ndarray:
    """Centroids divided by their norms, float32 [M, D]. Raises DataError if one is at the origin."""
    norms_M1 = np.linalg.norm(centroids_MD, axis=1, keepdims=True)
    if not norms_M1.all():
        raise DataError(
            f"k-means found a centroid at the origin: do the images have {len(centroids_MD)} different features?"
        )
    return np.asarray(centroids_MD / norms_M1, dtype=np.float32)


def streamed_step(blocks: Blocks, centroids_MD: Tensor, runtime: Runtime) -> Tensor:
    """One iteration of spherical k-means over the points of all processes; a collective.

    The sums are exact integers, so the result does not depend on the number of processes.

    Args:
        blocks: this process's points, L2-normalised float32 blocks on the device of `centroids_MD`.
        centroids_MD: float32, rows of norm 1.

    Returns:
        The normalised sum of the points of each centroid, as `centroids_MD`. A centroid without points, or whose points
        cancel, stays.

    Raises:
        DataError: a feature is not finite. Every process raises it.
    """
    sums_MD = torch.zeros_like(centroids_MD, dtype=torch.int64)
    with runtime.raise_on_all_ranks():
        for points_ND in blocks():
            sums_MD += (_block_sums(points_ND, centroids_MD).double() * _FINENESS).round_().long()
    total_MD = sum_exactly(sums_MD, runtime).double().to(centroids_MD.device)
    norms_M1 = total_MD.norm(dim=1, keepdim=True)
    return torch.where(norms_M1 > 0, total_MD / norms_M1, centroids_MD.double()).to(centroids_MD)


def _block_sums(points_ND: Tensor, centroids_MD: Tensor) -> Tensor:
    """The sum of the points that are nearest to each centroid, float32 [M, D]."""
    nearest_N = (points_ND @ centroids_MD.T).argmax(dim=1)
    if points_ND.device.type == "cpu":
        sums_MD = torch.zeros_like(centroids_MD).index_add_(0, nearest_N, points_ND)
    else:  # index_add_ on a GPU adds in any order
        sums_MD = torch.nn.functional.one_hot(nearest_N, len(centroids_MD)).to(points_ND).T @ points_ND
    if not sums_MD.isfinite().all():
        raise DataError("A feature is not finite: did the training of the encoder diverge?")
    return sums_MD


def _check_finite(features_ND: np.ndarray) -> None:
    for first in range(0, len(features_ND), _FINITE_ROWS):
        finite_N = np.isfinite(features_ND[first : first + _FINITE_ROWS]).all(axis=1)
        if not finite_N.all():
            image = first + int(np.argmin(finite_N))
            raise DataError(f"Feature {image} is not finite: did the training of the encoder diverge?")


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"Clustering needs faiss, which does not import here ({error}). Install one of the extras: "
            "pip install 'moce-ds[cpu]', 'moce-ds[cu13]' or 'moce-ds[cu12]'."
        ) from None
    return faiss
