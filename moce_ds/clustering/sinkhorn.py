"""Balanced assignment of points to clusters by Sinkhorn-Knopp, in the log domain, streamed and distributed.

Maximise `Tr(Q^T F C^T) + eps H(Q)` over Q >= 0 whose rows sum to 1/n and whose columns sum to 1/m (docs/method.md,
"Clustering"; SeLa, Asano 2020; SwAV, Caron 2020). The optimum is `Q = softmax_M(F C^T / eps + g) / n`: the softmax
satisfies the row constraints, and one vector g is the only state. It is updated by `g -= log(m * column sums)` until
the columns satisfy theirs. So Q is never stored: features pass in blocks, and processes that each hold a part of the
points exchange one M-vector per block and iteration.

Axes: N points (of one block), M clusters, D feature width.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from moce_ds.common.errors import DataError

Blocks = Callable[[], Iterable[torch.Tensor]]
"""Starts a pass over this process's points: blocks [N, D] of L2-normalised features."""

AddAll = Callable[[Iterable[torch.Tensor], torch.Tensor], object]
"""Adds the tensors of this process's blocks, and those of the other processes, to a tensor, in place. The sum has the
same bits on all processes."""


_FIRST_EPS, _STAGE_FACTOR, _STAGE_TOLERANCE = 0.2, 0.25, 0.1


@dataclass(frozen=True)
class Solution:
    """Result of the solver.

    Attributes:
        duals_M: float64, g with mean 0 (adding a constant to g changes nothing); `label = argmax(f.C / eps + g)`.
        iterations: number of updates of g.
        marginal_error: largest `|m * column sum - 1|` at `duals_M`, 0 being perfect balance.
        converged: whether `marginal_error` is within the tolerance.
    """

    duals_M: torch.Tensor
    iterations: int
    marginal_error: float
    converged: bool


def alone(parts: Iterable[torch.Tensor], total: torch.Tensor) -> None:
    """The sum of a single process."""
    for part in parts:
        total += part


def unwatched(marginal_error: float) -> None:
    """A watcher that does nothing."""


def soft_assignment(
    features_ND: torch.Tensor, embeddings_MD: torch.Tensor, duals_M: torch.Tensor, eps: float
) -> torch.Tensor:
    """n Q for these points, [N, M]: rows sum to 1. Dtype and device are those of `embeddings_MD`."""
    logits_NM = features_ND.to(embeddings_MD) @ embeddings_MD.T / eps + duals_M.to(embeddings_MD)
    return logits_NM.softmax(dim=1)


def solve_duals(
    blocks: Blocks,
    embeddings_MD: torch.Tensor,
    eps: float,
    tolerance: float,
    max_iterations: int,
    duals_M: torch.Tensor | None = None,
    add_all: AddAll = alone,
    watch: Callable[[float], None] = unwatched,
) -> Solution:
    """Find g for fixed clusters.

    Missing convergence within `max_iterations` is not an error; see `Solution.converged`.

    Args:
        blocks: this process's points; called once per iteration.
        embeddings_MD: L2-normalised. The arithmetic runs in its dtype and on its device; sums are float64.
        eps: weight of the entropy, in the units of a cosine. Smaller values give more balanced *hard* sizes but
            converge slower.
        tolerance: for `Solution.marginal_error`.
        duals_M: initial value; zero by default.
        watch: called after each pass with the marginal error.

    Raises:
        DataError: there are no points, or a feature is not finite. Every process raises it.
    """
    num_clusters, device = embeddings_MD.shape[0], embeddings_MD.device
    g_M = torch.zeros(num_clusters) if duals_M is None else duals_M
    g_M = g_M.to(device, torch.float64)
    # A column without points sums to 0 in this precision; its logarithm is clamped here and g keeps rising.
    smallest = torch.finfo(embeddings_MD.dtype).tiny
    for iteration in range(max_iterations + 1):
        balance_M = num_clusters * _column_sums(blocks, embeddings_MD, g_M, eps, add_all)
        error = float((balance_M - 1).abs().max())
        if not math.isfinite(error):
            raise DataError("Cannot balance clusters: there are no features, or some are not finite numbers.")
        watch(error)
        if error <= tolerance or iteration == max_iterations:
            break
        g_M = g_M - balance_M.clamp_min(smallest).log()
        g_M = g_M - g_M.mean()
    return Solution(g_M - g_M.mean(), iteration, error, error <= tolerance)


def soft_centroids(
    blocks: Blocks,
    embeddings_MD: torch.Tensor,
    duals_M: torch.Tensor,
    eps: float,
    add_all: AddAll = alone,
) -> torch.Tensor:
    """C from Q: the mean of the points weighted by the columns of Q, L2-normalised; [M, D], as `embeddings_MD`."""
    sums_MD = torch.zeros_like(embeddings_MD, dtype=torch.float64)
    add_all((_weighted_sums(features_ND, embeddings_MD, duals_M, eps) for features_ND in blocks()), sums_MD)
    norms_M1 = sums_MD.norm(dim=1, keepdim=True)
    # Points that cancel exactly have no direction: such a cluster keeps its centroid.
    return torch.where(norms_M1 > 0, sums_MD / norms_M1, embeddings_MD.double()).to(embeddings_MD)


def balance(
    blocks: Blocks,
    embeddings_MD: torch.Tensor,
    eps: float,
    tolerance: float,
    max_iterations: int,
    rounds: int,
    add_all: AddAll = alone,
    watch: Callable[[float], None] = unwatched,
    duals_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Solution]:
    """Solve for g, then `rounds` times re-estimate C from Q and solve again from the previous g.

    The first solve anneals from a large eps down to `eps`, each stage starting from the previous g. With small eps this
    takes a third to a seventh of the iterations (seen with 0.01, 0.005 and 0.002 on 7,583 clumped points). The
    potential in the units of a cosine is eps g, so g grows as eps falls.

    Args:
        duals_M: the solution for similar points; the first solve starts from it, without annealing.

    Returns:
        embeddings_MD and the solution for them. Arguments and errors as `solve_duals`.
    """
    for stage in _stages(eps) if duals_M is None else ():
        rough = solve_duals(blocks, embeddings_MD, stage, _STAGE_TOLERANCE, max_iterations, duals_M, add_all, watch)
        duals_M = rough.duals_M * (stage / max(stage * _STAGE_FACTOR, eps))
    solution = solve_duals(blocks, embeddings_MD, eps, tolerance, max_iterations, duals_M, add_all, watch)
    for _ in range(rounds):
        embeddings_MD = soft_centroids(blocks, embeddings_MD, solution.duals_M, eps, add_all)
        solution = solve_duals(blocks, embeddings_MD, eps, tolerance, max_iterations, solution.duals_M, add_all, watch)
    return embeddings_MD, solution


def _stages(eps: float) -> list[float]:
    """The decreasing values of eps to anneal through, all larger than `eps`."""
    stages = [_FIRST_EPS]
    while stages[-1] * _STAGE_FACTOR > eps:
        stages.append(stages[-1] * _STAGE_FACTOR)
    return [stage for stage in stages if stage > eps]


def _column_sums(
    blocks: Blocks, embeddings_MD: torch.Tensor, duals_M: torch.Tensor, eps: float, add_all: AddAll
) -> torch.Tensor:
    """Column sums of Q over all processes, float64 [M]. Rows of n Q sum to 1, so the total is the number of points."""
    sums_M = torch.zeros_like(duals_M)
    shares = (soft_assignment(features_ND, embeddings_MD, duals_M, eps) for features_ND in blocks())
    add_all((shares_NM.sum(0, dtype=torch.float64) for shares_NM in shares), sums_M)
    return sums_M / sums_M.sum()


def _weighted_sums(
    features_ND: torch.Tensor, embeddings_MD: torch.Tensor, duals_M: torch.Tensor, eps: float
) -> torch.Tensor:
    """The sums of these points weighted by the columns of n Q, [M, D]."""
    shares_NM = soft_assignment(features_ND, embeddings_MD, duals_M, eps)
    return shares_NM.T @ features_ND.to(embeddings_MD)
