"""The cluster gate: a table of route probabilities, and the losses on it.

The gate reads only the cluster of an image, so for each expert layer it *is* a table, computed once a step.

Axes: L expert layers, M clusters, E experts a layer, C width of a cluster embedding, B images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.randomness import GATE_NOISE, hashed


class ClusterGate(nn.Module):
    """The gates of all expert layers: `P_l = softmax((W_l C^T + e) / temperature)^T` (METHOD.md, paper eq. 4).

    Attributes:
        weights: one [E, C] matrix W_l a layer; float parameters.
        embeddings_MC: the L2-normalised centroids; a frozen buffer.
    """

    embeddings_MC: Tensor

    def __init__(self, embeddings_MC: Tensor, num_layers: int, num_experts: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.num_experts = num_experts
        self.register_buffer("embeddings_MC", embeddings_MC.float())
        width = embeddings_MC.shape[1]
        # The scale of a linear layer's default start; with unit-norm embeddings the logits are small, so the
        # routes are nearly uniform and the experts nearly share the data at the start.
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts, width).uniform_(-(width**-0.5), width**-0.5))
            for _ in range(num_layers)
        )

    def forward(self, noise_LME: Tensor | None = None) -> Tensor:
        """The route tables of all layers, [L, M, E] float32, rows summing to 1; `noise_LME` is added to the logits."""
        W_LEC = torch.stack(list(self.weights)).float()
        logits_LME = torch.einsum("lec,mc->lme", W_LEC, self.embeddings_MC.float())
        if noise_LME is not None:
            logits_LME = logits_LME + noise_LME
        return torch.softmax(logits_LME / self.temperature, dim=-1)


def gate_noise(seed: int, step: int, shape_LME: tuple[int, int, int], scale: float) -> Tensor:
    """Normal noise of standard deviation `scale / E` for every cluster, [L, M, E] float32 on the host.

    Every rank draws the same: the generator's seed is a function of (seed, step) alone.
    """
    generator = torch.Generator().manual_seed(int(hashed(GATE_NOISE, seed, step)[()] >> np.uint64(1)))
    return torch.randn(shape_LME, generator=generator) * (scale / shape_LME[-1])


def chosen_experts(probs_LME: Tensor) -> NDArray[np.int64]:
    """The expert of every cluster in every layer, [M, L] on the host. The one device-to-host copy of a step."""
    return probs_LME.detach().argmax(dim=-1).T.cpu().numpy()


@dataclass(frozen=True)
class GateLosses:
    """The two losses on route probabilities, each a scalar summed over layers, not yet weighted."""

    imbalance: Tensor
    balance: Tensor


def gate_losses(probs_LME: Tensor, clusters_B: Tensor, share_M: Tensor) -> GateLosses:
    """Imbalance (confident gates) and balance (every expert used) of METHOD.md, "Losses".

    Args:
        probs_LME: route tables, float32.
        clusters_B: cluster of each image, int64.
        share_M: share of the training set in each cluster, summing to 1.
    """
    P_LBE = probs_LME[:, clusters_B]
    variation_LB = P_LBE.std(dim=-1, unbiased=False) / P_LBE.mean(dim=-1)
    imbalance = -variation_LB.square().mean(dim=1).sum()
    load_LE = torch.einsum("m,lme->le", share_M.to(probs_LME.dtype), probs_LME)
    balance = (load_LE.var(dim=-1, unbiased=False) / load_LE.mean(dim=-1).square()).sum()
    return GateLosses(imbalance, balance)


def combine_weight(probs_LME: Tensor, layer: int, clusters_B: Tensor, experts_B: Tensor, mode: str) -> Tensor:
    """What an expert's output is multiplied by, [B] float32.

    `prob` is the paper's `y = p E(x)`; `straight_through` is 1 in value and has the gradient of `log p`, so that the
    model equals the dense one at the start and the gate still learns (METHOD.md, "Gates").
    """
    p_B = probs_LME[layer, clusters_B, experts_B]
    return p_B if mode == "prob" else p_B / p_B.detach()
