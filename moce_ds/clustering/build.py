"""From features to clusters: centre, k-means, balance, label every image, write the artefact.

This is the only module that imports faiss, and it does so only when k-means is called.

Axes: N images of the fit or of a block, M clusters, D feature width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from moce_ds.clustering.quality import ClusterReport, cluster_report
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.clustering.sinkhorn import Solution, balance
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError, ConfigError, DataError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.files import atomic_folder, check_writable, copy_tree, writes_to
from moce_ds.data.clusters import LOW, Clusters, load_ids, normalised, save_ids
from moce_ds.data.feature_store import ENCODER, FeatureSet, check_encoder

_logger = logging.getLogger(__name__)

_ROWS = 8192
"""Rows of features whose [N, M] cosines are in memory at a time."""

_MERGED = 0.99
"""Cosine above which two centroids count as one; chosen by eye, used only for a warning."""


def build_clusters(
    features: Path,
    out: Path,
    config: ClusterSettings,
    labels_N: np.ndarray | None = None,
    classes: Sequence[str] = (),
    device: str = "cpu",
) -> tuple[Clusters, ClusterReport]:
    """Cluster the images of a features folder; existing clusters are read instead.

    Args:
        features: the folder that `moce features` wrote, with its encoder.
        out: the clusters folder, written atomically.
        labels_N: only for the report: index into `classes` per image, negative without a label.
        device: device of Sinkhorn; faiss detects GPUs itself.

    Raises:
        ConfigError: more clusters than images, or faiss is missing.
        DataError: the features are all alike.
        ArtefactError: the features are unfinished, damaged or of another encoder; or `out` holds other files, or
            cannot be written.
    """
    feature_set = FeatureSet.open(features)
    check_encoder(features, feature_set.identity.encoder_fingerprint, feature_set.files)
    if config.num_clusters > feature_set.count:
        raise ConfigError(
            f"num_clusters={config.num_clusters} is more than the {feature_set.count} images of {features}: "
            f"set it to {feature_set.count} or less, and much less for meaningful clusters."
        )
    made_from = _made_from(feature_set, config)
    if out.exists():
        _check_same(out, made_from)
        _logger.info(f"{out} is complete, with the same settings and features: nothing to do.")
    else:
        check_writable(out)
        _write(feature_set, out, config, made_from.parts, device)
    clusters = Clusters.open(out)
    ids_N = load_ids(out, clusters.shards_fingerprint, feature_set.count)
    # The mean cosine of its cluster replaces an image's own cosine; the mean over images is the same.
    return clusters, cluster_report(ids_N, clusters.num_clusters, clusters.cosine_M[ids_N], labels_N, classes)


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
        max_points_per_centroid=count,
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


def _made_from(feature_set: FeatureSet, config: ClusterSettings) -> MadeFrom:
    features = {"count": feature_set.count, "dim": feature_set.dim, **vars(feature_set.identity)}
    return MadeFrom({"settings": to_tree(config), "features": features}, {"settings": ClusterSettings})


def _write(feature_set: FeatureSet, out: Path, config: ClusterSettings, made_from: dict[str, Any], device: str) -> None:
    mean_D = _mean(feature_set)
    embeddings_MD, duals_M, solver = _fit(feature_set, mean_D, config, device)
    unlabelled = Clusters(
        embeddings_MD=embeddings_MD,
        duals_M=duals_M,
        mean_D=mean_D,
        sizes_M=np.zeros(config.num_clusters, dtype=np.int64),
        cosine_M=np.zeros(config.num_clusters, dtype=np.float32),
        eps=config.eps,
        method=config.method,
        provenance=made_from | {"solver": solver},
        shards_fingerprint=feature_set.identity.shards_fingerprint,
        encoder_fingerprint=feature_set.identity.encoder_fingerprint,
        encoder_input=feature_set.identity.encoder_input,
    )
    clusters, ids_N = _label(feature_set, unlabelled)
    with writes_to(out), atomic_folder(out) as folder:
        copy_tree(feature_set.path / ENCODER, folder / ENCODER)
        save_ids(folder, ids_N)
        clusters.write(folder)


def _mean(feature_set: FeatureSet) -> np.ndarray:
    """Mean feature, float32 [D]. Raises DataError if no feature differs from it."""
    sum_D, squares = np.zeros(feature_set.dim), 0.0
    for features_ND in _progress(feature_set, "mean"):
        sum_D += features_ND.sum(axis=0, dtype=np.float64)
        squares += float(np.square(features_ND, dtype=np.float64).sum())
    mean_D = sum_D / feature_set.count
    if squares / feature_set.count - mean_D @ mean_D <= 1e-10 * (mean_D @ mean_D):
        raise DataError(f"All features in {feature_set.path} are alike: the encoder does not distinguish images.")
    return mean_D.astype(np.float32)


def _fit(
    feature_set: FeatureSet, mean_D: np.ndarray, config: ClusterSettings, device: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any] | None]:
    """Embeddings [M, D], duals [M] and the final state of the solver (None for plain k-means)."""
    fit_ND = normalised(_sample(feature_set, config), mean_D)
    with progress_bar(total=config.kmeans_iterations, desc="k-means", delay=2) as bar:
        centroids_MD = kmeans(fit_ND, config.num_clusters, config.seed, config.kmeans_iterations, watch=bar.update)
    if config.method == "kmeans":
        return centroids_MD, np.zeros(config.num_clusters, dtype=np.float32), None
    points_ND = torch.from_numpy(fit_ND).to(device)
    with progress_bar(desc="balance", unit=" passes", delay=2) as bar:

        def watch(marginal_error: float) -> None:
            bar.set_postfix_str(f"marginal error {marginal_error:.2g} -> {config.tolerance:g}", refresh=False)
            bar.update()

        embeddings_MD, solution = balance(
            lambda: points_ND.split(_ROWS),
            torch.from_numpy(centroids_MD).to(device),
            config.eps,
            config.tolerance,
            config.max_iterations,
            config.rounds,
            watch=watch,
        )
    merged = _merged(embeddings_MD)
    # After k-means, close clusters reflect the features; only re-estimation moves clusters together.
    _warn(solution, merged if config.rounds else 0, config)
    final_state = {
        "fit_images": len(fit_ND),
        "iterations": solution.iterations,
        "marginal_error": solution.marginal_error,
        "converged": solution.converged,
        "merged_clusters": merged,
    }
    return embeddings_MD.cpu().numpy(), solution.duals_M.cpu().numpy().astype(np.float32), final_state


def _sample(feature_set: FeatureSet, config: ClusterSettings) -> np.ndarray:
    """Features to fit on: all, or those of a random sample of images."""
    size = config.num_clusters * (config.fit_images_per_cluster or feature_set.count)
    if size >= feature_set.count:
        return feature_set.all()
    ids = np.random.default_rng(config.seed).choice(feature_set.count, size, replace=False)
    return feature_set.rows(np.sort(ids))


def _label(feature_set: FeatureSet, clusters: Clusters) -> tuple[Clusters, np.ndarray]:
    """The clusters with their sizes and cosines, and the int64 id of every image, in one pass."""
    labelled = [clusters.assign_with_cosine(block) for block in _progress(feature_set, "label")]
    ids_N, cosine_N = (np.concatenate(parts) for parts in zip(*labelled, strict=True))
    sizes_M = np.bincount(ids_N, minlength=clusters.num_clusters)
    cosine_M = np.bincount(ids_N, weights=cosine_N, minlength=clusters.num_clusters) / np.maximum(sizes_M, 1)
    low_M = _low_cosines(ids_N, cosine_N, sizes_M)
    return replace(clusters, sizes_M=sizes_M, cosine_M=cosine_M.astype(np.float32), low_cosine_M=low_M), ids_N


def _low_cosines(ids_N: np.ndarray, cosine_N: np.ndarray, sizes_M: np.ndarray) -> np.ndarray:
    """The cosine below which the least typical images of each cluster are, float32 [M].

    With Weibull's quantile, a new image of the cluster is below it with probability `LOW`, even in small clusters.
    """
    of_cluster = np.split(cosine_N[np.argsort(ids_N, kind="stable")], np.cumsum(sizes_M)[:-1])
    lows = [np.quantile(part, LOW, method="weibull") if len(part) else 1.0 for part in of_cluster]
    return np.array(lows, dtype=np.float32)


def _check_same(out: Path, made_from: MadeFrom) -> None:
    """Raise ArtefactError unless `out` holds the requested clusters."""
    if not Clusters.recognises(out):
        raise ArtefactError(f"{out} exists and does not hold clusters: choose another folder.")
    made_from.compare(Clusters.open(out).provenance).refuse_different(f"{out} holds clusters")


def _merged(embeddings_MD: torch.Tensor) -> int:
    """Number of clusters that almost coincide with another one."""
    cosine_MM = (embeddings_MD @ embeddings_MD.T).fill_diagonal_(-1)
    return int((cosine_MM.max(dim=1).values > _MERGED).sum())


def _warn(solution: Solution, merged: int, config: ClusterSettings) -> None:
    """Warn about causes of unbalanced hard sizes."""
    faults = []
    if not solution.converged:
        faults.append(
            f"balanced assignment did NOT converge: after max_iterations={config.max_iterations} a soft cluster size "
            f"is off by {100 * solution.marginal_error:.1f}%, tolerance {100 * config.tolerance:.1f}%. "
            "Raise max_iterations or eps."
        )
    if merged:
        # Soft sizes stay balanced if Q spreads one group over several clusters, and re-estimating C from that Q moves
        # them together. The assignment of an image to one of them is then arbitrary.
        faults.append(
            f"{merged} of {config.num_clusters} clusters almost coincide with another one "
            f"(cosine above {_MERGED}): how images divide between them is arbitrary. Lower eps, rounds or num_clusters."
        )
    for fault in faults:
        _logger.warning(f"{fault} Look at the hard sizes.")


def _progress(feature_set: FeatureSet, what: str) -> Iterator[np.ndarray]:
    """The blocks of a pass over all features, with a progress bar if it takes long."""
    with progress_bar(total=feature_set.count, desc=what, unit=" images", unit_scale=True, delay=2) as bar:
        for block_ND in feature_set.blocks():
            yield block_ND
            bar.update(len(block_ND))


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"Clustering needs faiss, which does not import here ({error}). Install one of the extras: "
            "pip install 'moce-ds[cpu]', 'moce-ds[cu13]' or 'moce-ds[cu12]'."
        ) from None
    return faiss
