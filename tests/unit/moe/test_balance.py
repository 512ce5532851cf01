"""The balanced choice of experts against 200 iterations in the log domain, its specification.

Axes: M clusters, E experts, K experts an image is sent to.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moce_ds.moe.balance import balanced_scores, highest

TIE = 1e-6
"""Scores that differ by less are ties here: a stop at the tolerance, and rounding, may decide them otherwise."""


def softmax(scores_ME: np.ndarray) -> np.ndarray:
    exponential_ME = np.exp(scores_ME - scores_ME.max(axis=1, keepdims=True))
    return exponential_ME / exponential_ME.sum(axis=1, keepdims=True)


def log_domain(probs_ME: np.ndarray, share_M: np.ndarray) -> np.ndarray:
    """Sinkhorn-Knopp as a textbook has it: 200 updates of g in the log domain, eps 0.1."""
    scores_ME = np.log(np.maximum(probs_ME.astype(np.float64), 1e-30)) / 0.1
    for _ in range(200):
        load_E = share_M @ softmax(scores_ME)
        scores_ME = scores_ME + np.log(1 / probs_ME.shape[1] / np.maximum(load_E, 1e-30))
    return scores_ME


def imbalance(scores_ME: np.ndarray, share_M: np.ndarray) -> float:
    """The largest relative deviation of a load from an equal share."""
    return float(np.abs(share_M @ softmax(scores_ME) * scores_ME.shape[1] - 1).max())


@dataclass(frozen=True)
class Table:
    """Route probabilities, float32 as a gate computes them, and the shares of the clusters."""

    probs_ME: np.ndarray
    share_M: np.ndarray


def table(M: int, E: int, scale: float, lean: float, floor: float, unequal: float, seed: int) -> Table:
    """Logits of deviation `scale`, of which the first expert's are higher by `lean`; none below log(floor)."""
    random = np.random.default_rng(seed)
    logits_ME = scale * random.standard_normal((M, E)) + lean * (np.arange(E) == 0)
    probs_ME = np.maximum(softmax(logits_ME), floor).astype(np.float32)
    return Table(probs_ME, random.dirichlet(np.full(M, unequal)))


tables = st.builds(
    table,
    M=st.integers(1, 300),
    E=st.sampled_from([1, 2, 3, 8, 64]),
    scale=st.sampled_from([0.01, 0.3, 1.0, 3.0, 30.0]),
    lean=st.sampled_from([0.0, 3.0, 60.0, -60.0]),
    floor=st.sampled_from([0.0, 1e-30, 1e-12]),
    unequal=st.sampled_from([0.05, 2.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
HARD = Table(np.eye(8, dtype=np.float32)[np.arange(300) % 7], np.full(300, 1 / 300))


def certain(E: int) -> Table:
    """All clusters want the first expert and no other: the factors of the others reach 1e296."""
    return Table(np.tile(np.eye(E, dtype=np.float32)[:1], (16, 1)), np.arange(16) / 120)


@settings(max_examples=150, deadline=None)
@given(tables, st.integers(1, 3))
@example(HARD, 1)
@example(certain(2), 1)
@example(certain(64), 1)
def test_the_experts_are_those_of_two_hundred_iterations_in_the_log_domain(case: Table, k: int) -> None:
    k = min(k, case.probs_ME.shape[1])
    found_ME, reference_ME = (solve(case.probs_ME, case.share_M) for solve in (balanced_scores, log_domain))
    chosen_MK, order_ME = highest(found_ME, k), np.argsort(-reference_ME, axis=1, kind="stable")
    sorted_ME = np.take_along_axis(reference_ME, order_ME, axis=1)
    tied_M = (sorted_ME[:, :-1] - sorted_ME[:, 1:] < TIE)[:, :k].any(axis=1)
    np.testing.assert_array_equal(chosen_MK[~tied_M], order_ME[~tied_M, :k])
    # Where there is a tie, the chosen ones score as high.
    chosen_scores_MK = np.take_along_axis(reference_ME, chosen_MK, axis=1)
    np.testing.assert_allclose(chosen_scores_MK, sorted_ME[:, :k], atol=TIE)
    assert all(len(set(row)) == k for row in chosen_MK.tolist())
    assert imbalance(found_ME, case.share_M) <= max(1e-8, 1.001 * imbalance(reference_ME, case.share_M))


def test_ties_are_few_in_tables_of_a_gate() -> None:
    """The comparison above would show nothing if it called most rows ties."""
    case = table(300, 8, 1.0, 0.0, 0.0, 2.0, 0)
    sorted_ME = np.sort(log_domain(case.probs_ME, case.share_M), axis=1)
    assert (sorted_ME[:, -1] - sorted_ME[:, -2] > TIE).all()


def test_an_expert_that_nobody_wants_gets_its_share() -> None:
    """Its probabilities are 1e-8 of the others'."""
    random = np.random.default_rng(0)
    probs_ME = softmax(random.standard_normal((400, 4)) - 18.0 * (np.arange(4) == 0))
    scores_ME = balanced_scores(probs_ME, np.full(400, 1 / 400))
    assert np.bincount(highest(scores_ME, 1)[:, 0], minlength=4).min() > 80


def test_equal_scores_go_to_the_lower_expert_however_they_were_rounded() -> None:
    scores_ME = np.array([[0.5, 0.5 + 1e-13, 0.1, 0.5 - 1e-13], [-3.0, 0.7, 0.7 + 1e-12, 0.7]])
    assert highest(scores_ME, 3).tolist() == [[0, 1, 3], [1, 2, 3]]
    assert highest(scores_ME, 4)[0].tolist() == [0, 1, 3, 2]


def test_a_diverged_gate_still_gives_experts() -> None:
    """The step that follows is refused for its loss, not for an expert that does not exist."""
    scores_ME = balanced_scores(np.full((3, 4), np.nan, dtype=np.float32), np.full(3, 1 / 3))
    chosen_MK = highest(scores_ME, 2)
    assert ((chosen_MK >= 0) & (chosen_MK < 4)).all() and (chosen_MK[:, 0] != chosen_MK[:, 1]).all()
