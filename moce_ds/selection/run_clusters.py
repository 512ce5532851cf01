"""The clusters that a run was trained with, and the encoder that assigns images to them."""

from pathlib import Path

import torch

from moce_ds.checkpoint.format import Checkpoint, find
from moce_ds.checkpoint.run_folder import CLUSTERS
from moce_ds.common.errors import ArtefactError
from moce_ds.data.clusters import Clusters
from moce_ds.data.kept_encoder import ENCODER, check_encoder
from moce_ds.models.vit import Encoder, load_encoder


def run_clusters(run: Path) -> tuple[Checkpoint, Clusters]:
    """The newest checkpoint of a run with experts, and the clusters that it was trained with.

    Raises:
        ArtefactError: the run is dense, or its clusters are not those of the checkpoint.
    """
    checkpoint = find(run)
    if not checkpoint.experts:
        raise ArtefactError(f"{run} is a dense run: it has no routes to select from.")
    if checkpoint.manifest.get("routing") is None:
        raise ArtefactError(f"{run} routes by token (model.arch=token_moe): no route serves a whole image.")
    clusters = Clusters.open(clusters_folder(checkpoint))
    if clusters.hash != checkpoint.manifest.get("clusters_hash"):
        raise ArtefactError(f"{clusters_folder(checkpoint)}: these are not the clusters that {run} was trained with.")
    return checkpoint, clusters


def clusters_folder(checkpoint: Checkpoint) -> Path:
    """The copy of the clusters in the checkpoint's run folder."""
    return checkpoint.folder.parent.parent / CLUSTERS


def clusters_encoder(checkpoint: Checkpoint, clusters: Clusters, device: torch.device) -> Encoder:
    """The encoder that labels a task's images with the run's clusters. Raises ArtefactError if it is another one."""
    folder = clusters_folder(checkpoint)
    check_encoder(folder, clusters.encoder_fingerprint, clusters.files)
    return load_encoder(folder / ENCODER, device)
