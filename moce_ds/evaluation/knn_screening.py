"""Exact nearest neighbours on a CPU with fast int8 products: int8 scores rule out most images, float32 decides.

A score is the product of a test and a training feature in int8. It differs from their cosine by no more than a bound
that follows from the actual rounding of both. An image whose score is further below the k-th best cosine so far than
the bound is no neighbour. All others are candidates, and only their cosines are computed in float32.

Axes: N test images, Q test images of a block, T training images of a tile, S of a strip, H groups of scores
that hold G scores each, P pairs of a test and a training image, D features, k neighbours.
"""

import warnings
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

TEST_BLOCK, STRIP, GROUP = 8192, 512, 64
"""Test and training images that are scored at a time (16 MiB of scores), and scores whose maximum is compared first."""

MOST_CANDIDATES = 1 / 32
"""Share of the pairs of a strip from which on comparing all of them is faster."""

WIDEST = 2**16
"""Most features: the sum of their products, at most 255 * 127 each inside of the int8 product, fits int32."""


def is_fast(width: int) -> bool:
    """Whether this CPU has int8 products (VNNI) of features of this width that are exact and fast."""
    # `_int_mm` is private. Products in bfloat16 are public, but alone take as long as all of this.
    return bool(torch.cpu.get_capabilities().get("avx512_vnni")) and hasattr(torch, "_int_mm") and width <= WIDEST


class _Rounded(NamedTuple):
    """Rows in int8: `scale` times the integers is nearly the row; with the norms of the row and of the difference."""

    integers: Tensor
    scale: Tensor
    norm: Tensor
    error: Tensor


class Screening:
    """Compares test images with tiles of training images, given the k-th best cosine so far.

    Args:
        test_ND: normalised float32 features.
        centre_D: is subtracted from training features before they are rounded. Any vector gives correct results. The
            mean gives the tightest bound: features that have much in common are rounded more finely.
    """

    def __init__(self, test_ND: Tensor, centre_D: Tensor) -> None:
        self._test_ND, self._centre_D = test_ND, centre_D
        self._rounded = _round(test_ND, test_ND.abs().amax(dim=1, keepdim=True))
        self._offset_N = test_ND @ centre_D
        # Float32 sums of D products err by up to D * eps / 2 times the norms, 1: two cosines, the offset, and the
        # norms in the bound.
        self._slack = 4 * (test_ND.shape[1] + 16) * torch.finfo(torch.float32).eps
        self.pays = True
        """False after a tile with most strips compared without screening; other ways are then faster."""

    def in_tile(self, train_TD: Tensor, worst_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and places of the images of a tile that are nearer than `worst_N`, the k-th best cosine so far.

        At most k, [N, k] each, in any order; the cosine of a missing one is -inf.
        """
        strips = [(strip_SD, self._round_strip(strip_SD)) for strip_SD in train_TD.split(STRIP)]
        found, screened = [], []
        for first in range(0, len(worst_N), TEST_BLOCK):
            block = slice(first, first + TEST_BLOCK)
            test_QD, worst_Q, pairs = self._test_ND[block], worst_N[block], []
            for index, (strip_SD, rounded) in enumerate(strips):
                candidates = self._candidates(block, rounded, worst_Q)
                screened.append(candidates is not None)
                row_P, place_P = _best_of_all(test_QD, strip_SD, k) if candidates is None else candidates
                cosine_P = _cosines(test_QD, strip_SD, row_P, place_P)
                better_P = cosine_P > worst_Q[row_P]
                pairs.append((row_P[better_P], place_P[better_P] + index * STRIP, cosine_P[better_P]))
            row_P, place_P, cosine_P = (torch.cat(part) for part in zip(*pairs, strict=True))
            found.append(_best(row_P, place_P, cosine_P, len(test_QD), k))
        self.pays = 2 * sum(screened) >= len(screened)
        return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])

    def _round_strip(self, strip_SD: Tensor) -> _Rounded:
        """A strip has one scale, so that its scores compare with one threshold per test image."""
        centred_SD = strip_SD - self._centre_D
        return _round(centred_SD, centred_SD.abs().max())

    def _candidates(self, block: slice, strip: _Rounded, worst_Q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows and places of the pairs that may be nearer than `worst_Q`; None if these are too many."""
        test = _Rounded(*(part[block] for part in self._rounded))
        # |<q, t> - <q', t'>| <= |q| |t - t'| + |q - q'| |t'|, and |t'| <= |t| + |t - t'|.
        bound_Q = test.norm * (strip.error.max() + self._slack) + test.error * (strip.norm.max() + strip.error.max())
        least_Q = (worst_Q - self._offset_N[block] - bound_Q).double() / (test.scale[:, 0].double() * strip.scale)
        least_Q = least_Q.floor().clamp(-(2**31), 2**31 - 1).int()
        scores_QS = torch._int_mm(test.integers, strip.integers.T)
        return _at_least(scores_QS, least_Q, int(MOST_CANDIDATES * scores_QS.numel()))


def _at_least(scores_QS: Tensor, least_Q: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Rows and places of scores of at least `least_Q`; None if these are more than `most`.

    Maxima of groups are compared first: this takes a third of the time that comparing all scores does.
    """
    size = scores_QS.shape[1]
    group = gcd(size, GROUP)
    scores_HG = scores_QS.view(-1, group)
    hit_H = (scores_HG.amax(dim=1).view(len(least_Q), -1) >= least_Q[:, None]).view(-1).nonzero()[:, 0]
    if len(hit_H) > most:
        return None
    row_H = hit_H * group // size
    index_P, within_P = (scores_HG.index_select(0, hit_H) >= least_Q[row_H, None]).nonzero(as_tuple=True)
    return (row_H[index_P], (hit_H[index_P] * group + within_P) % size) if len(index_P) <= most else None


def _round(rows_ND: Tensor, largest: Tensor) -> _Rounded:
    """Rows in int8; `largest` is the largest magnitude, of each row [N, 1] or of all."""
    scale = largest.clamp(min=1e-30) / 127
    near_ND = (rows_ND / scale).round_()
    error_N = vector_norm(rows_ND - near_ND * scale, dim=1)
    return _Rounded(near_ND.to(torch.int8), scale, vector_norm(rows_ND, dim=1), error_N)


def _cosines(test_QD: Tensor, strip_SD: Tensor, row_P: Tensor, place_P: Tensor) -> Tensor:
    """The cosine of each pair; the pairs are sorted by row."""
    ends_Q1 = torch.searchsorted(row_P, torch.arange(len(test_QD) + 1))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # CSR tensors "are in beta state"
        pairs_QS = torch.sparse_csr_tensor(ends_Q1, place_P, torch.zeros(len(row_P)), (len(test_QD), len(strip_SD)))
    cosines: Tensor = torch.sparse.sampled_addmm(pairs_QS, test_QD, strip_SD.T, beta=0).values()
    return cosines


def _best_of_all(test_QD: Tensor, strip_SD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows and places of the k best of a strip for each test image, all compared in float32."""
    k = min(k, len(strip_SD))
    place_Qk = (test_QD @ strip_SD.T).topk(k, dim=1).indices.sort(dim=1).values
    return torch.arange(len(test_QD)).repeat_interleave(k), place_Qk.view(-1)


def _best(row_P: Tensor, place_P: Tensor, cosine_P: Tensor, rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and places of at most k pairs of each row, [rows, k] each, most similar first."""
    order_P = cosine_P.argsort(descending=True, stable=True)
    order_P = order_P[row_P[order_P].argsort(stable=True)]
    row_P = row_P[order_P]
    first_Q = torch.searchsorted(row_P, torch.arange(rows))
    rank_P = torch.arange(len(row_P)) - first_Q[row_P]
    kept_P = rank_P < k
    at = row_P[kept_P], rank_P[kept_P]
    values = torch.full((rows, k), -torch.inf).index_put_(at, cosine_P[order_P][kept_P])
    return values, torch.zeros(rows, k, dtype=torch.long).index_put_(at, place_P[order_P][kept_P])
