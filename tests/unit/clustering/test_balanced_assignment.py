"""Balanced assignment: the optimum of docs/method.md, whatever the blocks, the order and the number of processes."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moce_ds.clustering.balanced_assignment import alone, balance, soft_assignment, soft_centroids, solve_duals
from moce_ds.clustering.kmeans import kmeans
from moce_ds.common.errors import DataError

EXACT = {"tolerance": 1e-10, "max_iterations": 20_000}


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def digits() -> torch.Tensor:
    """Pixels of 1,797 real digits, centred and normalised, float64."""
    from sklearn.datasets import load_digits  # Not in the processes of the test that starts two.

    pixels_ND = torch.from_numpy(load_digits().data)
    return unit(pixels_ND - pixels_ND.mean(0))


def random_problem(seed: int, n: int, m: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(unit(torch.randn(rows, dim, generator=generator, dtype=torch.float64)) for rows in (n, m))


def long_tailed(n: int = 6000, dim: int = 32, groups: int = 40, spread: float = 0.7) -> torch.Tensor:
    """A mixture whose k-th group has a share in proportion to 1/k, centred and normalised, float32."""
    generator = torch.Generator().manual_seed(0)
    of_point = torch.multinomial(1 / torch.arange(1, groups + 1), n, replacement=True, generator=generator)
    centres = torch.randn(groups, dim, generator=generator)
    points = centres[of_point] + spread * torch.randn(n, dim, generator=generator)
    return unit(points - points.mean(0))


def reference_plan(features_ND: torch.Tensor, embeddings_MD: torch.Tensor, eps: float) -> torch.Tensor:
    """log Q by alternating updates of both potentials on the whole matrix, float64."""
    kernel_NM = features_ND @ embeddings_MD.T / eps
    n, m = kernel_NM.shape
    row_N1, column_M = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    for _ in range(20_000):
        row_N1 = -np.log(n) - torch.logsumexp(kernel_NM + column_M, dim=1, keepdim=True)
        moved_M = -np.log(m) - torch.logsumexp(kernel_NM + row_N1, dim=0)
        if (moved_M - column_M).abs().max() < 1e-12:
            break
        column_M = moved_M
    return kernel_NM + row_N1 + moved_M


def objective(log_plan_NM: torch.Tensor, features_ND: torch.Tensor, embeddings_MD: torch.Tensor, eps: float) -> float:
    plan_NM = log_plan_NM.exp()
    return float((plan_NM * (features_ND @ embeddings_MD.T)).sum() - eps * (plan_NM * log_plan_NM).sum())


@pytest.mark.parametrize("eps", [0.025, 0.1])
def test_the_plan_is_that_of_a_direct_solver(eps: float) -> None:
    features_ND = digits()[:400]
    embeddings_MD = unit(features_ND[::40])
    solution = solve_duals(lambda: features_ND.split(64), embeddings_MD, eps, **EXACT)
    plan_NM = soft_assignment(features_ND, embeddings_MD, solution.duals_M, eps) / 400
    expected_NM = reference_plan(features_ND, embeddings_MD, eps).exp()
    assert solution.converged
    torch.testing.assert_close(plan_NM, expected_NM, rtol=1e-7, atol=1e-12)
    # The rule that labels new images reproduces the plan's own argmax.
    labels_N = (features_ND @ embeddings_MD.T / eps + solution.duals_M).argmax(1)
    assert torch.equal(labels_N, expected_NM.argmax(1))


def test_float32_finds_the_duals_of_float64() -> None:
    features_ND = digits()
    embeddings_MD = unit(features_ND[::60])
    wide = solve_duals(lambda: features_ND.split(500), embeddings_MD, 0.025, 1e-4, 5000)
    narrow = solve_duals(lambda: features_ND.float().split(500), embeddings_MD.float(), 0.025, 1e-4, 5000)
    assert narrow.converged and narrow.duals_M.dtype == torch.float64
    torch.testing.assert_close(narrow.duals_M, wide.duals_M, rtol=0, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 80),
    m=st.integers(1, 12),
    eps=st.floats(0.02, 1),
    rows=st.integers(1, 90),
)
def test_marginals_are_met_and_duals_have_mean_zero(seed: int, n: int, m: int, eps: float, rows: int) -> None:
    features_ND, embeddings_MD = random_problem(seed, n, m)
    solution = solve_duals(lambda: features_ND.split(rows), embeddings_MD, eps, 1e-3, 20_000)
    share_NM = soft_assignment(features_ND, embeddings_MD, solution.duals_M, eps)
    error = float((m * share_NM.mean(0) - 1).abs().max())
    assert solution.converged and error <= 1.001e-3
    assert error == pytest.approx(solution.marginal_error, abs=1e-9)
    assert abs(float(solution.duals_M.mean())) < 1e-9
    torch.testing.assert_close(share_NM.sum(1), torch.ones(n, dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_of_points_and_clusters_does_not_matter(seed: int) -> None:
    features_ND, embeddings_MD = random_problem(seed, 60, 7)
    points, clusters = (torch.randperm(k, generator=torch.Generator().manual_seed(seed)) for k in (60, 7))
    plain_MD, plain = balance(lambda: [features_ND], embeddings_MD, 0.1, 1e-9, 20_000, rounds=2)
    moved_MD, moved = balance(
        lambda: features_ND[points].split(17), embeddings_MD[clusters], 0.1, 1e-9, 20_000, rounds=2
    )
    torch.testing.assert_close(moved.duals_M, plain.duals_M[clusters], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved_MD, plain_MD[clusters], rtol=0, atol=1e-6)


def test_columns_out_of_reach_of_float32_are_filled() -> None:
    features_ND, embeddings_MD = (tensor.float() for tensor in random_problem(3, 200, 6, dim=2))
    embeddings_MD[0] = -unit(features_ND.mean(0))
    features_ND[(features_ND @ embeddings_MD[0]) > -0.5] = -embeddings_MD[0]
    eps = 0.004  # exp(-1.5 / eps) is far below float32.
    start_NM = soft_assignment(features_ND, embeddings_MD, torch.zeros(6), eps)
    assert start_NM.sum(0)[0] == 0
    solution = solve_duals(lambda: features_ND.split(64), embeddings_MD, eps, 1e-2, 5000)
    assert solution.converged and solution.duals_M.isfinite().all()


def test_re_estimating_centroids_never_lowers_the_objective() -> None:
    features_ND, embeddings_MD, eps = digits()[:500], unit(digits()[:500][::50]), 0.05
    values = []
    for rounds in range(4):
        now_MD, solution = balance(lambda: features_ND.split(128), embeddings_MD, eps, rounds=rounds, **EXACT)
        log_plan_NM = soft_assignment(features_ND, now_MD, solution.duals_M, eps).log() - np.log(500)
        values.append(objective(log_plan_NM, features_ND, now_MD, eps))
        torch.testing.assert_close(now_MD.norm(dim=1), torch.ones(10, dtype=torch.float64))
    assert all(later > earlier + 1e-4 for earlier, later in pairwise(values)), values


def test_a_cluster_whose_points_cancel_stays() -> None:
    features_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    embeddings_MD = torch.tensor([[0.0, 1.0]])
    assert torch.equal(soft_centroids(lambda: [features_ND], embeddings_MD, torch.zeros(1), 0.1), embeddings_MD)


def test_hard_sizes_of_a_long_tail_are_far_closer_to_balance_than_those_of_k_means() -> None:
    features_ND = long_tailed()
    centroids_MD = torch.from_numpy(kmeans(features_ND.numpy(), 48, seed=0, iterations=15))
    embeddings_MD, solution = balance(lambda: features_ND.split(2048), centroids_MD, 0.025, 0.01, 2000, rounds=1)

    def relative_sizes(embeddings_MD: torch.Tensor, duals_M: torch.Tensor) -> torch.Tensor:
        labels_N = (features_ND @ embeddings_MD.T / 0.025 + duals_M).argmax(1)
        return torch.bincount(labels_N, minlength=48) / (6000 / 48)

    unbalanced_M = relative_sizes(centroids_MD, torch.zeros(48))
    balanced_M = relative_sizes(embeddings_MD, solution.duals_M.float())
    assert solution.converged
    assert (balanced_M - 1).square().mean().sqrt() < 0.4 * (unbalanced_M - 1).square().mean().sqrt()
    assert balanced_M.min() > 0.4 and balanced_M.max() < 2.0


def test_well_separated_clusters_take_few_passes() -> None:
    """Sinkhorn's updates take more than 1,000: points hardly move between clusters that are far apart."""
    features_ND = long_tailed(dim=128, spread=0.4)
    centroids_MD = torch.from_numpy(kmeans(features_ND.numpy(), 24, seed=0, iterations=15))
    passes: list[float] = []
    _, solution = balance(lambda: features_ND.split(2048), centroids_MD, 0.01, 0.01, 1000, 0, watch=passes.append)
    assert solution.converged and len(passes) < 40, passes


def test_not_converging_is_reported() -> None:
    features_ND, embeddings_MD = random_problem(0, 200, 10)
    errors: list[float] = []
    solution = solve_duals(lambda: [features_ND], embeddings_MD, 0.02, 1e-9, 3, watch=errors.append)
    assert not solution.converged and solution.iterations == 3
    assert len(errors) == 4 and solution.marginal_error == errors[-1] > 1e-9
    again = solve_duals(lambda: [features_ND], embeddings_MD, 0.02, 1e-9, 0, duals_M=solution.duals_M)
    assert again.marginal_error == pytest.approx(solution.marginal_error)


@pytest.mark.parametrize("blocks", [[], [torch.full((3, 8), torch.nan)]])
def test_no_points_and_no_numbers_are_refused(blocks: list[torch.Tensor]) -> None:
    with pytest.raises(DataError, match="no features, or some are not finite"):
        solve_duals(lambda: blocks, random_problem(0, 3, 2)[1], 0.05, 1e-3, 10)


def test_a_solution_for_similar_points_is_a_better_start_than_annealing() -> None:
    features_ND = digits()
    embeddings_MD, passes = unit(features_ND[::60]), list[float]()
    start = solve_duals(lambda: [features_ND[::2]], embeddings_MD, 0.025, 1e-2, 5000)
    annealed: list[float] = []
    _, expected = balance(lambda: [features_ND], embeddings_MD, 0.025, 1e-2, 5000, 0, watch=annealed.append)
    _, found = balance(
        lambda: [features_ND], embeddings_MD, 0.025, 1e-2, 5000, 0, watch=passes.append, duals_M=start.duals_M
    )
    assert found.converged and expected.converged and len(passes) < len(annealed)


def balance_digits(features_ND: torch.Tensor, start_MD: torch.Tensor, **add_all: Any) -> Any:
    return balance(lambda: features_ND.split(256), start_MD, 0.03, 1e-3, 3000, rounds=2, **add_all)


def _add_over_both(parts: Iterable[torch.Tensor], total: torch.Tensor) -> None:
    alone(parts, total)
    dist.all_reduce(total)


def _one_of_two(rank: int, folder: str, parts: tuple[torch.Tensor, ...], start_MD: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    embeddings_MD, solution = balance_digits(parts[rank], start_MD, add_all=_add_over_both)
    torch.save([embeddings_MD, solution.duals_M, torch.tensor(solution.iterations)], f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    features_ND = digits().float()
    start_MD = features_ND[::90].double()  # float64 throughout: what is compared is the reduction, not rounding
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), features_ND.split([500, 1297]), start_MD), nprocs=2)
    of_rank = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    embeddings_MD, solution = balance_digits(features_ND, start_MD)
    assert all(torch.equal(a, b) for a, b in zip(*of_rank, strict=True))
    torch.testing.assert_close(of_rank[0][1], solution.duals_M, rtol=0, atol=1e-9)
    torch.testing.assert_close(of_rank[0][0], embeddings_MD, rtol=0, atol=1e-9)
    assert int(of_rank[0][2]) == solution.iterations
