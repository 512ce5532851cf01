"""The plan of the expert layers: the movement of images through each of them, known before the forward pass.

The route of an image follows from its cluster, and every rank knows the clusters of the whole global batch (the sampler
is a pure function). So each rank computes on its own, with host integers only, what it sends and receives in every
layer. No counts are exchanged and the device is never queried.

Axes: L expert layers, W ranks, B images per rank, K experts per image, N = B K rows to send, R ranks of one
expert-parallel group, S rows received, M clusters, E experts.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.distributed.device_copy import on_device


@dataclass(frozen=True)
class LayerPlan:
    """One rank's part in one expert layer.

    Attributes:
        experts_BK: global experts of each of the rank's images, int64.
        image_N: image of each row sent; rows are sorted by the slot of their expert.
        restore_N: position among the rows sent of row (image, k), images first.
        send_R, receive_R: rows sent to and received from each rank of the group; plain integers.
        gather_S: received rows arrive sorted by (source rank, slot); these indices sort them by slot.
        scatter_S: the inverse of `gather_S`.
        counts: rows of each local expert, in the order of `gather_S`.
        moved: rows of this rank that are computed on another one.
    """

    experts_BK: Tensor
    image_N: Tensor
    restore_N: Tensor
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
            experts_BK=on_device(self.experts_BK, device),
            image_N=on_device(self.image_N, device),
            restore_N=on_device(self.restore_N, device),
            gather_S=on_device(self.gather_S, device),
            scatter_S=on_device(self.scatter_S, device),
        )


def plan_layer(experts_WBK: NDArray[np.int64], slot_E: NDArray[np.int64], rank: int, ep_size: int) -> LayerPlan:
    """Plan one layer for one rank.

    Args:
        experts_WBK: global experts of every image of the global batch, by rank.
        slot_E: the slot of each global expert; rank r of a group holds slots r * E / ep_size onwards.
        rank: the rank to plan for; its group is the `ep_size` consecutive ranks that contain it.
        ep_size: expert-parallel group size; divides E.
    """
    num_experts = len(slot_E)
    held = num_experts // ep_size
    first, place = rank - rank % ep_size, rank % ep_size
    slots_RN = slot_E[experts_WBK[first : first + ep_size].reshape(ep_size, -1)]
    order_N = np.argsort(slots_RN[place], kind="stable")
    # counts_RE: how many rows of each source rank of the group go to each slot.
    counts_RE = np.stack([np.bincount(row, minlength=num_experts) for row in slots_RN])
    arriving = counts_RE[:, place * held : (place + 1) * held]
    slot_S = np.repeat(np.tile(np.arange(held), ep_size), arriving.ravel())
    gather_S = np.argsort(slot_S, kind="stable")
    send_R = counts_RE[place].reshape(ep_size, held).sum(axis=1)
    K = experts_WBK.shape[2]
    return LayerPlan(
        experts_BK=torch.from_numpy(experts_WBK[rank].copy()),
        image_N=torch.from_numpy(order_N // K),
        restore_N=torch.from_numpy(_inverse(order_N)),
        send_R=send_R.tolist(),
        receive_R=arriving.sum(axis=1).tolist(),
        gather_S=torch.from_numpy(gather_S),
        scatter_S=torch.from_numpy(_inverse(gather_S)),
        counts=arriving.sum(axis=0).tolist(),
        moved=len(order_N) - int(send_R[place]),
    )


@dataclass(frozen=True)
class Plan:
    """The plans of all expert layers for one micro-batch, and a digest (48 bits) that all ranks must agree on."""

    layers: tuple[LayerPlan, ...]
    digest: int

    def to(self, device: torch.device) -> "Plan":
        """The same plan with its index tensors on `device`."""
        return Plan(tuple(layer.to(device) for layer in self.layers), self.digest)


def make_plan(
    clusters_WB: NDArray[np.int64],
    expert_MLK: NDArray[np.int64],
    slot_LE: NDArray[np.int64],
    rank: int,
    ep_size: int,
) -> Plan:
    """The plan of a micro-batch from the clusters of all its images, the route table, and the placement of experts.

    Args:
        clusters_WB: cluster of every image, by rank; the same on every rank.
        expert_MLK: experts of every cluster in every layer; the same on every rank.
        slot_LE: slots of the experts of every layer; the same on every rank.
        rank, ep_size: as in `plan_layer`.
    """
    layers = tuple(
        plan_layer(expert_MLK[clusters_WB, layer], slot_E, rank, ep_size) for layer, slot_E in enumerate(slot_LE)
    )
    digest = hashlib.blake2b(digest_size=6)
    for part in (clusters_WB, expert_MLK, slot_LE):
        digest.update(np.ascontiguousarray(part).tobytes())
    return Plan(layers, int.from_bytes(digest.digest(), "big"))


def _inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
