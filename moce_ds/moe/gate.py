"""Gates that route by the cluster of an image: route probabilities, the choice of experts, and the gate losses.

The cluster is the only input of such a gate, so the gate of an expert layer is a table, computed once per step.

Axes: L expert layers, M clusters, E experts per layer, K experts per image, C width of a cluster embedding, B images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.distributed.randomness import GATE_NOISE, ROUTE, hashed
from moce_ds.moe.balance import balanced_scores, highest


class ClusterGate(nn.Module):
    """The gates of all expert layers: `P_l = softmax((W_l C^T + e) / temperature)^T` (docs/method.md, paper eq. 4).

    Args:
        embeddings_MC: the L2-normalised centroids; `learnable` makes them a parameter (as in MoCLE).
        num_layers, num_experts: L and E.
        temperature: divides the logits.
        tied: share one W between all layers.
        init_scale: initial standard deviation of the logits, over random unit embeddings.
    """

    embeddings_MC: Tensor

    def __init__(
        self,
        embeddings_MC: Tensor,
        num_layers: int,
        num_experts: int,
        temperature: float,
        *,
        tied: bool = False,
        learnable: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.num_layers, self.num_experts = num_layers, num_experts
        embeddings_MC = embeddings_MC.to(torch.float32, copy=True)  # training them must not change the clusters
        if learnable:
            self.embeddings_MC = nn.Parameter(embeddings_MC)
        else:
            self.register_buffer("embeddings_MC", embeddings_MC)
        width = embeddings_MC.shape[1]
        self.weights = nn.ParameterList(
            nn.Parameter(init_scale * torch.randn(num_experts, width)) for _ in range(1 if tied else num_layers)
        )

    def forward(self, noise_LME: Tensor | None = None) -> Tensor:
        """The route tables of all layers, [L, M, E] float32, with rows that sum to 1; `noise_LME` is added to the
        logits.

        With a tied gate, all layers share the table of the first, including its noise. Autocast does not apply: the
        table of the forward pass is the one that chose the experts, and that an export uses.
        """
        W_LEC = torch.stack(list(self.weights)).float()
        with torch.autocast(W_LEC.device.type, enabled=False):
            logits_LME = torch.einsum("lec,mc->lme", W_LEC, self.embeddings_MC.float())
        if noise_LME is not None:
            logits_LME = logits_LME + noise_LME[: len(logits_LME)]
        probs_LME = torch.softmax(logits_LME / self.temperature, dim=-1)
        return probs_LME.expand(self.num_layers, -1, -1)


class FixedGate(nn.Module):
    """A fixed table: each cluster has one expert per layer, and nothing is trained.

    Args:
        expert_ML: the table, int64.
        num_experts: E.
    """

    probs_LME: Tensor

    def __init__(self, expert_ML: NDArray[np.int64], num_experts: int) -> None:
        super().__init__()
        one_hot_LME = nn.functional.one_hot(torch.from_numpy(expert_ML.T.copy()), num_experts)
        self.register_buffer("probs_LME", one_hot_LME.float())

    def forward(self, noise_LME: Tensor | None = None) -> Tensor:
        """The table, [L, M, E]: 1 for the cluster's expert, 0 for the others; noise is ignored."""
        return self.probs_LME


class RandomGate(FixedGate):
    """The control experiment: a fixed random table with nearly equal numbers of clusters per expert, without
    parameters.

    If it performs as well as `ClusterGate`, only capacity matters, not the meaning of the clusters (docs/method.md,
    "Gates").
    """

    def __init__(self, num_clusters: int, num_layers: int, num_experts: int, seed: int, *, tied: bool = False) -> None:
        columns = []
        for layer in range(num_layers):
            key = int(hashed(ROUTE, seed, 0 if tied else layer)[()])
            columns.append(np.random.Generator(np.random.Philox(key=key)).permutation(num_clusters) % num_experts)
        super().__init__(np.stack(columns, axis=1), num_experts)


class PathGate(FixedGate):
    """The paths of SDR: the expert of a layer is a digit of the cluster's number in base E (docs/method.md, "SDR").

    The layers form `stages` of equal length; the last stage reads the last digit. Clusters whose numbers differ by
    multiples of E^stages share a path.
    """

    def __init__(self, num_clusters: int, num_layers: int, num_experts: int, stages: int) -> None:
        stage_L = np.arange(num_layers) * stages // num_layers
        number_M1 = np.arange(num_clusters)[:, None]
        super().__init__(number_M1 // num_experts ** (stages - 1 - stage_L) % num_experts, num_experts)


Gate = ClusterGate | FixedGate


def gate_noise(seed: int, step: int, shape_LME: tuple[int, int, int], scale: float) -> Tensor:
    """Normal noise with standard deviation `scale / E` for every cluster, [L, M, E] float32 on the host.

    All ranks draw the same noise: the generator's seed depends only on (seed, step).
    """
    generator = torch.Generator().manual_seed(int(hashed(GATE_NOISE, seed, step)[()] >> np.uint64(1)))
    return torch.randn(shape_LME, generator=generator) * (scale / shape_LME[-1])


def route_table(gate: Gate, probs_LME: Tensor, share_M: Tensor, k: int, balance: str) -> Tensor:
    """The K experts of every cluster, [M, L, K] int64, by `experts.balance` ("sinkhorn" or "loss"); paths are fixed.

    Args:
        probs_LME: the output of `gate`, best on the host already, as `share_M`: "sinkhorn" is computed there.
    """
    if balance == "sinkhorn" and not isinstance(gate, PathGate):
        return balanced_experts(probs_LME, share_M, k)
    return chosen_experts(probs_LME, k)


def chosen_experts(probs_LME: Tensor, k: int) -> Tensor:
    """The K most probable experts of every cluster, [M, L, K] int64, the most probable first."""
    return probs_LME.detach().topk(k, dim=-1).indices.permute(1, 0, 2)


def balanced_experts(probs_LME: Tensor, share_M: Tensor, k: int) -> Tensor:
    """Experts such that each receives an equal share of the *images*, [M, L, K] int64, on the host.

    Sinkhorn-Knopp on log P: row sums are the clusters' shares of the data, column sums 1/E. An expert is chosen by log
    P / eps + g, where g are the duals of the columns (as in the balancing of the clusters). A cluster is never split,
    so the hard loads are as equal as the sizes of the clusters allow.

    The host computes it in float64 (`moce_ds.moe.balance`): it waits for probabilities and shares of a GPU.
    """
    host_LME, host_M = probs_LME.detach().cpu().numpy(), share_M.cpu().numpy()
    chosen_LMK = np.stack([highest(balanced_scores(probs_ME, host_M), k) for probs_ME in host_LME])
    return torch.from_numpy(chosen_LMK).permute(1, 0, 2)


@dataclass(frozen=True)
class GateLosses:
    """The two losses on route probabilities, each a scalar summed over layers, not weighted."""

    imbalance: Tensor
    balance: Tensor


def gate_losses(probs_LME: Tensor, clusters_B: Tensor, share_M: Tensor) -> GateLosses:
    """Imbalance (confident gates) and balance (every expert is used) of docs/method.md, "Losses".

    Args:
        probs_LME: route tables, float32.
        clusters_B: cluster of each image, int64.
        share_M: share of the training set in each cluster, summing to 1.
    """
    P_LBE = probs_LME[:, clusters_B]
    variation_LB = P_LBE.std(dim=-1, unbiased=False) / P_LBE.mean(dim=-1)
    imbalance = -variation_LB.square().mean(dim=1).sum()
    with torch.autocast(probs_LME.device.type, enabled=False):
        load_LE = torch.einsum("m,lme->le", share_M.to(probs_LME.dtype), probs_LME)
    balance = (load_LE.var(dim=-1, unbiased=False) / load_LE.mean(dim=-1).square()).sum()
    return GateLosses(imbalance, balance)


def combine_weights(probs_LME: Tensor, layer: int, clusters_B: Tensor, experts_BK: Tensor, mode: str) -> Tensor:
    """Factors of the experts' outputs, [B, K] float32.

    `prob` is the paper's `y = sum_k p_k E_k(x)`. `straight_through` divides by the detached sum of the chosen p: equal
    experts then give the output of the dense MLP, and the gate still receives gradients (docs/method.md, "Gates").
    """
    p_BK = probs_LME[layer, clusters_B[:, None], experts_BK]
    return p_BK if mode == "prob" else p_BK / p_BK.sum(dim=1, keepdim=True).detach()


def live_experts(expert_MLK: NDArray[np.int64]) -> list[list[int]]:
    """For each layer, the experts that at least one cluster chooses."""
    return [np.unique(expert_MLK[:, layer]).tolist() for layer in range(expert_MLK.shape[1])]
