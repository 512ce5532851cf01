"""Plans of all ranks, played through in numpy: counts agree, and every row is computed once, by its expert, where
that expert lives.

Axes: L expert layers, W ranks, B images a rank, K experts an image is sent to, M clusters, E experts.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moce_ds.moe.placement import default_placement, held_experts
from moce_ds.moe.routing_plan import LayerPlan, make_plan, plan_layer

WORLDS = [(world, ep) for world in (1, 2, 4) for ep in (1, 2, 4) if ep <= world]


@dataclass(frozen=True)
class Case:
    """Routes of a global batch, where experts live, and the ranks of a group."""

    experts_WBK: np.ndarray
    slot_E: np.ndarray
    ep: int

    @property
    def plans(self) -> list[LayerPlan]:
        return [plan_layer(self.experts_WBK, self.slot_E, rank, self.ep) for rank in range(len(self.experts_WBK))]

    @property
    def held(self) -> int:
        return len(self.slot_E) // self.ep


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One or two experts an image, in random slots; some experts and ranks with nothing to do."""
    world, ep = draw(st.sampled_from(WORLDS))
    num_experts, k = ep * draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_experts = max(num_experts, k * ep)
    count = world * draw(st.integers(1, 7))
    # Often all images have the same few experts.
    chosen = st.lists(st.integers(0, num_experts - 1), min_size=k, max_size=k, unique=True)
    used = draw(st.lists(chosen, min_size=1, max_size=3))
    experts = draw(st.lists(st.sampled_from(used), min_size=count, max_size=count))
    slots = draw(st.permutations(range(num_experts)))
    return Case(np.array(experts, dtype=np.int64).reshape(world, -1, k), np.array(slots, dtype=np.int64), ep)


def all_to_all(rows: list[list], send: list[list[int]], ep: int) -> list[list]:
    """What each rank of each group of `ep` receives, in the order of the source ranks."""
    received: list[list] = [[] for _ in rows]
    for source, (have, counts) in enumerate(zip(rows, send, strict=True)):
        first, begin = source - source % ep, 0
        for place, count in enumerate(counts):
            received[first + place] += have[begin : begin + count]
            begin += count
        assert begin == len(have)
    return received


@given(cases())
def test_every_row_is_computed_once_by_its_expert_and_comes_back_to_its_place(case: Case) -> None:
    plans, (world, batch, k) = case.plans, case.experts_WBK.shape
    images = [[(rank, b) for b in range(batch)] for rank in range(world)]
    sent = [[images[rank][b] for b in plan.image_N.tolist()] for rank, plan in enumerate(plans)]
    received = all_to_all(sent, [plan.send_R for plan in plans], case.ep)
    computed: list[tuple[tuple[int, int], int]] = []
    answers = []
    for rank, plan in enumerate(plans):
        assert len(received[rank]) == sum(plan.receive_R) == sum(plan.counts) and len(plan.counts) == case.held
        assert plan.counts_E.tolist() == plan.counts
        here = held_experts(case.slot_E, rank % case.ep, case.ep)
        sorted_rows = [received[rank][i] for i in plan.gather_S.tolist()]
        results = list(zip(sorted_rows, np.repeat(here, plan.counts).tolist(), strict=True))
        computed += results
        answers.append([results[i] for i in plan.scatter_S.tolist()])
    back = all_to_all(answers, [plan.receive_R for plan in plans], case.ep)
    expected = [[((rank, b), e) for b in range(batch) for e in case.experts_WBK[rank, b]] for rank in range(world)]
    for rank, plan in enumerate(plans):
        assert [back[rank][i] for i in plan.restore_N.tolist()] == expected[rank]
        assert len(plan.image_N) == batch * k
    assert sorted(computed) == sorted(row for rows in expected for row in rows)


@given(cases())
def test_what_one_sends_the_other_expects(case: Case) -> None:
    plans = case.plans
    for first in range(0, len(plans), case.ep):
        group = plans[first : first + case.ep]
        for r in range(case.ep):
            for s in range(case.ep):
                assert group[r].send_R[s] == group[s].receive_R[r]
    for plan in plans:
        assert all(type(count) is int for count in (*plan.send_R, *plan.receive_R, *plan.counts, plan.moved))


@given(cases())
def test_moved_counts_rows_whose_expert_lives_on_another_rank(case: Case) -> None:
    for rank, plan in enumerate(case.plans):
        home = case.slot_E[case.experts_WBK[rank]] // case.held
        assert plan.moved == int((home != rank % case.ep).sum())
        assert plan.experts_BK.tolist() == case.experts_WBK[rank].tolist()
        assert case.ep > 1 or plan.moved == 0


def test_a_rank_without_work_still_has_a_plan() -> None:
    for slots, expert in ([0, 1, 2, 3], 0), ([3, 2, 1, 0], 3):  # the expert in slot 0
        busy, idle = Case(np.full((2, 3, 1), expert), np.array(slots), 2).plans
        assert busy.counts == [6, 0] and busy.receive_R == [3, 3] and busy.moved == 0
        assert idle.counts == [0, 0] and idle.receive_R == [0, 0] and idle.send_R == [3, 0] and idle.moved == 3
        assert len(idle.gather_S) == len(idle.scatter_S) == 0 and idle.gather_S.dtype == busy.gather_S.dtype


@given(st.sampled_from(WORLDS), st.integers(1, 5), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_a_plan_looks_every_layer_up_in_the_table(case: tuple[int, int], batch: int, k: int, seed: int) -> None:
    world, ep = case
    random = np.random.default_rng(seed)
    clusters_WB = random.integers(0, 6, (world, batch))
    expert_MLK = random.permuted(np.tile(np.arange(4), (6, 3, 1)), axis=2)[:, :, :k]
    slot_LE = random.permuted(np.tile(np.arange(4), (3, 1)), axis=1)
    plans = [make_plan(clusters_WB, expert_MLK, slot_LE, rank, ep) for rank in range(world)]
    for rank, plan in enumerate(plans):
        assert len(plan.layers) == 3
        for layer, planned in enumerate(plan.layers):
            alone = plan_layer(expert_MLK[clusters_WB, layer], slot_LE[layer], rank, ep)
            assert_equal(planned, alone)
            assert planned.experts_BK.tolist() == [expert_MLK[c, layer].tolist() for c in clusters_WB[rank]]


def assert_equal(plan: LayerPlan, other: LayerPlan) -> None:
    for name, value in vars(plan).items():
        expected = getattr(other, name)
        if isinstance(value, Tensor):
            assert value.dtype == torch.int64 and torch.equal(value, expected), name
        else:
            assert value == expected, name


def test_a_plan_goes_to_a_device_in_one_copy() -> None:
    """All its tensors are parts of one buffer, and as they were."""
    random = np.random.default_rng(0)
    clusters_WB, expert_MLK = random.integers(0, 6, (4, 5)), random.integers(0, 4, (6, 3, 2))
    plan = make_plan(clusters_WB, expert_MLK, default_placement(3, 4), 1, 2)
    there = plan.to(torch.device("cpu"))
    assert there.digest == plan.digest
    for layer, planned in zip(there.layers, plan.layers, strict=True):
        assert_equal(layer, planned)
    tensors = [value for part in there.layers for value in vars(part).values() if isinstance(value, Tensor)]
    assert len(tensors) == 3 * 6
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_the_digest_is_that_of_clusters_table_and_places() -> None:
    clusters_WB, slot_LE = np.array([[0, 1], [2, 2]]), default_placement(2, 4)
    expert_MLK = np.array([[0, 1], [1, 1], [3, 0]])[:, :, None]

    def digest(clusters: np.ndarray, table: np.ndarray, slots: np.ndarray, rank: int = 0) -> int:
        return make_plan(clusters, table, slots, rank, 2).digest

    digests = {digest(clusters_WB, expert_MLK, slot_LE, rank) for rank in range(2)}
    assert len(digests) == 1 and 0 <= next(iter(digests)) < 2**53  # ranks compare it as a float64
    other_clusters, other_table, other_slots = clusters_WB.copy(), expert_MLK.copy(), slot_LE.copy()
    other_clusters[1, 1], other_table[0, 1], other_slots[1] = 1, 0, [1, 0, 2, 3]
    digests |= {digest(other_clusters, expert_MLK, slot_LE), digest(clusters_WB, other_table, slot_LE)}
    digests |= {digest(clusters_WB, expert_MLK, other_slots)}
    digests |= {digest(clusters_WB, np.asfortranarray(expert_MLK), slot_LE)}  # the same table, stored otherwise
    assert len(digests) == 4


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_expert_is_held_at_the_place_of_its_slot(ep: int) -> None:
    slot_E = np.array([5, 0, 7, 2, 1, 6, 3, 4])
    held = [held_experts(slot_E, place, ep) for place in range(ep)]
    assert [slot_E[e] for experts in held for e in experts] == list(range(8))
