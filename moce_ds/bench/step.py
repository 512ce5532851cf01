"""Forward and backward of a training step: MoCE compared with the dense MAE of the same active size.

Axes: B images, N patches, M clusters, C width of a cluster embedding.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from moce_ds.bench.timing import interleaved, keep_freed_memory
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder
from moce_ds.models.moce import ExpertShape, Moce, Routing
from moce_ds.models.shapes import LossWeights
from moce_ds.models.vit import ViTShape
from moce_ds.moe.gate import chosen_experts
from moce_ds.moe.layer import ClusterMoE
from moce_ds.moe.placement import default_placement
from moce_ds.moe.plan import make_plan

_CLUSTERS = 64


def bench_step(batch: int, num_experts: int, width: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows (name, B, E, D, seconds, ratio to dense) for 224 px, patch 16, 12 blocks, experts in blocks 9 and 11."""
    keep_freed_memory()
    torch.manual_seed(0)
    shape, decoder = ViTShape(224, 16, width, 12, width // 64), DecoderShape(width, 2, width // 64)
    experts = ExpertShape(num_experts, (9, 11))
    share_M = torch.full((_CLUSTERS,), 1 / _CLUSTERS)
    embeddings_MC = nn.functional.normalize(torch.randn(_CLUSTERS, width), dim=1)

    def make_layer(make_expert: Any, count: int, shared: bool) -> nn.Module:
        return ClusterMoE(make_expert, count, ep_size=1, shared=shared)

    weights = LossWeights(imbalance=0.01, balance=0.1)
    dense = MaskedAutoencoder(shape, decoder, 0.75).to(device)
    moce = Moce(shape, decoder, 0.75, experts, embeddings_MC, share_M, make_layer, weights).to(device)
    images_BCHW = torch.randn(batch, 3, 224, 224, device=device)
    noise_BN = torch.rand(batch, shape.num_patches, device=device)
    clusters_B = np.random.default_rng(0).integers(_CLUSTERS, size=batch)

    def dense_step() -> None:
        dense.zero_grad(set_to_none=True)
        dense(images_BCHW, noise_BN).loss.backward()

    def moce_step() -> None:
        # Everything that a step adds: the copy of the table to the host, the plan, the all-to-all, the gate losses.
        moce.zero_grad(set_to_none=True)
        expert_MLK = chosen_experts(moce.gate(), 1).cpu().numpy()
        plan = make_plan(clusters_B[None], expert_MLK, default_placement(2, num_experts), 0, 1).to(device)
        moce(images_BCHW, noise_BN, Routing(torch.from_numpy(clusters_B).to(device), plan, None)).loss.backward()

    seconds = interleaved({"dense MAE": dense_step, "MoCE": moce_step}, repeats)
    return [
        {"name": name, "B": batch, "E": num_experts, "D": width, "seconds": s, "ratio": s / seconds["dense MAE"]}
        for name, s in seconds.items()
    ]
