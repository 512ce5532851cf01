"""Selects the route for a task: its images vote through their clusters (docs/method.md, "Deployment").

The vote also measures how typical the images are of pre-training.

Axes: N images, M clusters, L expert layers.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.data.clusters import LOW, Clusters
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.features import encode_in_order
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.models.vit import Encoder
from moce_ds.selection.run_clusters import clusters_encoder, run_clusters

# Measured on the demo (docs/select.md): 2-8% for held-out images of the clustered domains, 57-100% for images of a
# domain without clusters.
UNUSUAL = 0.15
UNLIKE = 0.5

_CACHE_SIZE = 4
_labelled: dict[tuple[str, str, str, str], tuple[NDArray[np.int64], NDArray[np.float32]]] = {}


@dataclass(frozen=True)
class Selection:
    """The vote of a task's images.

    Attributes:
        route: experts of the winning route, one per expert layer.
        share: the winner's share of the votes, as a measure of confidence.
        routes: all routes with votes and their shares, in decreasing order.
        clusters: share of the images in each non-empty cluster, in decreasing order.
        n_images: images that voted.
        typicality: similarity to the images of pre-training; None if only clusters were counted.
    """

    route: tuple[int, ...]
    share: float
    routes: list[tuple[tuple[int, ...], float]]
    clusters: dict[int, float]
    n_images: int
    typicality: "Typicality | None" = None

    def record(self, task: str) -> dict[str, Any]:
        """Plain data for results.json."""
        return {
            "verb": "select",
            "task": task,
            "route": list(self.route),
            "share": self.share,
            "routes": [{"route": list(route), "share": share} for route, share in self.routes],
            "clusters": {str(cluster): share for cluster, share in self.clusters.items()},
            "n_images": self.n_images,
            "typicality": self.typicality and self.typicality.record(),
        }


@dataclass(frozen=True)
class Typicality:
    """How typical a task's images are of pre-training: their cosines to the centroids of their clusters, compared with
    those of training images.

    Attributes:
        low_share: share of the images that are farther from their centroid than 95% of its training images; 0.05 is
            expected for images like those. None if the clusters do not record the threshold.
        cosine: mean over the images.
        training_cosine: mean of the training images in the same clusters.
    """

    low_share: float | None
    cosine: float
    training_cosine: float

    @classmethod
    def of(cls, ids_N: NDArray[np.int64], cosine_N: NDArray[np.float32], clusters: Clusters) -> "Typicality":
        """Compute it from the cluster of every image and its cosine to the centroid."""
        low_M = clusters.low_cosine_M
        low_share = None if low_M is None else float((cosine_N < low_M[ids_N]).mean())
        return cls(low_share, float(cosine_N.mean()), float(clusters.cosine_M[ids_N].mean()))

    @property
    def verdict(self) -> str:
        """The verdict as text; "unknown" if there is nothing to compare with."""
        if self.low_share is None:
            return "unknown"
        if self.low_share < UNUSUAL:
            return "typical"
        return "unusual" if self.low_share < UNLIKE else "unlike anything in the pre-training set"

    @property
    def summary(self) -> str:
        """A sentence for the terminal."""
        cosines = f"mean cosine {self.cosine:.3f}, of training images in the same clusters {self.training_cosine:.3f}"
        if self.low_share is None:
            return f"How typical: unknown, the run's clusters are of an earlier version ({cosines})."
        return (
            f"How typical: {self.verdict}. {self.low_share:.1%} of the images are farther from their cluster than "
            f"{1 - LOW:.0%} of its training images; {LOW:.0%} are expected ({cosines})."
        )

    def record(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return {"verdict": self.verdict, **asdict(self)}


def select_route(run: Path, task: ShardSet, config: EncodeSettings, device: torch.device) -> Selection:
    """Label a task's images with the run's clusters and count the votes. Raises ArtefactError, DataError."""
    checkpoint, clusters = run_clusters(run)
    ids_N, cosine_N = label_images(checkpoint, clusters, task, config, device)
    expert_ML = recorded_routes(checkpoint)
    return replace(count_votes(ids_N, expert_ML), typicality=Typicality.of(ids_N, cosine_N, clusters))


def label_images(
    checkpoint: Checkpoint, clusters: Clusters, images: ShardSet, config: EncodeSettings, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cluster of every image, and its cosine to the centroid: 12 bytes of memory an image.

    Keeps the last few results by encoder, clusters and images, because the runs of a campaign share them.

    Raises:
        ArtefactError: the encoder of the clusters is missing, damaged or another one.
        DataError: an image is damaged.
    """
    encoder = clusters_encoder(checkpoint, clusters, device)
    key = (encoder.fingerprint, str(encoder.input), clusters.hash, images.fingerprint)
    if key not in _labelled:
        while len(_labelled) >= _CACHE_SIZE:
            _labelled.pop(next(iter(_labelled)))
        _labelled[key] = _label(encoder, clusters, images, config, device)
    return _labelled[key]


def _label(
    encoder: Encoder, clusters: Clusters, images: ShardSet, config: EncodeSettings, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels every batch as it is encoded, so the features of a batch are all that is in memory."""
    ids_N, cosine_N, first = np.empty(images.count, np.int64), np.empty(images.count, np.float32), 0
    for features_ND in encode_in_order(encoder, images, config, device):
        # Features of the pre-training set are stored as float16, so those of the task are rounded in the same way.
        of_batch = clusters.assign_with_cosine(features_ND.half().float().numpy())
        last = first + len(features_ND)
        ids_N[first:last], cosine_N[first:last] = of_batch
        first = last
    return ids_N, cosine_N


def recorded_routes(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """The first expert of every cluster in every expert layer, [M, L], as the checkpoint records it."""
    return checkpoint.routes.expert_ML


def count_votes(ids_N: NDArray[np.int64], expert_ML: NDArray[np.int64]) -> Selection:
    """Histogram over clusters, and votes per route (several clusters may share one).

    Args:
        ids_N: cluster of each of the task's images; at least one.
        expert_ML: route of each cluster.
    """
    count_M = np.bincount(ids_N, minlength=len(expert_ML))
    order = [int(c) for c in np.argsort(-count_M, kind="stable") if count_M[c]]
    votes: dict[tuple[int, ...], int] = {}
    for cluster in order:
        route = tuple(int(e) for e in expert_ML[cluster])
        votes[route] = votes.get(route, 0) + int(count_M[cluster])
    n = len(ids_N)
    routes = [(route, count / n) for route, count in sorted(votes.items(), key=lambda item: (-item[1], item[0]))]
    return Selection(routes[0][0], routes[0][1], routes, {c: float(count_M[c] / n) for c in order}, n)
