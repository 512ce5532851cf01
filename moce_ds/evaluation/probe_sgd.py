"""Logistic regression in minibatches: one pass over the features updates a classifier of every strength.

It minimises what `probe.logistic_fits` minimises, without a copy of the features: memory grows with the batch and with
the number of classes, not with the number of images.

Axes: N images of a split, B images of a batch, D features, S strengths, K classes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from moce_ds.common.host.program import progress_bar
from moce_ds.distributed.runtime import Runtime
from moce_ds.evaluation.settings import SgdSettings

_ROWS = 8192
"""Rows of a block, where all images are read in order."""

_WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""


class Heads(NamedTuple):
    """Linear classifiers on standardised features, one for each strength.

    Attributes:
        mean_D, scale_D: of the images fitted on; features are standardised with them.
        weight_DSK, bias_SK: float32.
    """

    mean_D: Tensor
    scale_D: Tensor
    weight_DSK: Tensor
    bias_SK: Tensor

    @torch.inference_mode()
    def scores(self, strength: int, x_ND: NDArray[np.float32]) -> NDArray[np.floating]:
        """Scores [N, K] of the classifier at place `strength`."""
        weight_DK, bias_K = self.weight_DSK[:, strength], self.bias_SK[strength]
        parts = torch.from_numpy(x_ND).split(_ROWS)
        scores = [self.standardised(part_ND) @ weight_DK + bias_K for part_ND in parts]
        return np.asarray(torch.cat([part_NK.cpu() for part_NK in scores]).numpy())

    def standardised(self, x_ND: Tensor) -> Tensor:
        """Features with mean 0 and deviation 1, on the device of the classifiers."""
        return (x_ND.to(self.mean_D.device) - self.mean_D) / self.scale_D


def train_heads(
    x_ND: NDArray[np.float32],
    y: NDArray[np.integer],
    ids_N: NDArray[np.integer],
    strengths: Sequence[float],
    config: SgdSettings,
    seed: int,
    runtime: Runtime,
) -> Heads:
    """Classifiers fitted to some images by Adam, whose learning rate falls to 0 along a cosine.

    The loss of a classifier is the mean cross-entropy of its images plus `strength * ||W||^2 / 2`, which is convex.
    With targets, each class has a binary classifier and the mean of the images that count for it; the scores of a class
    that all or none of them show stay 0. Adam treats each weight alone, so the classifiers do not influence each other.

    A collective: every process takes a part of each batch, and all have the same classifiers up to rounding.

    Args:
        x_ND, y: features, and positions of classes [N] or targets [N, K], of all images.
        ids_N: the images to fit to.
        strengths: weights of the squared norms.
        seed: of the order of the images, which is drawn in every epoch.

    Source: training one classifier for each of several settings at once follows DINOv2 (Oquab et al. 2023).
    """
    x, labels, ids = torch.from_numpy(x_ND), torch.from_numpy(y), torch.from_numpy(ids_N)
    device = runtime.device
    shape = len(strengths), labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    weight_DSK = torch.zeros(x.shape[1], *shape, device=device, requires_grad=True)
    heads = Heads(*_statistics(x, ids, device), weight_DSK, torch.zeros(shape, device=device, requires_grad=True))
    penalty_SK = torch.tensor(strengths, device=device, dtype=torch.float32)[:, None] / 2
    weight_K = _class_weights(labels, ids).to(device) if labels.ndim == 2 else None
    optimizer = torch.optim.Adam([heads.weight_DSK, heads.bias_SK], lr=config.lr)
    batches, steps = _batches(ids, config, seed)
    schedule = LambdaLR(optimizer, lambda step: _schedule((step + 1) / steps))
    for ids_B in progress_bar(batches, "probe", total=steps, unit="step", delay=2, disable=not runtime.is_main):
        optimizer.zero_grad()
        own_B = ids_B[runtime.rank :: runtime.world_size]
        logits_BSK = heads.standardised(x[own_B]) @ weight_DSK.flatten(1)
        loss = _loss(logits_BSK.unflatten(1, shape) + heads.bias_SK, labels[own_B].to(device), weight_K) / len(ids_B)
        if runtime.is_main:  # once in the sum over all processes
            loss = loss + (penalty_SK * weight_DSK.square()).sum()
        loss.backward()
        for gradient in (heads.weight_DSK.grad, heads.bias_SK.grad):
            runtime.sum_tensor(cast(Tensor, gradient))
        optimizer.step()
        schedule.step()
    return heads


def _statistics(x_ND: Tensor, ids_N: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the features, float32 [D]; the deviation of a constant feature counts as 1."""
    sum_D, squares_D = torch.zeros(2, x_ND.shape[1], dtype=torch.float64, device=device)
    first_D = x_ND[ids_N[0]].to(device, torch.float64)  # a shift: squares of small differences lose no digits
    for part_N in ids_N.split(_ROWS):
        part_ND = x_ND[part_N].to(device).double() - first_D
        sum_D += part_ND.sum(dim=0)
        squares_D += part_ND.square().sum(dim=0)
    mean_D = sum_D / len(ids_N)
    variance_D = (squares_D / len(ids_N) - mean_D.square()).clamp(min=0)
    tiny_D = torch.finfo(torch.float32).eps ** 2 * (mean_D + first_D).square()
    scale_D = torch.where(variance_D > tiny_D, variance_D, torch.ones_like(variance_D)).sqrt()
    return (mean_D + first_D).float(), scale_D.float()


def _class_weights(targets_NK: Tensor, ids_N: Tensor) -> Tensor:
    """What an image counts for in the mean of each class, relative to one in the mean over all images; [K]."""
    targets = targets_NK[ids_N]
    counted_K, shown_K = (targets >= 0).sum(dim=0), (targets == 1).sum(dim=0)
    both_K = (shown_K > 0) & (shown_K < counted_K)
    return both_K * len(ids_N) / counted_K.clamp(min=1)


def _batches(ids_N: Tensor, config: SgdSettings, seed: int) -> tuple[Iterator[Tensor], int]:
    """Whole batches of every epoch, and their number."""
    random, batch = torch.Generator().manual_seed(seed), min(config.batch_size, len(ids_N))
    per_epoch = len(ids_N) // batch

    def drawn() -> Iterator[Tensor]:
        for _ in range(config.epochs):
            yield from ids_N[torch.randperm(len(ids_N), generator=random)].split(batch)[:per_epoch]

    return drawn(), config.epochs * per_epoch


def _schedule(done: float) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine to 0."""
    return min(1.0, done / _WARMUP) * 0.5 * (1 + math.cos(math.pi * done))


def _loss(logits_BSK: Tensor, labels: Tensor, weight_K: Tensor | None) -> Tensor:
    """The sum over strengths and images of the cross-entropy; labels are positions [B], or targets [B, K]."""
    strengths = logits_BSK.shape[1]
    if weight_K is None:
        of_each = labels.long().repeat_interleave(strengths)
        return cross_entropy(logits_BSK.flatten(0, 1), of_each, reduction="sum")
    targets_BSK = labels[:, None].expand_as(logits_BSK)
    weight_BSK = weight_K * (targets_BSK >= 0)
    goal_BSK = targets_BSK.clamp(min=0).float()
    return binary_cross_entropy_with_logits(logits_BSK, goal_BSK, weight_BSK, reduction="sum")
