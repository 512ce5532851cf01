"""A linear classifier trained as MAE's linear probe: BatchNorm without affine part, LARS, cosine schedule.

MAE draws new crops and flips in every epoch. Here the features of the centre crops are computed once, so that ninety
epochs take seconds and several learning rates can be compared.

Labels are positions [N], or targets [N, K] (see `metrics`).

Axes: N images, B images of a batch, D features, K classes.

Source: He et al. 2022 (arXiv 2111.06377), appendix A.1; LARS: You et al. 2017.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from moce_ds.compat import repair_torchvision
from moce_ds.evaluation.linear import Fit, Fits, Predict
from moce_ds.evaluation.settings import LarsSettings

repair_torchvision()
from timm.optim import Lars  # noqa: E402  (needs the repair)

_INIT_STD = 0.01
_NORM_EPS = 1e-6


def lars_fits(
    x_ND: NDArray[np.float32], y: NDArray[np.integer], base_lrs: Sequence[float], config: LarsSettings, seed: int
) -> Fits:
    """A classifier for each learning rate, all with the same initial weights and the same order of images."""
    x, labels = torch.from_numpy(x_ND), torch.from_numpy(y.astype(np.int64))
    for base_lr in base_lrs:
        yield Fit(base_lr, _train_classifier(x, labels, base_lr, config, seed))


def _train_classifier(x_ND: Tensor, labels: Tensor, base_lr: float, config: LarsSettings, seed: int) -> Predict:
    random = torch.Generator().manual_seed(seed)
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    head = nn.Linear(x_ND.shape[1], classes)
    nn.init.trunc_normal_(head.weight, std=_INIT_STD, generator=random)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(nn.BatchNorm1d(x_ND.shape[1], affine=False, eps=_NORM_EPS), head)
    # timm adapts groups without weight decay only on request; biases are never adapted, as in MAE's LARS.
    groups = [
        {"params": [head.weight], "always_adapt": True, "weight_decay": config.weight_decay},
        {"params": [head.bias]},
    ]
    optimizer = Lars(groups, lr=0.0, momentum=config.momentum, weight_decay=0.0)
    batch = min(config.batch_size, len(x_ND))
    steps = len(x_ND) // batch  # whole batches only: BatchNorm needs more than one image
    for epoch in range(config.epochs):
        order_N = torch.randperm(len(x_ND), generator=random)
        for step, ids_B in enumerate(order_N[: steps * batch].split(batch)):
            rate = base_lr * batch / 256 * _schedule(epoch + step / steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            _loss(model(x_ND[ids_B]), labels[ids_B]).backward()
            optimizer.step()
    model.eval()

    @torch.inference_mode()
    def predict(features_ND: NDArray[np.float32]) -> NDArray[np.floating]:
        scores: NDArray[np.floating] = model(torch.from_numpy(features_ND)).numpy()
        return scores

    return predict


def _schedule(epoch: float, config: LarsSettings) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine to 0."""
    warmup = min(config.warmup_epochs, config.epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (config.epochs - warmup)))


def _loss(logits_BK: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        return cross_entropy(logits_BK, labels)
    counted_BK = labels >= 0
    return binary_cross_entropy_with_logits(logits_BK[counted_BK], labels[counted_BK].float())
