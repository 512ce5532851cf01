"""From features to clusters: centre, k-means, balance, label every image, write the artefact.

Axes: N images of the fit or of a block, M clusters, D feature width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from moce_ds.clustering.clusters import LOW, Clusters, load_ids, normalised, save_ids
from moce_ds.clustering.feature_store import ENCODER, FeatureSet, check_encoder
from moce_ds.clustering.kmeans import kmeans
from moce_ds.clustering.quality import ClusterReport, cluster_report
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.clustering.sinkhorn import Solution, balance
from moce_ds.config.settings import differences, to_tree
from moce_ds.console import say
from moce_ds.errors import ArtefactError, ConfigError, DataError
from moce_ds.storage.files import atomic_folder, check_writable, copy_tree, writes_to

_ROWS = 8192
"""Rows of features whose [N, M] cosines exist at one time."""

_MERGED = 0.99
"""Cosine beyond which two centroids count as one; chosen by eye, it only warns."""


def build_clusters(
    features: Path,
    out: Path,
    config: ClusterSettings,
    labels_N: np.ndarray | None = None,
    classes: Sequence[str] = (),
    device: str = "cpu",
) -> tuple[Clusters, ClusterReport]:
    """Cluster the images of a features folder; clusters that are there already are read instead.

    Args:
        features: what `moce features` wrote, with its encoder.
        out: the clusters folder; written as a whole or not at all.
        labels_N: for the report only: index into `classes` per image, negative without a label.
        device: where Sinkhorn runs; faiss finds GPUs by itself.

    Raises:
        ConfigError: more clusters than images, or faiss is missing.
        DataError: the features are all alike.
        ArtefactError: the features are unfinished, damaged or another encoder's; or `out` holds something else, or
            cannot be written.
    """
    feature_set = FeatureSet.open(features)
    check_encoder(features, feature_set.identity.encoder_fingerprint, feature_set.files)
    if config.num_clusters > feature_set.count:
        raise ConfigError(
            f"num_clusters={config.num_clusters} is more than the {feature_set.count} images of {features}: "
            f"set it to {feature_set.count} or less, far less for clusters that mean something."
        )
    made_from = {
        "settings": to_tree(config),
        "features": {"count": feature_set.count, "dim": feature_set.dim, **vars(feature_set.identity)},
    }
    if out.exists():
        _check_same(out, made_from)
        say(f"{out} is finished, with the same settings and features: left as it is.", err=True)
    else:
        check_writable(out)
        _write(feature_set, out, config, made_from, device)
    clusters = Clusters.open(out)
    ids_N = load_ids(out, clusters.shards_fingerprint, feature_set.count)
    # An image's cosine is stood in for by its cluster's mean, which leaves the mean over images as it is.
    return clusters, cluster_report(ids_N, clusters.num_clusters, clusters.cosine_M[ids_N], labels_N, classes)


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
    """Mean feature, float32 [D]. Raises DataError where no feature differs from it."""
    sum_D, squares = np.zeros(feature_set.dim), 0.0
    for features_ND in _progress(feature_set, "mean"):
        sum_D += features_ND.sum(axis=0, dtype=np.float64)
        squares += float(np.square(features_ND, dtype=np.float64).sum())
    mean_D = sum_D / feature_set.count
    if squares / feature_set.count - mean_D @ mean_D <= 1e-10 * (mean_D @ mean_D):
        raise DataError(f"All features in {feature_set.path} are alike: the encoder tells no image from another.")
    return mean_D.astype(np.float32)


def _fit(
    feature_set: FeatureSet, mean_D: np.ndarray, config: ClusterSettings, device: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any] | None]:
    """Embeddings [M, D], duals [M] and how the solver ended, None for plain k-means."""
    fit_ND = normalised(_sample(feature_set, config), mean_D)
    with tqdm(total=config.kmeans_iterations, desc="k-means", delay=2) as bar:
        centroids_MD = kmeans(fit_ND, config.num_clusters, config.seed, config.kmeans_iterations, watch=bar.update)
    if config.method == "kmeans":
        return centroids_MD, np.zeros(config.num_clusters, dtype=np.float32), None
    points_ND = torch.from_numpy(fit_ND).to(device)
    with tqdm(desc="balance", unit=" passes", delay=2) as bar:

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
    # As k-means leaves them, close clusters are how the features are; re-estimation is what draws clusters together.
    _warn(solution, merged if config.rounds else 0, config)
    ended = {
        "fit_images": len(fit_ND),
        "iterations": solution.iterations,
        "marginal_error": solution.marginal_error,
        "converged": solution.converged,
        "merged_clusters": merged,
    }
    return embeddings_MD.cpu().numpy(), solution.duals_M.cpu().numpy().astype(np.float32), ended


def _sample(feature_set: FeatureSet, config: ClusterSettings) -> np.ndarray:
    """Features to fit on: all, or those of images drawn by the seed."""
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
    """What the least typical images of each cluster do not reach, float32 [M].

    Weibull's quantile is the one that a further image of the cluster stays below with that probability, small
    clusters included.
    """
    of_cluster = np.split(cosine_N[np.argsort(ids_N, kind="stable")], np.cumsum(sizes_M)[:-1])
    lows = [np.quantile(part, LOW, method="weibull") if len(part) else 1.0 for part in of_cluster]
    return np.array(lows, dtype=np.float32)


def _check_same(out: Path, made_from: dict[str, Any]) -> None:
    """Refuse to take `out` for clusters that it does not hold."""
    if not Clusters.recognises(out):
        raise ArtefactError(f"{out} exists and holds no clusters: give another folder.")
    recorded = Clusters.open(out).provenance
    different = differences({key: recorded.get(key, {}) for key in made_from}, made_from)
    if different:
        lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
        raise ArtefactError(f"{out} holds clusters made differently; give another folder or delete it:{lines}")


def _merged(embeddings_MD: torch.Tensor) -> int:
    """How many clusters have another one at almost the same place."""
    cosine_MM = (embeddings_MD @ embeddings_MD.T).fill_diagonal_(-1)
    return int((cosine_MM.max(dim=1).values > _MERGED).sum())


def _warn(solution: Solution, merged: int, config: ClusterSettings) -> None:
    """Say loudly what makes hard sizes unbalanced however good the settings look."""
    faults = []
    if not solution.converged:
        faults.append(
            f"balanced assignment did NOT converge: after max_iterations={config.max_iterations} a soft cluster size "
            f"is off by {100 * solution.marginal_error:.1f}%, tolerance {100 * config.tolerance:.1f}%. "
            "Raise max_iterations or eps."
        )
    if merged:
        # Soft sizes stay balanced when Q spreads one group over several clusters, and re-estimating C from that Q
        # draws them together; which of them an image then goes to is decided by next to nothing.
        faults.append(
            f"{merged} of {config.num_clusters} clusters have another one at almost the same place "
            f"(cosine above {_MERGED}): how images divide between them is arbitrary. Lower eps, rounds or num_clusters."
        )
    for fault in faults:
        say(f"WARNING: {fault} Look at the hard sizes.", err=True)


def _progress(feature_set: FeatureSet, what: str) -> Iterator[np.ndarray]:
    """The blocks of a pass over all features, behind a bar when it takes long."""
    with tqdm(total=feature_set.count, desc=what, unit=" images", unit_scale=True, delay=2) as bar:
        for block_ND in feature_set.blocks():
            yield block_ND
            bar.update(len(block_ND))
