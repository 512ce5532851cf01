"""k-means on the unit sphere with faiss. The only file that imports faiss, and only when it is called.

Axes: N points, M clusters, D feature width.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np

from moce_ds.errors import ConfigError, DataError


def kmeans(
    features_ND: np.ndarray,
    num_clusters: int,
    seed: int,
    iterations: int,
    max_points_per_centroid: int | None = None,
    watch: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Centroids that maximise the cosine of each point to its centroid; on all GPUs that faiss finds, else on the CPU.

    Args:
        features_ND: L2-normalised, float32 (faiss's `spherical` normalises centroids only, never the data).
        max_points_per_centroid: use a random sample of the points beyond this; None: all points. (faiss's own default
            is 256, applied silently.)
        watch: called after each iteration.

    Returns:
        float32 [M, D], rows of norm 1. The same seed gives bit-identical results on the CPU.

    Raises:
        DataError: fewer points than clusters, or features that are not finite.
        ConfigError: faiss is not installed.
    """
    count, dim = features_ND.shape
    if count < num_clusters:
        raise DataError(f"{count} images cannot form {num_clusters} clusters: set num_clusters to {count} or less.")
    if not np.isfinite(features_ND).all():
        first = int(np.argmin(np.isfinite(features_ND).all(axis=1)))
        raise DataError(f"Feature {first} is not finite: did the training of the encoder diverge?")
    faiss = _import_faiss()
    solver = faiss.Kmeans(
        dim,
        num_clusters,
        niter=1,
        seed=seed,
        spherical=True,
        gpu=hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=max_points_per_centroid or count,
    )
    points_ND = np.ascontiguousarray(features_ND, dtype=np.float32)
    centroids_MD = None
    for _ in range(iterations):  # one at a time, because faiss reports no progress itself
        solver.train(points_ND, init_centroids=centroids_MD)
        centroids_MD = solver.centroids
        watch()
    norms_M1 = np.linalg.norm(solver.centroids, axis=1, keepdims=True)
    if not norms_M1.all():
        raise DataError(
            f"k-means found a centroid at the origin: do the images have {num_clusters} different features?"
        )
    return np.asarray(solver.centroids / norms_M1, dtype=np.float32)


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"Clustering needs faiss, which does not import here ({error}). Install one of the extras: "
            "pip install 'moce-ds[cpu]', 'moce-ds[cu13]' or 'moce-ds[cu12]'."
        ) from None
    return faiss
