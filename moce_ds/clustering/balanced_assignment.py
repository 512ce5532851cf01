"""Balanced assignment of points to clusters: optimal transport with an entropy term, by Newton's method on its dual,
streamed and distributed.

Maximise `Tr(Q^T F C^T) + eps H(Q)` over Q >= 0 whose rows sum to 1/n and whose columns sum to 1/m (docs/method.md,
"Clustering"; SeLa, Asano 2020; SwAV, Caron 2020). The optimum is `Q = softmax_M(F C^T / eps + g) / n`: the softmax
satisfies the row constraints, and one vector g is the only state. It minimises the convex semi-dual

    Phi(g) = mean_n logsumexp_M(F C^T / eps + g) - mean(g)      (Cuturi & Peyre 2018),

whose gradient is `c - 1/m` and whose Hessian is `diag(c) - n Q^T Q`, with the column sums c of Q. So Q is never stored:
features pass in blocks, and processes that each hold a part of the points exchange c and Q^T Q.

Phi is generalized self-concordant: its third derivative along d is at most `max(d) - min(d)` times its second. For a
Newton direction d with that range, the step `log(1 + range) / range` therefore always lowers Phi, and becomes a full
one near the optimum (Sun & Tran-Dinh 2019): no line search, and quadratic convergence at the end. Sinkhorn-Knopp, which
updates `g -= log(m c)`, has the same optimum; its rate nears 1 where clusters are well separated.

Axes: N points (of one block), M clusters, D feature width; [1 + M, M] holds c and the rows of Q^T Q.
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

_DAMPING, _ROUNDING = 1e-3, 10.0
"""Added to the diagonal of m times the Hessian: the first times the error, for columns that no point chooses, and the
second times the rounding error of the arithmetic, which must not make the Hessian indefinite."""


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
            take more iterations.
        tolerance: for `Solution.marginal_error`.
        duals_M: initial value; zero by default.
        watch: called after each pass with the marginal error.

    Raises:
        DataError: there are no points, or a feature is not finite. Every process raises it.
    """
    num_clusters, device = embeddings_MD.shape[0], embeddings_MD.device
    g_M = torch.zeros(num_clusters) if duals_M is None else duals_M
    g_M = g_M.to(device, torch.float64)
    rounding = _ROUNDING * torch.finfo(embeddings_MD.dtype).eps
    for iteration in range(max_iterations + 1):
        column_M, hessian_MM = _derivatives(blocks, embeddings_MD, g_M, eps, add_all)
        error = float((num_clusters * column_M - 1).abs().max())
        if not math.isfinite(error):
            raise DataError("Cannot balance clusters: there are no features, or some are not finite numbers.")
        watch(error)
        if error <= tolerance or iteration == max_iterations:
            break
        hessian_MM.diagonal().add_((_DAMPING * min(1.0, error) + rounding) / num_clusters)
        step_M = torch.linalg.solve(hessian_MM, 1 / num_clusters - column_M)
        extent = float(step_M.max() - step_M.min())
        g_M = g_M + step_M * (math.log1p(extent) / extent)
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

    The first solve anneals from a large eps down to `eps`, each stage starting from the previous g. That takes a third
    to two thirds of the iterations where some clusters are far from all points, and as many elsewhere (seen with 0.01
    and 0.025 on 25,600 points). The potential in the units of a cosine is eps g, so g grows as eps falls.

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


def _derivatives(
    blocks: Blocks, embeddings_MD: torch.Tensor, duals_M: torch.Tensor, eps: float, add_all: AddAll
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column sums of Q over all processes [M], and the Hessian of Phi [M, M]; float64."""
    num_clusters = len(duals_M)
    sums = torch.zeros(1 + num_clusters, num_clusters, dtype=torch.float64, device=duals_M.device)
    add_all((_sums(soft_assignment(rows_ND, embeddings_MD, duals_M, eps)) for rows_ND in blocks()), sums)
    sums /= sums[0].sum()  # rows of n Q sum to 1, so that is the number of points
    return sums[0], torch.diag(sums[0]) - sums[1:]


def _sums(shares_NM: torch.Tensor) -> torch.Tensor:
    """The column sums of n Q, and n^2 Q^T Q, of these points; float64 [1 + M, M]."""
    return torch.cat([shares_NM.sum(0, keepdim=True, dtype=torch.float64), (shares_NM.T @ shares_NM).double()])


def _weighted_sums(
    features_ND: torch.Tensor, embeddings_MD: torch.Tensor, duals_M: torch.Tensor, eps: float
) -> torch.Tensor:
    """The sums of these points weighted by the columns of n Q, [M, D]."""
    shares_NM = soft_assignment(features_ND, embeddings_MD, duals_M, eps)
    return shares_NM.T @ features_ND.to(embeddings_MD)
