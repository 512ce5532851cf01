"""Placement of experts on ranks, and of images on ranks, such that few images have to move.

Nothing in a masked autoencoder mixes images, so an image may be computed on any rank. The placement changes where
things are computed, never the result.

Axes: M clusters, L expert layers, E experts per layer, P places (ranks of one expert-parallel group), G images of a
micro-batch over all ranks, W ranks, U kinds of images.
"""

import numpy as np
from numpy.typing import NDArray


def default_placement(num_layers: int, num_experts: int) -> NDArray[np.int64]:
    """The default placement, slot_LE: expert e in slot e."""
    return np.tile(np.arange(num_experts, dtype=np.int64), (num_layers, 1))


def held_experts(slot_E: NDArray[np.int64], place: int, ep_size: int) -> list[int]:
    """Global experts in the slots of one place, in the order of the slots."""
    held = len(slot_E) // ep_size
    expert_of_slot = np.argsort(slot_E)
    return expert_of_slot[place * held : (place + 1) * held].tolist()


def placement_by_traffic(
    expert_ML: NDArray[np.int64], share_M: NDArray[np.floating], num_experts: int, ep_size: int
) -> NDArray[np.int64]:
    """A placement for a route table, slot_LE.

    The load of the first layer is distributed evenly over the places. Each later layer puts experts where most of their
    images already are (maximum-weight matching of experts with slots).

    Args:
        expert_ML: the (first) expert of every cluster in every layer.
        share_M: share of the images in each cluster.
        num_experts, ep_size: E and P; P divides E.
    """
    from scipy.optimize import (
        linear_sum_assignment,  # imported here, because it takes a third of a second in every process
    )

    M, L = expert_ML.shape
    held = num_experts // ep_size
    place_LE = np.zeros((L, num_experts), dtype=np.int64)
    load_E = np.bincount(expert_ML[:, 0], weights=share_M, minlength=num_experts).astype(np.float64)
    place_LE[0] = _even_places(load_E, ep_size)
    share_MP = np.zeros((M, ep_size))  # how often images of a cluster are at a place, summed over the previous layers
    for layer in range(L):
        if layer:
            at_EP = np.zeros((num_experts, ep_size))
            np.add.at(at_EP, expert_ML[:, layer], share_MP)
            experts, slots = linear_sum_assignment(np.repeat(at_EP, held, axis=1), maximize=True)
            place_LE[layer, experts] = slots // held
        share_MP[np.arange(M), place_LE[layer, expert_ML[:, layer]]] += share_M
    order_LE = np.argsort(place_LE, axis=1, kind="stable")
    slot_LE = np.empty_like(order_LE)
    np.put_along_axis(slot_LE, order_LE, np.arange(num_experts)[None], axis=1)
    return slot_LE


def _even_places(load_E: NDArray[np.floating], ep_size: int) -> NDArray[np.int64]:
    """Equal numbers of experts per place with nearly equal loads: heaviest first, to the lightest place with room."""
    held = len(load_E) // ep_size
    place_E = np.zeros(len(load_E), dtype=np.int64)
    load_P, room_P = np.zeros(ep_size), np.full(ep_size, held)
    for expert in np.argsort(-load_E, kind="stable"):
        place = int(np.where(room_P > 0, load_P, np.inf).argmin())
        place_E[expert], load_P[place], room_P[place] = place, load_P[place] + load_E[expert], room_P[place] - 1
    return place_E


def local_order(
    clusters_G: NDArray[np.int64],
    expert_ML: NDArray[np.int64],
    slot_LE: NDArray[np.int64],
    world_size: int,
    ep_size: int,
) -> NDArray[np.int64]:
    """An order of a micro-batch, [G], whose consecutive equal parts go to ranks 0, 1, ...

    Images are on the ranks of their experts in as many layers as possible, and every rank gets the same number. The
    default order is kept if it is as good. A pure function, the same on every rank.
    """
    held = slot_LE.shape[1] // ep_size
    place_ML = np.take_along_axis(slot_LE, expert_ML.T, axis=1).T // held
    # Images with experts at the same places are of one kind, whatever their cluster.
    present_M = np.flatnonzero(np.bincount(clusters_G, minlength=len(expert_ML)))
    place_UL, kinds = np.unique(place_ML[present_M], axis=0, return_inverse=True)
    kind_M = np.zeros(len(expert_ML), dtype=np.min_scalar_type(len(expert_ML)))  # 16 bits are sorted in linear time
    kind_M[present_M] = kinds.reshape(-1)
    kind_G = kind_M[clusters_G]
    gain_UP = (place_UL[:, :, None] == np.arange(ep_size)).sum(axis=1)
    home_G = _homes(kind_G, gain_UP)
    by_rank = (world_size // ep_size, ep_size, -1)  # rank r is at place r % ep_size of its group
    plain = gain_UP[kind_G.reshape(by_rank), np.arange(ep_size)[:, None]].sum()
    if gain_UP[kind_G, home_G].sum() <= plain:
        return np.arange(len(clusters_G))
    # The ranks of a place hold copies of the same experts: they share its images, each in the order of the batch.
    of_place = np.argsort(home_G, kind="stable").reshape(ep_size, world_size // ep_size, -1)
    return of_place.swapaxes(0, 1).reshape(-1)


def _homes(kind_G: NDArray[np.unsignedinteger], gain_UP: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """A place for every image, with equal numbers per place, such that the total gain is large.

    The kind with the most to lose chooses first; losses are recomputed when a place is full (Vogel's approximation of
    the transport problem, exact for one layer).
    """
    home_G = np.empty_like(kind_G)
    room_P = np.full(gain_UP.shape[1], len(kind_G) // gain_UP.shape[1])
    images_U = np.split(np.argsort(kind_G, kind="stable"), np.cumsum(np.bincount(kind_G))[:-1])
    waiting = dict(enumerate(images_U))
    while waiting:
        kinds = np.array(list(waiting))
        open_UP = np.where(room_P > 0, gain_UP[kinds], -1)
        best_two = np.sort(open_UP, axis=1)[:, -2:]
        weighted_UP = open_UP * (len(kind_G) + 1)
        for choosing in np.argsort(best_two[:, 0] - best_two[:, -1], kind="stable"):
            # The best place with room; among equals, the one with most room.
            place = int((weighted_UP[choosing] + room_P).argmax())
            kind = int(kinds[choosing])
            images = waiting.pop(kind)
            taken, left = images[: room_P[place]], images[room_P[place] :]
            home_G[taken] = place
            room_P[place] -= len(taken)
            if len(left):
                waiting[kind] = left
            if not room_P[place]:
                break
    return home_G
