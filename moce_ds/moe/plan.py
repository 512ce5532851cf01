"""Who computes what: the movement of images through every expert layer, known before the forward pass.

The route of an image follows from its cluster, and every rank knows the clusters of the whole global batch (the
sampler is a pure function). So each rank works out alone, with host integers only, what it sends and receives in
every layer: no counts are exchanged and the device is never asked.

Axes: L expert layers, W ranks, B images a rank, R ranks of one expert-parallel group, S images received.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LayerPlan:
    """One rank's part in one expert layer.

    Attributes:
        experts_B: global expert of each of the rank's images, int64.
        order_B: the rank's images sorted by expert: row i of what is sent is image `order_B[i]`.
        restore_B: the inverse of `order_B`.
        send_R, receive_R: images sent to and received from each rank of the group; plain integers.
        gather_S: received rows arrive sorted by (source rank, expert); these indices sort them by expert.
        scatter_S: the inverse of `gather_S`.
        counts: images of each local expert, in the order of `gather_S`.
        moved: images of this rank that are computed on another one.
    """

    experts_B: Tensor
    order_B: Tensor
    restore_B: Tensor
    send_R: list[int]
    receive_R: list[int]
    gather_S: Tensor
    scatter_S: Tensor
    counts: list[int]
    moved: int

    def to(self, device: torch.device) -> "LayerPlan":
        """The same plan with its index tensors on `device`."""
        return replace(
            self,
            experts_B=self.experts_B.to(device, non_blocking=True),
            order_B=self.order_B.to(device, non_blocking=True),
            restore_B=self.restore_B.to(device, non_blocking=True),
            gather_S=self.gather_S.to(device, non_blocking=True),
            scatter_S=self.scatter_S.to(device, non_blocking=True),
        )


def plan_layer(experts_WB: NDArray[np.int64], rank: int, ep_size: int, num_experts: int) -> LayerPlan:
    """Plan one layer for one rank.

    Args:
        experts_WB: global expert of every image of the global batch, by rank.
        rank: the rank to plan for; its group is the `ep_size` neighbouring ranks that contain it.
        ep_size: ranks that share one set of experts; rank r of a group holds experts
            r * num_experts / ep_size onwards.
        num_experts: experts of the layer, a multiple of `ep_size`.
    """
    local = num_experts // ep_size
    first, place = rank - rank % ep_size, rank % ep_size
    group_RB = experts_WB[first : first + ep_size]
    mine_B = group_RB[place]
    order_B = np.argsort(mine_B, kind="stable")
    # counts_RE: how many images of each source rank of the group go to each expert.
    counts_RE = np.stack([np.bincount(row, minlength=num_experts) for row in group_RB])
    arriving_Re = counts_RE[:, place * local : (place + 1) * local]
    expert_S = np.repeat(np.tile(np.arange(local), ep_size), arriving_Re.ravel())
    gather_S = np.argsort(expert_S, kind="stable")
    send_R = counts_RE[place].reshape(ep_size, local).sum(axis=1)
    return LayerPlan(
        experts_B=torch.from_numpy(mine_B.copy()),
        order_B=torch.from_numpy(order_B),
        restore_B=torch.from_numpy(np.argsort(order_B, kind="stable")),
        send_R=send_R.tolist(),
        receive_R=arriving_Re.sum(axis=1).tolist(),
        gather_S=torch.from_numpy(gather_S),
        scatter_S=torch.from_numpy(np.argsort(gather_S, kind="stable")),
        counts=arriving_Re.sum(axis=0).tolist(),
        moved=len(mine_B) - int(send_R[place]),
    )


@dataclass(frozen=True)
class Plan:
    """The plans of all expert layers for one micro-batch, and a digest that all ranks must agree on."""

    layers: tuple[LayerPlan, ...]
    digest: int

    def to(self, device: torch.device) -> "Plan":
        """The same plan with its index tensors on `device`."""
        return Plan(tuple(layer.to(device) for layer in self.layers), self.digest)


def make_plan(
    clusters_WB: NDArray[np.int64], expert_ML: NDArray[np.int64], rank: int, ep_size: int, num_experts: int
) -> Plan:
    """The plan of a micro-batch from the clusters of all its images and the route table.

    Args:
        clusters_WB: cluster of every image, by rank; the same on every rank.
        expert_ML: expert of every cluster in every layer; the same on every rank.
        rank, ep_size, num_experts: as in `plan_layer`.
    """
    layers = tuple(
        plan_layer(expert_ML[clusters_WB, layer], rank, ep_size, num_experts) for layer in range(expert_ML.shape[1])
    )
    digest = hashlib.blake2b(clusters_WB.tobytes() + expert_ML.tobytes(), digest_size=6)
    return Plan(layers, int.from_bytes(digest.digest(), "big"))
