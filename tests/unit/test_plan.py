"""Plans of all ranks, played through in numpy: counts agree, and every image is computed once, by its expert.

Axes: L expert layers, W ranks, B images a rank, M clusters, E experts.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moce_ds.moe.plan import LayerPlan, make_plan, plan_layer

CASES = [(world, ep) for world in (1, 2, 4) for ep in (1, 2, 4) if ep <= world]


@st.composite
def routes(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(experts_WB, ep_size, num_experts), some experts and ranks with nothing to do."""
    world, ep = draw(st.sampled_from(CASES))
    num_experts = ep * draw(st.integers(1, 3))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=3))  # often only one expert
    count = world * draw(st.integers(1, 7))
    experts = draw(st.lists(st.sampled_from(used), min_size=count, max_size=count))
    return np.array(experts, dtype=np.int64).reshape(world, -1), ep, num_experts


def plans_of(experts_WB: np.ndarray, ep: int, num_experts: int) -> list[LayerPlan]:
    return [plan_layer(experts_WB, rank, ep, num_experts) for rank in range(len(experts_WB))]


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


@given(routes())
def test_every_image_is_computed_once_by_its_expert_and_comes_back_to_its_place(
    case: tuple[np.ndarray, int, int],
) -> None:
    experts_WB, ep, num_experts = case
    plans = plans_of(*case)
    world, batch = experts_WB.shape
    local = num_experts // ep
    images = [[(rank, b) for b in range(batch)] for rank in range(world)]
    sent = [[images[rank][i] for i in plan.order_B.tolist()] for rank, plan in enumerate(plans)]
    received = all_to_all(sent, [plan.send_R for plan in plans], ep)
    computed: dict[tuple[int, int], int] = {}
    answers = []
    for rank, plan in enumerate(plans):
        assert len(received[rank]) == sum(plan.receive_R) == sum(plan.counts) and len(plan.counts) == local
        sorted_rows = [received[rank][i] for i in plan.gather_S.tolist()]
        owner = np.repeat(np.arange(local), plan.counts) + (rank % ep) * local
        results = list(zip(sorted_rows, owner.tolist(), strict=True))
        for image, expert in results:
            assert image not in computed
            computed[image] = expert
        answers.append([results[i] for i in plan.scatter_S.tolist()])
    back = all_to_all(answers, [plan.receive_R for plan in plans], ep)
    for rank, plan in enumerate(plans):
        restored = [back[rank][i] for i in plan.restore_B.tolist()]
        assert restored == [((rank, b), experts_WB[rank, b]) for b in range(batch)]
    assert computed == {(rank, b): experts_WB[rank, b] for rank in range(world) for b in range(batch)}


@given(routes())
def test_what_one_sends_the_other_expects(case: tuple[np.ndarray, int, int]) -> None:
    _, ep, _ = case
    plans = plans_of(*case)
    for first in range(0, len(plans), ep):
        group = plans[first : first + ep]
        for r in range(ep):
            for s in range(ep):
                assert group[r].send_R[s] == group[s].receive_R[r]
    for plan in plans:
        assert all(type(count) is int for count in (*plan.send_R, *plan.receive_R, *plan.counts, plan.moved))


@given(routes())
def test_moved_counts_images_whose_expert_lives_on_another_rank(case: tuple[np.ndarray, int, int]) -> None:
    experts_WB, ep, num_experts = case
    for rank, plan in enumerate(plans_of(*case)):
        home = experts_WB[rank] // (num_experts // ep)
        assert plan.moved == int((home != rank % ep).sum())
        assert plan.experts_B.tolist() == experts_WB[rank].tolist()
        assert ep > 1 or plan.moved == 0


def test_a_rank_without_work_still_has_a_plan() -> None:
    busy, idle = plans_of(np.zeros((2, 3), np.int64), 2, 4)
    assert busy.counts == [6, 0] and busy.receive_R == [3, 3] and busy.moved == 0
    assert idle.counts == [0, 0] and idle.receive_R == [0, 0] and idle.send_R == [3, 0] and idle.moved == 3
    assert len(idle.gather_S) == len(idle.scatter_S) == 0 and idle.gather_S.dtype == busy.gather_S.dtype


@given(st.sampled_from(CASES), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_plan_looks_every_layer_up_in_the_table(case: tuple[int, int], batch: int, seed: int) -> None:
    world, ep = case
    random = np.random.default_rng(seed)
    clusters_WB, expert_ML = random.integers(0, 6, (world, batch)), random.integers(0, 4, (6, 3))
    plans = [make_plan(clusters_WB, expert_ML, rank, ep, 4) for rank in range(world)]
    for rank, plan in enumerate(plans):
        assert len(plan.layers) == 3
        for layer, planned in enumerate(plan.layers):
            alone = plan_layer(expert_ML[clusters_WB, layer], rank, ep, 4)
            assert planned.send_R == alone.send_R and planned.order_B.tolist() == alone.order_B.tolist()
            assert planned.experts_B.tolist() == [expert_ML[c, layer] for c in clusters_WB[rank]]


def test_the_digest_is_that_of_clusters_and_table() -> None:
    clusters_WB, expert_ML = np.array([[0, 1], [2, 2]]), np.array([[0, 1], [1, 1], [3, 0]])

    def digest(clusters: np.ndarray, table: np.ndarray, rank: int = 0) -> int:
        return make_plan(clusters, table, rank, 2, 4).digest

    digests = {digest(clusters_WB, expert_ML, rank) for rank in range(2)}
    assert len(digests) == 1 and 0 <= next(iter(digests)) < 2**53  # ranks compare it as a float64
    other_clusters, other_table = clusters_WB.copy(), expert_ML.copy()
    other_clusters[1, 1], other_table[0, 1] = 1, 0
    digests |= {digest(other_clusters, expert_ML), digest(clusters_WB, other_table)}
    digests |= {digest(clusters_WB, np.asfortranarray(expert_ML))}  # the same table, stored otherwise
    assert len(digests) == 3
