"""The routes of a step: the table read once, the plan of each micro-batch, and what the log says of both.

Axes: L expert layers, M clusters, E experts, W ranks, B images of a rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.models.moce import Moce, Routing
from moce_ds.moe.gate import chosen_experts, gate_noise
from moce_ds.moe.plan import make_plan
from moce_ds.runtime import Runtime


@dataclass(frozen=True)
class StepTable:
    """The route table of one step: `expert_ML` on the host, the noise that led to it, and the probabilities."""

    expert_ML: NDArray[np.int64]
    noise_LME: Tensor | None
    probs_LME: Tensor


class Router:
    """Looks up routes for a training run.

    Args:
        model: whose gate decides.
        ids_N: cluster of every image of the shard set.
        ep_size: neighbouring ranks that share experts.
        noise: scale of the gate noise while training.
        seed: of that noise.
    """

    def __init__(
        self, model: Moce, ids_N: NDArray[np.int32], *, ep_size: int, noise: float, seed: int, runtime: Runtime
    ) -> None:
        self.model, self.ids_N, self.runtime = model, ids_N, runtime
        self.ep_size, self.noise, self.seed = ep_size, noise, seed
        self.shape_LME = (len(model.experts.layers), len(model.gate.embeddings_MC), model.experts.num_experts)

    @torch.no_grad()
    def table(self, step: int | None) -> StepTable:
        """The table of a step with its noise; without noise for None."""
        noise_LME = None
        if step is not None and self.noise > 0:
            noise_LME = gate_noise(self.seed, step, self.shape_LME, self.noise).to(self.runtime.device)
        probs_LME = self.model.gate(noise_LME)
        return StepTable(chosen_experts(probs_LME), noise_LME, probs_LME)

    def route(self, table: StepTable, ids_G: NDArray[np.int64]) -> Routing:
        """Plan the micro-batch of the images `ids_G`, rank after rank; the same call on every rank."""
        clusters_WB = self.ids_N[ids_G].astype(np.int64).reshape(self.runtime.world_size, -1)
        plan = make_plan(clusters_WB, table.expert_ML, self.runtime.rank, self.ep_size, self.model.experts.num_experts)
        clusters_B = torch.from_numpy(clusters_WB[self.runtime.rank].copy())
        device = self.runtime.device
        return Routing(clusters_B.to(device, non_blocking=True), plan.to(device), table.noise_LME)

    def statistics(self, table: StepTable, ids_G: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
        """Per expert layer: load (share of the images), experts that any cluster chooses, mean confidence."""
        confidence_L = (table.probs_LME.amax(dim=-1) @ self.model.share_M).tolist()
        clusters_G = self.ids_N[ids_G]
        found = {}
        for layer, block in enumerate(self.model.experts.layers):
            expert_M = table.expert_ML[:, layer]
            load_E = np.bincount(expert_M[clusters_G], minlength=self.shape_LME[2]) / len(clusters_G)
            found[str(block)] = {
                "load": load_E.round(5).tolist(),
                "live": len(np.unique(expert_M)),
                "confidence": round(confidence_L[layer], 5),
            }
        return found

    def record(self, step: int) -> dict[str, Any]:
        """The noise-free table as plain data: what `routing.json` and a checkpoint's manifest hold."""
        table = self.table(None)
        return {
            "step": step,
            "layers": list(self.model.experts.layers),
            "experts": self.shape_LME[2],
            "expert_ML": table.expert_ML.tolist(),
            "probs_LME": table.probs_LME.cpu().double().numpy().round(6).tolist(),
            "cluster_share_M": self.model.share_M.cpu().double().numpy().round(8).tolist(),
        }
