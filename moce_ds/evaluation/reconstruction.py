"""Reconstruction error of a run on held-out images: on the selected route, on each image's own route, and of a dense
twin.

`own` is what the experts are capable of, `selected` what one deployed ViT achieves. A random table
(experts.gate=random) shows the effect of capacity alone (docs/method.md, "Gates").

Axes: B images, N patches, M clusters, L expert layers, K experts per image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint, find
from moce_ds.checkpoint.parameters import load_weights_strict
from moce_ds.clustering.clusters import Clusters
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import SequentialSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop
from moce_ds.errors import ArtefactError
from moce_ds.evaluation.results import known_by
from moce_ds.export.select import clusters_encoder, count_votes, run_clusters
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.encode import EncodeSettings, encode_all
from moce_ds.models.mae import MaskedAutoencoder, mask_noise
from moce_ds.models.moce import Moce, Routing
from moce_ds.moe.experts import ExpertLayer
from moce_ds.moe.gate import route_table
from moce_ds.moe.placement import default_placement
from moce_ds.moe.plan import make_plan

_MASK_SEED = 20_230_207  # seed of the held-out masks, the same for all models compared


@dataclass(frozen=True)
class Reconstructions:
    """Mean squared errors on hidden patches, normalised per patch; `dense` is None without a twin.

    `known_by` distinguishes the record from those of other models and images.
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


def evaluate_run(
    run: Path, held_out: ShardSet, dense: Path | None, config: EncodeSettings, device: torch.device
) -> Reconstructions:
    """Measure a run with experts. Raises ArtefactError if `run` or `dense` is something else."""
    checkpoint, clusters = run_clusters(run)
    model = load_whole(checkpoint, clusters).to(device)
    assert isinstance(model, Moce)
    encoder = clusters_encoder(checkpoint, clusters, device)
    ids_N = clusters.assign(encode_all(encoder, held_out, config, device).half().float().numpy())
    expert_MLK = run_routes(model, checkpoint)
    selection = count_votes(ids_N, expert_MLK[:, :, 0])
    # The most frequent cluster among the images that voted for the winning route represents it.
    winner = next(c for c in selection.clusters if tuple(expert_MLK[c, :, 0]) == selection.route)

    def routed(clusters_N: NDArray[np.int64]) -> Callable[[NDArray[np.int64], Tensor, Tensor], Tensor]:
        def loss(ids_B: NDArray[np.int64], images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
            clusters_B = clusters_N[ids_B]
            slots_LE = default_placement(expert_MLK.shape[1], model.experts.num_experts)
            plan = make_plan(clusters_B[None], expert_MLK, slots_LE, 0, 1).to(device)
            routing = Routing(torch.from_numpy(clusters_B).to(device), plan, None)
            return model(images_BCHW, noise_BN, routing).reconstruction.loss

        return loss

    twin = twin_checkpoint = None
    if dense is not None:
        twin_checkpoint = find(dense)
        if twin_checkpoint.experts:
            raise ArtefactError(f"--dense: {dense} has experts; expected the run of a dense MAE.")
        dense_model = load_whole(twin_checkpoint, None).to(device)
        twin = mean_error(
            lambda _, images, noise: dense_model(images, noise).loss, dense_model, held_out, checkpoint, config, device
        )
    return Reconstructions(
        selected=mean_error(routed(np.full_like(ids_N, winner)), model, held_out, checkpoint, config, device),
        own=mean_error(routed(ids_N), model, held_out, checkpoint, config, device),
        known_by=known_by(checkpoint, twin_checkpoint and twin_checkpoint.identity, held_out.fingerprint),
        dense=twin,
        route=selection.route,
        n_images=held_out.count,
    )


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


@torch.inference_mode()
def mean_error(
    loss: Callable[[NDArray[np.int64], Tensor, Tensor], Tensor],
    model: MaskedAutoencoder,
    held_out: ShardSet,
    checkpoint: Checkpoint,
    config: EncodeSettings,
    device: torch.device,
) -> float:
    """Mean of `loss(ids, images, mask noise)` over a shard set. All models see the same crops and masks."""
    input = ModelSpec.from_tree(checkpoint.entry("model")).input
    sampler = SequentialSampler(0, held_out.count, config.batch_size)
    loader = Loader(
        held_out,
        sampler.batch,
        CenterCrop(input.center_crop),
        input,
        first=0,
        last=sampler.num_batches,
        batch_size=config.batch_size,
        threads=config.threads,
        device=device,
        replace_damaged=False,
    )
    total = 0.0
    for batch in loader:
        noise_BN = mask_noise(_MASK_SEED, batch.ids_B, batch.epochs_B, model.shape.num_patches).to(device)
        total += float(loss(batch.ids_B, batch.images_BCHW, noise_BN)) * len(batch.ids_B)
    return total / held_out.count
