"""The plan of the expert layers: the movement of images through each of them, known before the forward pass.

The route of an image follows from its cluster, and every rank knows the clusters of the whole global batch (the sampler
is a pure function). So each rank computes on its own, with host integers only, what it sends and receives in every
layer. No counts are exchanged and the device is never queried.

Axes: L expert layers, W ranks, B images per rank, K experts per image, N = B K rows to send, R ranks of one
expert-parallel group, S rows received, M clusters, E experts.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64

from moce_ds.distributed.device_copy import together_on_device


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
        counts: rows of each local expert, in the order of `gather_S`; plain integers.
        counts_E: the same as a tensor.
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
    counts_E: Tensor
    moved: int


_INDICES = ("experts_BK", "image_N", "restore_N", "gather_S", "scatter_S", "counts_E")
"""The tensors of a LayerPlan."""


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
    counts_E = arriving.sum(axis=0)
    K = experts_WBK.shape[2]
    return LayerPlan(
        experts_BK=torch.from_numpy(experts_WBK[rank].copy()),
        image_N=torch.from_numpy(order_N // K),
        restore_N=torch.from_numpy(_inverse(order_N)),
        send_R=send_R.tolist(),
        receive_R=arriving.sum(axis=1).tolist(),
        gather_S=torch.from_numpy(gather_S),
        scatter_S=torch.from_numpy(_inverse(gather_S)),
        counts=counts_E.tolist(),
        counts_E=torch.from_numpy(counts_E),
        moved=len(order_N) - int(send_R[place]),
    )


@dataclass(frozen=True)
class Plan:
    """The plans of all expert layers for one micro-batch.

    Attributes:
        layers: one plan for each expert layer.
        digest: 48 bits that all ranks must agree on.
    """

    layers: tuple[LayerPlan, ...]
    digest: int

    def to(self, device: torch.device) -> "Plan":
        """The same plan with its tensors on `device`, by a single copy."""
        tensors = [getattr(layer, name) for layer in self.layers for name in _INDICES]
        there = iter(together_on_device(tensors, device))
        moved: list[dict[str, Any]] = [{name: next(there) for name in _INDICES} for _ in self.layers]
        layers = tuple(replace(layer, **own) for layer, own in zip(self.layers, moved, strict=True))
        return Plan(layers, self.digest)


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
    first, place = rank - rank % ep_size, rank % ep_size
    group_RB = clusters_WB[first : first + ep_size]  # no other rank sends to this one, or receives from it
    layers = tuple(
        plan_layer(expert_MLK[group_RB, layer], slot_E, place, ep_size) for layer, slot_E in enumerate(slot_LE)
    )
    digest = xxh3_64()
    for part in (clusters_WB, expert_MLK, slot_LE):
        digest.update(np.ascontiguousarray(part).data)
    return Plan(layers, digest.intdigest() >> 16)


def _inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
