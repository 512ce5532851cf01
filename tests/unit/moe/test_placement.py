"""Where experts live and which rank reads which image: always legal, never worse than doing nothing.

Axes: M clusters, L expert layers, E experts, P places (ranks of a group), G images of a micro-batch, W ranks.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moce_ds.moe.placement import default_placement, held_experts, local_order, placement_by_traffic
from moce_ds.moe.routing_plan import make_plan


@dataclass(frozen=True)
class Batch:
    """A micro-batch, its route table, and where experts live on how many ranks."""

    clusters_G: np.ndarray
    expert_ML: np.ndarray
    slot_LE: np.ndarray
    world: int
    ep: int

    def order(self) -> np.ndarray:
        return local_order(self.clusters_G, self.expert_ML, self.slot_LE, self.world, self.ep)

    def moved(self, order_G: np.ndarray) -> int:
        """Rows that leave their rank, over all layers, by the plans that training makes."""
        clusters_WB = self.clusters_G[order_G].reshape(self.world, -1)
        plans = [
            make_plan(clusters_WB, self.expert_ML[:, :, None], self.slot_LE, rank, self.ep)
            for rank in range(self.world)
        ]
        return sum(layer.moved for plan in plans for layer in plan.layers)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    ep = draw(st.sampled_from([1, 2, 4]))
    world, num_experts = ep * draw(st.integers(1, 3)), ep * draw(st.integers(1, 3))
    layers, clusters = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = random.dirichlet(np.full(clusters, draw(st.sampled_from([0.2, 5.0]))))
    clusters_G = random.choice(clusters, size=world * draw(st.integers(1, 8)), p=weights)
    slot_LE = random.permuted(np.tile(np.arange(num_experts), (layers, 1)), axis=1)
    return Batch(clusters_G, random.integers(0, num_experts, (clusters, layers)), slot_LE, world, ep)


@given(batches())
def test_an_order_deals_every_image_once_and_moves_no_more_than_the_plain_one(batch: Batch) -> None:
    plain_G, order_G = np.arange(len(batch.clusters_G)), batch.order()
    assert sorted(order_G.tolist()) == plain_G.tolist()
    assert batch.moved(order_G) <= batch.moved(plain_G)
    for part in order_G.reshape(batch.world, -1):
        assert sorted(part) == part.tolist()  # a rank reads its images in the order of the batch
    np.testing.assert_array_equal(batch.order(), order_G)


def order_by_images(batch: Batch) -> np.ndarray:
    """`local_order` with kinds that are found image by image: the specification of its fast way over clusters."""
    clusters_G, ep = batch.clusters_G, batch.ep
    place_ML = np.take_along_axis(batch.slot_LE, batch.expert_ML.T, axis=1).T // (batch.slot_LE.shape[1] // ep)
    place_UL, kind_G = np.unique(place_ML[clusters_G], axis=0, return_inverse=True)
    kind_G = kind_G.reshape(-1)
    gain_UP = (place_UL[:, :, None] == np.arange(ep)).sum(axis=1)
    part = len(clusters_G) // batch.world
    plain_G, home_G = np.repeat(np.arange(batch.world) % ep, part), homes(kind_G, gain_UP)
    if gain_UP[kind_G, home_G].sum() <= gain_UP[kind_G, plain_G].sum():
        return np.arange(len(clusters_G))
    of_place = [np.flatnonzero(home_G == place) for place in range(ep)]
    return np.concatenate([of_place[rank % ep][rank // ep * part :][:part] for rank in range(batch.world)])


def homes(kind_G: np.ndarray, gain_UP: np.ndarray) -> np.ndarray:
    """A place for every image: the kind with the most to lose first, losses anew when a place is full."""
    home_G, room_P = np.empty_like(kind_G), np.full(gain_UP.shape[1], len(kind_G) // gain_UP.shape[1])
    waiting = {kind: np.flatnonzero(kind_G == kind) for kind in range(len(gain_UP))}
    while waiting:
        kinds = np.array(list(waiting))
        open_UP = np.where(room_P > 0, gain_UP[kinds], -1)
        best_two = np.sort(open_UP, axis=1)[:, -2:]
        for choosing in np.argsort(best_two[:, 0] - best_two[:, -1], kind="stable"):
            place, kind = int(np.lexsort((-room_P, -open_UP[choosing]))[0]), int(kinds[choosing])
            taken, left = np.split(waiting.pop(kind), [room_P[place]])
            home_G[taken] = place
            room_P[place] -= len(taken)
            if len(left):
                waiting[kind] = left
            if not room_P[place]:
                break
    return home_G


@given(batches())
def test_the_order_by_clusters_is_that_by_images(batch: Batch) -> None:
    np.testing.assert_array_equal(batch.order(), order_by_images(batch))


def test_the_order_of_a_large_batch_is_that_by_images() -> None:
    """More kinds than a byte counts, and clusters without an image."""
    random = np.random.default_rng(0)
    expert_ML = random.integers(0, 8, (1000, 6))
    batch = Batch(random.integers(0, 900, 64 * 40), expert_ML, default_placement(6, 8), 64, 8)
    assert batch.order().tolist() != list(range(64 * 40))
    np.testing.assert_array_equal(batch.order(), order_by_images(batch))


@given(batches())
def test_with_one_layer_nothing_moves_but_what_has_no_room(batch: Batch) -> None:
    one = Batch(batch.clusters_G, batch.expert_ML[:, :1], batch.slot_LE[:1], batch.world, batch.ep)
    home_G = one.slot_LE[0][one.expert_ML[one.clusters_G, 0]] // (one.slot_LE.shape[1] // one.ep)
    room = len(home_G) // one.ep
    overflow = np.maximum(np.bincount(home_G, minlength=one.ep) - room, 0).sum()
    assert one.moved(one.order()) == overflow


def test_a_full_place_does_not_drive_others_from_theirs() -> None:
    """Five images want place 0, which has room for two; those of places 1 and 2 stay at home all the same."""
    batch = Batch(np.array([0, 0, 0, 0, 0, 1, 1, 2]), np.array([[0], [1], [2]]), default_placement(1, 4), 4, 4)
    assert batch.moved(batch.order()) == 3


def test_where_nothing_is_gained_the_order_stays() -> None:
    """Every image has one layer at each place: it does not matter where it is."""
    batch = Batch(np.array([0, 1, 0, 1]), np.array([[0, 1], [1, 0]]), default_placement(2, 2), 2, 2)
    assert batch.order().tolist() == [0, 1, 2, 3]


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(expert_ML, share_M, num_experts, ep_size)"""
    ep, layers, clusters = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    num_experts = ep * draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random.integers(0, num_experts, (clusters, layers)), random.dirichlet(np.ones(clusters)), num_experts, ep


def place_of(slot_LE: np.ndarray, ep: int) -> np.ndarray:
    return slot_LE // (slot_LE.shape[1] // ep)


@given(tables())
def test_a_placement_is_a_permutation_with_equally_many_experts_a_place(case: tuple) -> None:
    expert_ML, share_M, num_experts, ep = case
    slot_LE = placement_by_traffic(expert_ML, share_M, num_experts, ep)
    assert slot_LE.shape == (expert_ML.shape[1], num_experts) and slot_LE.dtype == np.int64
    for slot_E in slot_LE:
        assert sorted(slot_E) == list(range(num_experts))
        held = [held_experts(slot_E, place, ep) for place in range(ep)]
        assert [len(experts) for experts in held] == [num_experts // ep] * ep
        assert sorted(expert for experts in held for expert in experts) == list(range(num_experts))


@given(tables())
def test_tied_routes_have_their_experts_at_one_place_in_every_layer(case: tuple) -> None:
    expert_ML, share_M, num_experts, ep = case
    tied_ML = np.repeat(expert_ML[:, :1], 3, axis=1)
    place_LE = place_of(placement_by_traffic(tied_ML, share_M, num_experts, ep), ep)
    used = np.unique(tied_ML)
    assert (place_LE[:, used] == place_LE[0, used]).all()


@given(tables())
def test_later_layers_are_placed_so_that_as_few_images_move_as_can_be(case: tuple) -> None:
    """Between two layers: no exchange of two experts' slots in the second keeps more images where they are."""
    expert_ML, share_M, num_experts, ep = case
    expert_ML = expert_ML[:, [0, -1]]
    place_LE = place_of(placement_by_traffic(expert_ML, share_M, num_experts, ep), ep)

    def staying(place_E: np.ndarray) -> float:
        return float(share_M[place_LE[0, expert_ML[:, 0]] == place_E[expert_ML[:, 1]]].sum())

    best = staying(place_LE[1])
    assert best >= staying(place_LE[0]) - 1e-12
    for a in range(num_experts):
        for b in range(a):
            other_E = place_LE[1].copy()
            other_E[[a, b]] = other_E[[b, a]]
            assert best >= staying(other_E) - 1e-12


def test_places_share_the_load_of_the_first_layer() -> None:
    expert_ML, share_M = np.arange(8)[:, None], np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    place_E = place_of(placement_by_traffic(expert_ML, share_M, 8, 2), 2)[0]
    assert np.bincount(place_E, weights=share_M).tolist() == pytest.approx([0.5, 0.5], abs=0.025)


def test_a_fitted_placement_saves_what_a_plain_one_moves() -> None:
    """Routes that jump from expert e to expert 3 - e: in order every image moves, fitted none."""
    expert_ML = np.array([[0, 3], [1, 2], [2, 1], [3, 0]])
    clusters_G, fitted = np.array([3, 2, 1, 0] * 4), placement_by_traffic(expert_ML, np.full(4, 0.25), 4, 2)
    plain, own = (Batch(clusters_G, expert_ML, slot_LE, 4, 2) for slot_LE in (default_placement(2, 4), fitted))
    assert plain.moved(plain.order()) == 16
    assert own.moved(own.order()) == 0
