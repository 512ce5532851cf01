"""Reconstruction error of a run on held-out images: on the selected route, on each image's own route, and of a dense
twin.

`own` is the error with all experts, `selected` that of one deployed ViT. A random table
(experts.gate=random) shows the effect of capacity alone (docs/method.md, "Gates").

Axes: B images of a batch, N held-out images or patches, M clusters, L expert layers, K experts per image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint, find
from moce_ds.common.errors import ArtefactError
from moce_ds.common.text import shortened
from moce_ds.data.clusters import Clusters
from moce_ds.data.loader import Batch, Loader
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet
from moce_ds.data.task_images import opened_images
from moce_ds.data.transform import CenterCrop, ImageInput
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.evaluation.results_file import known_by, psnr_gain
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.mae import MaskedAutoencoder, Reconstruction, mask_noise
from moce_ds.models.moce import Moce, Routing
from moce_ds.models.parameters import load_weights_strict
from moce_ds.moe.expert_layer import ExpertLayer
from moce_ds.moe.gate import route_table
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import make_plan
from moce_ds.selection.vote import count_votes, label_images, recorded_routes

_NAME = 60  # characters shown of a task's name
_UNITS = (
    "The error is on hidden patches, each normalised to variance 1 (no unit): lower is better, and about 1 is what "
    "guessing a patch's mean gives. PSNR, of the same errors: higher is better."
)
_MASK_SEED = 20_230_207  # seed of the held-out masks, the same for all models compared


@dataclass(frozen=True)
class Reconstructions:
    """Mean squared errors on hidden patches, normalised per patch; `dense` is None without a twin.

    `known_by` distinguishes this record from records of other models and images.
    """

    selected: float
    own: float
    dense: float | None
    route: tuple[int, ...]
    n_images: int
    known_by: dict[str, str]

    def record(self, task: str, model: str) -> dict[str, Any]:
        """Plain data for results.json."""
        measured = {key: value for key, value in vars(self).items() if key != "known_by"} | {"route": list(self.route)}
        return {"verb": "evaluate", "task": task, "model": model, **measured, **self.known_by}

    def table(self, task: str) -> Table:
        """The errors for a terminal, relative to the dense twin or, without one, to the own routes."""
        title = f"{shortened(task, _NAME)}: reconstruction of {self.n_images:,} held-out images"
        base, base_name = (self.own, "own routes") if self.dense is None else (self.dense, "dense twin")
        table = Table(title=title, title_justify="left", caption=_UNITS, caption_justify="left")
        for heading in ("model", "mean squared error", f"ratio to {base_name}", f"PSNR minus {base_name}'s"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        named = {"dense twin": self.dense, "selected route": self.selected, "own routes": self.own}
        for name, error in named.items():
            if error is not None:
                table.add_row(name, f"{error:.5f}", f"{error / base:.4f}", f"{psnr_gain(error, base):+.2f} dB")
        return table


@dataclass(frozen=True)
class RoutedImages:
    """Held-out images of a task, the cluster of each, and the route that is deployed for the task."""

    images: ShardSet
    clusters_N: NDArray[np.int64]
    route: tuple[int, ...]

    def representative(self, expert_ML: NDArray[np.int64]) -> int:
        """The cluster of this route that most of the images are in."""
        count_M = np.bincount(self.clusters_N, minlength=len(expert_ML))
        on_route_M = (expert_ML == self.route).all(axis=1)
        assert on_route_M.any(), "the route is one of a cluster"
        return int(np.where(on_route_M, count_M, -1).argmax())


Loss = Callable[[NDArray[np.int64], Tensor, Tensor], Tensor]
"""The loss of a batch of images, from their ids [B], pixels [B, C, H, W] and mask noise [B, N]."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out images, with the same crops and masks for all models."""

    images: ShardSet
    input: ImageInput
    config: EncodeSettings
    device: torch.device

    @classmethod
    def of(cls, checkpoint: Checkpoint, images: ShardSet, config: EncodeSettings, device: torch.device) -> "HeldOut":
        """Images in the input format of a checkpoint's model."""
        return cls(images, ModelSpec.from_tree(checkpoint.entry("model")).input, config, device)

    @torch.inference_mode()
    def mean_error(self, model: MaskedAutoencoder, loss: Loss) -> float:
        """Mean of `loss` over the images."""
        total = 0.0
        for batch, noise_BN in self.batches(model.shape.num_patches):
            total += float(loss(batch.ids_B, batch.images_BCHW, noise_BN)) * len(batch.ids_B)
        return total / self.images.count

    def batches(self, num_patches: int, ids: NDArray[np.int64] | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """The images, all or some, in batches with the noise of their masks [B, N]."""
        ids = np.arange(self.images.count) if ids is None else ids
        size = self.config.batch_size
        loader = Loader(
            self.images,
            lambda index: ReadList(ids, np.zeros_like(ids))[index * size : (index + 1) * size],
            CenterCrop(self.input.center_crop),
            self.input,
            first=0,
            last=-(-len(ids) // size),
            batch_size=size,
            threads=self.config.threads,
            device=self.device,
            replace_damaged=False,
        )
        for batch in loader:
            yield batch, mask_noise(_MASK_SEED, batch.ids_B, batch.epochs_B, num_patches).to(self.device)


@contextmanager
def routed_images(
    checkpoint: Checkpoint, clusters: Clusters, data: Path, config: EncodeSettings, device: torch.device
) -> Iterator[RoutedImages]:
    """Open held-out images, a shard set or another source; they vote for the route that is deployed.

    Raises:
        ArtefactError: the encoder of the clusters is missing, damaged or another one.
        DataError: there are no images in `data`, or one is damaged.
    """
    with opened_images(data) as images:
        clusters_N, _ = label_images(checkpoint, clusters, images, config, device)
        yield RoutedImages(images, clusters_N, count_votes(clusters_N, recorded_routes(checkpoint)).route)


def evaluate_run(
    checkpoint: Checkpoint,
    clusters: Clusters,
    task: RoutedImages,
    dense: Path | None,
    config: EncodeSettings,
    device: torch.device,
) -> Reconstructions:
    """Measure a checkpoint with experts on the route of a task and on each image's own route.

    Raises:
        ArtefactError: `dense` is not a dense run.
    """
    twin = None if dense is None else _dense_checkpoint(dense)
    model = load_whole(checkpoint, clusters).to(device)
    assert isinstance(model, Moce)
    expert_MLK = run_routes(model, checkpoint)
    selected_N = np.full_like(task.clusters_N, task.representative(expert_MLK[:, :, 0]))
    images = HeldOut.of(checkpoint, task.images, config, device)
    return Reconstructions(
        selected=images.mean_error(model, _routed_loss(model, expert_MLK, selected_N)),
        own=images.mean_error(model, _routed_loss(model, expert_MLK, task.clusters_N)),
        known_by=known_by(checkpoint, twin and twin.identity, task.images.fingerprint),
        dense=None if twin is None else _dense_error(twin, images),
        route=task.route,
        n_images=task.images.count,
    )


def _routed_loss(model: Moce, expert_MLK: NDArray[np.int64], clusters_N: NDArray[np.int64]) -> Loss:
    """The loss of a MoCE whose images take the routes of the given clusters."""

    def loss(ids_B: NDArray[np.int64], images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        return reconstruct_routed(model, expert_MLK, clusters_N[ids_B], images_BCHW, noise_BN).loss

    return loss


def reconstruct_routed(
    model: Moce, expert_MLK: NDArray[np.int64], clusters_B: NDArray[np.int64], images_BCHW: Tensor, noise_BN: Tensor
) -> Reconstruction:
    """Reconstruct images of given clusters by a table of experts, which all are in this process."""
    slots_LE = default_placement(expert_MLK.shape[1], model.experts.num_experts)
    plan = make_plan(clusters_B[None], expert_MLK, slots_LE, 0, 1).to(images_BCHW.device)
    routing = Routing(torch.from_numpy(clusters_B).to(images_BCHW.device), plan, None)
    reconstruction: Reconstruction = model(images_BCHW, noise_BN, routing).reconstruction
    return reconstruction


@torch.inference_mode()
def reconstruct(
    checkpoint: Checkpoint,
    clusters: Clusters | None,
    images_BCHW: Tensor,
    clusters_B: NDArray[np.int64] | None,
    seed: int,
) -> Reconstruction:
    """Mask images and reconstruct them on the host; of a dense model, `clusters` and `clusters_B` are None.

    Args:
        clusters_B: the cluster whose route an image takes.
        seed: of the masks.
    """
    model = load_whole(checkpoint, clusters)
    ids_B = np.arange(len(images_BCHW))
    noise_BN = mask_noise(seed, ids_B, np.zeros_like(ids_B), model.shape.num_patches)
    if clusters_B is None:
        return model(images_BCHW, noise_BN).reconstruction
    assert isinstance(model, Moce)
    return reconstruct_routed(model, run_routes(model, checkpoint), clusters_B, images_BCHW, noise_BN)


def _dense_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of the dense twin. Raises ArtefactError if the run has experts."""
    checkpoint = find(run)
    if checkpoint.experts:
        raise ArtefactError(f"--dense: {run} has experts; expected the run of a dense MAE.")
    return checkpoint


def _dense_error(checkpoint: Checkpoint, images: HeldOut) -> float:
    model = load_whole(checkpoint, None).to(images.device)
    return images.mean_error(model, lambda _, images_BCHW, noise_BN: model(images_BCHW, noise_BN).loss)


def load_whole(checkpoint: Checkpoint, clusters: Clusters | None) -> MaskedAutoencoder:
    """The model of a checkpoint with all its experts in this process, in evaluation mode."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))

    def make_layer(make_expert: Callable[[], nn.Module], num_experts: int, shared: bool) -> nn.Module:
        return ExpertLayer(make_expert, num_experts, shared)

    model = build_model(spec, clusters, make_layer)
    load_weights_strict(dict(model.named_parameters()), checkpoint.load(WEIGHTS), str(checkpoint.folder))
    return model.eval()


def run_routes(model: Moce, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """The experts without gate noise, [M, L, K], by the rule that the run was trained with."""
    balance = checkpoint.entry("config", "experts", "balance")
    with torch.inference_mode():
        return route_table(model.gate, model.gate(), model.share_M, model.experts.k, balance).cpu().numpy()
