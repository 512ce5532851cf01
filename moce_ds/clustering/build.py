"""From features to clusters: centre, k-means, balance, label every image, write the artefact.

Any number of processes share the work. The clusters do not depend on it: sums are taken in the order of the images
(`distributed/in_order.py`), or are exact.

Axes: N images of the fit or of a block, M clusters, D feature width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moce_ds.clustering.balanced_assignment import Solution, balance
from moce_ds.clustering.kmeans import kmeans_steps, streamed_step, unit_centroids
from moce_ds.clustering.label import Labels, ignore, label_all
from moce_ds.clustering.points import KeptPoints, Points, StreamedPoints
from moce_ds.clustering.quality import ClusterReport, cluster_report
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError, ConfigError, DataError
from moce_ds.common.host.program import progress_bar, shared_bar
from moce_ds.common.storage.files import atomic_folder, check_writable, copy_tree, writes_to
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.kept_encoder import ENCODER, check_encoder
from moce_ds.distributed.in_order import broadcast, own_units, take_in_order
from moce_ds.distributed.runtime import Runtime

_logger = logging.getLogger(__name__)

_MOST_KEPT = 3 * 2**30
"""Bytes of the points to fit on that are kept in memory; more pass from the disk. A constant, because the clusters must
not depend on the machine."""

_START = 200
"""Images per cluster of the sample from which a fit on streamed points starts."""

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
    """Cluster the images of a features folder in this process, and measure the result: `write_clusters`,
    `measured_clusters`."""
    write_clusters(features, out, config, Runtime.alone(torch.device(device)))
    return measured_clusters(out, labels_N, classes)


def write_clusters(features: Path, out: Path, config: ClusterSettings, runtime: Runtime) -> None:
    """Cluster the images of a features folder; existing clusters are kept. A collective.

    The processes share the work. The clusters do not depend on their number.

    Args:
        features: the folder that `moce features` wrote, with its encoder.
        out: the clusters folder, written atomically by rank 0.

    Raises:
        ConfigError: more clusters than images, or faiss is missing.
        DataError: the features are all alike.
        ArtefactError: the features are unfinished, damaged or of another encoder; or `out` holds other files, or
            cannot be written.
    """
    with runtime.raise_on_all_ranks():
        feature_set = FeatureSet.open(features)
        if runtime.is_main:
            check_encoder(features, feature_set.identity.encoder_fingerprint, feature_set.files)
    if config.num_clusters > feature_set.count:
        raise ConfigError(
            f"num_clusters={config.num_clusters} is more than the {feature_set.count} images of {features}: "
            f"set it to {feature_set.count} or less, and much less for meaningful clusters."
        )
    made_from, exists = _made_from(feature_set, config), False
    with runtime.raise_on_all_ranks():
        if runtime.is_main and (exists := out.exists()):
            _check_same(out, made_from)
        elif runtime.is_main:
            check_writable(out)
    if runtime.max([float(exists)])[0]:
        runtime.say(f"{out} is complete, with the same settings and features: nothing to do.")
    else:
        _write(feature_set, out, config, made_from.parts, runtime)


def measured_clusters(
    out: Path, labels_N: np.ndarray | None = None, classes: Sequence[str] = ()
) -> tuple[Clusters, ClusterReport]:
    """The clusters of a folder, and their quality.

    Args:
        labels_N: index into `classes` per image, negative without a label; for the agreement of the clusters with them.

    Raises:
        ArtefactError: the clusters are damaged.
    """
    clusters = Clusters.open(out)
    ids_N = load_ids(out, clusters.shards_fingerprint, int(clusters.sizes_M.sum()))
    return clusters, cluster_report(ids_N, clusters.num_clusters, clusters.cosine_M, labels_N, classes)


def _made_from(feature_set: FeatureSet, config: ClusterSettings) -> MadeFrom:
    features = {"count": feature_set.count, "dim": feature_set.dim, **vars(feature_set.identity)}
    return MadeFrom({"settings": to_tree(config), "features": features}, {"settings": ClusterSettings})


def _write(
    features: FeatureSet, out: Path, config: ClusterSettings, made_from: dict[str, Any], runtime: Runtime
) -> None:
    mean_D = _mean(features, runtime)
    embeddings_MD, duals_M, solver = _fit(features, mean_D, config, runtime)
    unlabelled = Clusters(
        embeddings_MD=embeddings_MD,
        duals_M=duals_M,
        mean_D=mean_D,
        sizes_M=np.zeros(config.num_clusters, dtype=np.int64),
        cosine_M=np.zeros(config.num_clusters, dtype=np.float32),
        eps=config.eps,
        method=config.method,
        provenance=made_from | {"solver": solver},
        shards_fingerprint=features.identity.shards_fingerprint,
        encoder_fingerprint=features.identity.encoder_fingerprint,
        encoder_input=features.identity.encoder_input,
    )
    labels, take, ids_file = None, ignore, ExitStack()
    with ExitStack() as draft:
        with runtime.raise_on_all_ranks():
            if runtime.is_main:
                draft.enter_context(writes_to(out))
                folder = draft.enter_context(atomic_folder(out))
                draft.enter_context(ids_file)
                labels = ids_file.enter_context(Labels.written(folder, features, config.num_clusters))
                take = writes_to(out)(labels.take)
        with _pass(features, "label", runtime) as watch:
            label_all(features, unlabelled, take, runtime, watch)
        with runtime.raise_on_all_ranks(), writes_to(out):
            if labels is not None:
                clusters = labels.measured(unlabelled)
                ids_file.close()
                copy_tree(features.path / ENCODER, folder / ENCODER)
                clusters.write(folder)
                draft.close()  # puts the folder in place


def _mean(features: FeatureSet, runtime: Runtime) -> np.ndarray:
    """Mean feature, float32 [D]. Verifies the checksums of all blocks. Raises DataError if all features are alike."""
    sum_D, squares = np.zeros(features.dim), 0.0

    def add(sums: Tensor) -> None:
        nonlocal squares
        sum_D[:] += sums[:-1].numpy()
        squares += float(sums[-1])

    with _pass(features, "mean", runtime) as watch:

        def sums() -> Iterator[Tensor]:
            """The sum of a block, and the sum of its squares."""
            for features_ND in features.blocks(own_units(features.num_blocks, runtime)):
                of_block_D = features_ND.sum(axis=0, dtype=np.float64)
                yield torch.from_numpy(np.append(of_block_D, np.square(features_ND, dtype=np.float64).sum()))
                watch(len(features_ND))

        like = torch.empty(features.dim + 1, dtype=torch.float64)
        take_in_order(sums(), features.num_blocks, like, add, runtime)
    features.note_verified()
    mean_D = sum_D / features.count
    if squares / features.count - mean_D @ mean_D <= 1e-10 * (mean_D @ mean_D):
        raise DataError(f"All features in {features.path} are alike: the encoder does not distinguish images.")
    return mean_D.astype(np.float32)


def _fit(
    features: FeatureSet, mean_D: np.ndarray, config: ClusterSettings, runtime: Runtime
) -> tuple[np.ndarray, np.ndarray, dict[str, Any] | None]:
    """Embeddings [M, D], duals [M] and the final state of the solver (None for plain k-means)."""
    size = min(features.count, config.num_clusters * (config.fit_images_per_cluster or features.count))
    most = max(config.num_clusters, _MOST_KEPT // (4 * features.dim))
    streamed = size > most
    start = min(_START * config.num_clusters, most) if streamed else size
    with runtime.raise_on_all_ranks():
        kept = KeptPoints(features, _sample(features.count, start, config.seed), mean_D, runtime)
    centroids_MD = _centroids(kept, config, runtime)
    points: Points = kept
    if streamed:
        chosen = None if size == features.count else _sample(features.count, size, config.seed)
        points = StreamedPoints(features, chosen, mean_D, runtime)
        centroids_MD = _streamed_centroids(points, centroids_MD, config, runtime)
    if config.method == "kmeans":
        return centroids_MD.cpu().numpy(), np.zeros(config.num_clusters, dtype=np.float32), None
    duals_M = _balance(kept, centroids_MD, config, 0, None, runtime)[1].duals_M if streamed else None
    embeddings_MD, solution = _balance(points, centroids_MD, config, config.rounds, duals_M, runtime)
    merged = _merged(embeddings_MD)
    if runtime.is_main:
        # After k-means, close clusters reflect the features; only re-estimation moves clusters together.
        _warn(solution, merged if config.rounds else 0, config)
    final_state = {
        "fit_images": points.count,
        "iterations": solution.iterations,
        "marginal_error": solution.marginal_error,
        "converged": solution.converged,
        "merged_clusters": merged,
    }
    return embeddings_MD.cpu().numpy(), solution.duals_M.cpu().numpy().astype(np.float32), final_state


def _sample(count: int, size: int, seed: int) -> np.ndarray:
    """Images to fit on, in increasing order: all, or a random sample."""
    if size >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def _centroids(points: KeptPoints, config: ClusterSettings, runtime: Runtime) -> Tensor:
    """Centroids [M, D] of k-means, on this process's device; rank 0 computes them."""
    steps: Iterator[np.ndarray] = iter(())
    if points.all_ND is not None:
        steps = kmeans_steps(points.all_ND, config.num_clusters, config.seed, config.kmeans_iterations)
    centroids_MD = np.empty((config.num_clusters, points.dim), dtype=np.float32)
    with progress_bar(total=config.kmeans_iterations, desc="k-means", delay=2, disable=not runtime.is_main) as bar:
        for _ in range(config.kmeans_iterations):  # one at a time, so that the others wait for one iteration at most
            with runtime.raise_on_all_ranks():
                centroids_MD = next(steps, centroids_MD)
            bar.update()
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            centroids_MD = unit_centroids(centroids_MD)
    return broadcast(torch.from_numpy(centroids_MD), runtime).to(runtime.device)


def _streamed_centroids(points: Points, centroids_MD: Tensor, config: ClusterSettings, runtime: Runtime) -> Tensor:
    """k-means over all points, from the centroids of the sample."""
    total = config.kmeans_iterations
    with progress_bar(total=total, desc="k-means, streamed", delay=2, disable=not runtime.is_main) as bar:
        for _ in range(config.kmeans_iterations):
            centroids_MD = streamed_step(points.blocks, centroids_MD, runtime)
            bar.update()
    return centroids_MD


def _balance(
    points: Points,
    centroids_MD: Tensor,
    config: ClusterSettings,
    rounds: int,
    duals_M: Tensor | None,
    runtime: Runtime,
) -> tuple[Tensor, Solution]:
    """`balanced_assignment.balance` over the points of all processes, with a progress bar."""

    def add_all(parts: Iterable[Tensor], total: Tensor) -> None:
        take_in_order(parts, points.units, total, lambda part: total.add_(part.to(total.device)), runtime)

    with progress_bar(desc="balance", unit=" passes", delay=2, disable=not runtime.is_main) as bar:

        def watch(marginal_error: float) -> None:
            bar.set_postfix_str(f"marginal error {marginal_error:.2g} -> {config.tolerance:g}", refresh=False)
            bar.update()

        return balance(
            points.blocks,
            centroids_MD,
            config.eps,
            config.tolerance,
            config.max_iterations,
            rounds,
            add_all,
            watch,
            duals_M,
        )


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


def _pass(features: FeatureSet, what: str, runtime: Runtime) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar of a pass over all blocks, which the processes share; its update."""
    own = sum(len(features.block_ids(k)) for k in own_units(features.num_blocks, runtime))
    return shared_bar(own, features.count, what, unit=" images", unit_scale=True)
