"""Balanced choice of experts: Sinkhorn-Knopp on the route table of one layer, on the host.

The table has a few hundred rows. On a GPU its iterations are thousands of small kernels; on a host core they take a few
milliseconds. The result is a function of the probabilities alone, without a start from the step before: so it does not
depend on where a run was resumed, and a checkpoint, an export and every rank find the same experts.

Axes: M clusters, E experts, K experts per image.
"""

import numpy as np
from numpy.typing import NDArray

_EPS = 0.1
_ITERATIONS = 200
_TOLERANCE = 1e-9  # of loads, relative to an equal share
_SMALLEST = 1e-30  # probability, and load
_DECIMALS = 9  # of scores that are compared


def balanced_scores(probs_ME: NDArray[np.floating], share_M: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scores `log P / eps + g` whose softmax loads all experts equally, [M, E]; a cluster's scores share a constant.

    Each iteration updates the duals of the columns: `g += log((1 / E) / load)`. It works with the factors `exp(g)` and
    the kernel `exp(log P / eps)`: two matrix-vector products. Both remain in the range of float64: the kernel is at
    least 1e-30^10, and the factors need not exceed the inverse.

    Iterations end when the loads are equal, or after 200: tables that are nearly hard converge in thousands, and the
    fixed table of a random gate would not remain itself.

    Args:
        probs_ME: route probabilities; those below 1e-30 count as 1e-30.
        share_M: share of the images in each cluster, summing to 1.
    """
    num_experts = probs_ME.shape[1]
    scores_ME = np.log(np.maximum(probs_ME.astype(np.float64), _SMALLEST)) / _EPS
    kernel_ME = np.exp(scores_ME - scores_ME.max(axis=1, keepdims=True))
    share_M = share_M.astype(np.float64)
    factor_E = np.ones(num_experts)
    for _ in range(_ITERATIONS):
        load_E = factor_E * ((share_M / (kernel_ME @ factor_E)) @ kernel_ME)
        factor_E = factor_E / (num_experts * np.maximum(load_E, _SMALLEST))
        if np.abs(num_experts * load_E - 1).max() < _TOLERANCE:
            break
    return scores_ME + np.log(factor_E)


def highest(scores_ME: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The K experts of highest score, [M, K], the highest first.

    Of scores that are equal to nine decimals, the lower expert comes first. So processors that round differently agree
    where a table is symmetric.
    """
    scores_ME = scores_ME.round(_DECIMALS)
    chosen_MK = np.empty((len(scores_ME), k), dtype=np.int64)
    for place in range(k):
        best_M1 = scores_ME.argmax(axis=1, keepdims=True)
        chosen_MK[:, place] = best_M1[:, 0]
        np.put_along_axis(scores_ME, best_M1, -np.inf, axis=1)
    return chosen_MK
