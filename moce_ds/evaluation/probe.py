"""Linear probe: a linear classifier on frozen features, with a strength chosen on validation images.

Four methods fit the classifier: logistic regression, by L-BFGS or in minibatches (`probe_sgd`), ridge regression in
closed form, and training with LARS.

Labels are classes [N], or targets [N, K] (see `metrics`); the functions that fit take positions of classes [N], or
targets.

Axes: N images of a split, B images of a batch, D features, K classes.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from moce_ds.common.compat import repair_torchvision
from moce_ds.common.errors import DataError
from moce_ds.distributed.runtime import Runtime
from moce_ds.evaluation.knn import check_split, positions
from moce_ds.evaluation.metrics import (
    Metric,
    MultiLabelScore,
    Score,
    class_figure,
    default_metric,
    figure,
    figures_of,
    judge,
)
from moce_ds.evaluation.probe_sgd import train_heads
from moce_ds.evaluation.settings import LarsSettings, ProbeSettings

repair_torchvision()
from timm.optim import Lars  # noqa: E402  (needs the repair)

MAX_ITERATIONS = 500
"""Iterations of logistic regression, which converges earlier unless the regularisation is very weak."""

_SCORED = 2**16
"""Images whose scores are in memory at a time, where only the predicted class counts."""

_INIT_STD = 0.01
_NORM_EPS = 1e-6

Predict = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""Features [N, D] -> scores [N, K]; the highest score is the predicted class."""


class Fit(NamedTuple):
    """A classifier fitted with one strength, and whether the fit converged."""

    strength: float
    predict: Predict
    converged: bool = True


Fits = Iterator[Fit]


def linear_probe(
    train_ND: Tensor,
    train_labels: Tensor,
    test_ND: Tensor,
    test_labels: Tensor,
    config: ProbeSettings | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    choose_by: Metric | None = None,
    runtime: Runtime | None = None,
) -> Score | MultiLabelScore:
    """Test accuracy of a linear classifier whose strength is chosen without the test split.

    Each strength (regularisation, or learning rate) is fitted on the training split and evaluated on `validation`. The
    best one (among equals, the stronger) is fitted on both and evaluated on the test split. Without `validation`, a
    part of the training split takes its place (stratified by class). Features are standardised with the statistics of
    the images fitted on. Deterministic for a given seed.

    Args:
        train_ND, test_ND: float32 features.
        train_labels, test_labels: integer class of each image [N], or targets [N, K].
        validation: features and labels of the images that choose the strength.
        choose_by: the metric for the choice; default: top-1, or 11-point mAP for targets.
        runtime: the processes that share the steps of `method=sgd`, on their devices; by default this process, on the
            CPU. The other methods run on the CPU, in every process.

    Raises:
        DataError: see `check_split`; also if no class has two training images and there is no `validation`.
    """
    config = config or ProbeSettings()
    check_split(train_ND, train_labels, test_ND, test_labels)
    if validation is None:
        held_N = held_out(train_labels.cpu().numpy(), config.validation_share, config.seed)
    else:
        check_split(train_ND, train_labels, *validation, test="validation")
        held_N = np.arange(len(train_ND) + len(validation[0])) >= len(train_ND)
        train_ND, train_labels = torch.cat([train_ND, validation[0]]), torch.cat([train_labels, validation[1]])
    x_ND, metric = train_ND.float().cpu().numpy(), choose_by or default_metric(train_labels)
    y, test_y = (labels.cpu().numpy() for labels in positions(train_labels, test_labels))
    final, settings = _fit_best(x_ND, y, held_N, metric, config, runtime or Runtime.alone(torch.device("cpu")))
    return _judged(final.predict, test_ND.float().cpu().numpy(), test_y, len(x_ND), settings)


def _judged(
    predict: Predict, x_ND: NDArray[np.float32], labels: NDArray[np.integer], n_train: int, settings: dict[str, Any]
) -> Score | MultiLabelScore:
    """As `judge`, of the scores of test images."""
    if labels.ndim == 2:
        return judge(predict(x_ND), labels, n_train, settings)
    predicted_N = _predicted(predict, x_ND, np.arange(len(x_ND)))
    return Score(*figures_of(predicted_N, labels), n_train, len(labels), settings)


def _predicted(predict: Predict, x_ND: NDArray[np.float32], ids_N: NDArray[np.integer]) -> NDArray[np.integer]:
    """The classes of some images, in parts: all scores at once would be [N, K]."""
    parts = (ids_N[first : first + _SCORED] for first in range(0, len(ids_N), _SCORED))
    return np.concatenate([predict(x_ND[part]).argmax(axis=1) for part in parts])


def _fit_best(
    x_ND: NDArray[np.float32],
    y: NDArray[np.integer],
    held_N: NDArray[np.bool_],
    metric: Metric,
    config: ProbeSettings,
    runtime: Runtime,
) -> tuple[Fit, dict[str, Any]]:
    """The classifier of the best strength, fitted on all images, and the record of the choice, as plain data.

    Args:
        held_N: the images that choose the strength.
    """
    figures, unfinished = {}, set()
    fitted, held = np.flatnonzero(~held_N), np.flatnonzero(held_N)
    for fit in _fits(config, x_ND, y, fitted, _strengths(config), runtime):
        if y.ndim == 2:
            figures[fit.strength] = figure(metric, fit.predict(x_ND[held]), y[held])
        else:
            figures[fit.strength] = class_figure(metric, _predicted(fit.predict, x_ND, held), y[held])
        unfinished |= set() if fit.converged else {fit.strength}
    best = max(figures, key=lambda strength: figures[strength])
    (final,) = _fits(config, x_ND, y, None, [best], runtime)
    unfinished |= set() if final.converged else {best}
    return final, {
        "method": config.method,
        "base_lr" if config.method == "lars" else "l2": best,
        f"validation_{metric}": figures[best],
        "n_validation": int(held_N.sum()),
        "seed": config.seed,
        **({"not_converged": sorted(unfinished)} if unfinished else {}),
    }


def _strengths(config: ProbeSettings) -> list[float]:
    """Strengths in order: the strongest regularisation, or the lowest learning rate, first."""
    return sorted(config.lars.base_lr) if config.method == "lars" else sorted(config.l2, reverse=True)


def _fits(
    config: ProbeSettings,
    x_ND: NDArray[np.float32],
    y: NDArray[np.integer],
    ids_N: NDArray[np.integer] | None,
    strengths: list[float],
    runtime: Runtime,
) -> Fits:
    """Classifiers fitted to the images `ids_N`, or to all."""
    if config.method == "sgd":  # it copies no features
        return sgd_fits(x_ND, y, np.arange(len(x_ND)) if ids_N is None else ids_N, strengths, config, runtime)
    if ids_N is not None:
        x_ND, y = x_ND[ids_N], y[ids_N]
    if config.method == "lars":
        return lars_fits(x_ND, y, strengths, config.lars, config.seed)
    return {"logistic": logistic_fits, "closed_form": ridge_fits}[config.method](x_ND, y, strengths)


def held_out(labels: NDArray[np.integer], share: float, seed: int) -> NDArray[np.bool_]:
    """True for a random `share` of the images, stratified if each has one label. Raises DataError."""
    if labels.ndim == 1:
        return stratified_mask(labels, share, seed)
    if len(labels) < 2:
        raise DataError("One training image cannot both train the probe and choose its strength: add more images.")
    count = min(max(1, round(share * len(labels))), len(labels) - 1)
    held_ids = np.random.default_rng(seed).permutation(len(labels))[:count]
    return np.isin(np.arange(len(labels)), held_ids)


def stratified_mask(labels_N: NDArray[np.integer], share: float, seed: int) -> NDArray[np.bool_]:
    """True for a random `share` of each class: at least one image and never all; none of a class with one image.

    Raises:
        DataError: no class has two images.
    """
    random = np.random.default_rng(seed)
    mask_N = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        members = random.permutation(np.flatnonzero(labels_N == label))
        mask_N[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    if not mask_N.any():
        raise DataError(
            "No class has two training images, so none can be set aside to choose the probe's strength; "
            "use k-NN (`moce knn`) on so small a task."
        )
    return mask_N


def logistic_fits(x_ND: NDArray[np.float32], y: NDArray[np.integer], strengths: Sequence[float]) -> Fits:
    """Multinomial logistic regression on standardised features; with targets, one classifier per class.

    The strength is the weight of `||W||^2 / 2` relative to the *mean* cross-entropy, so that it means the same for any
    N.
    """
    fit = _logistic if y.ndim == 1 else _one_by_one
    for strength in strengths:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ConvergenceWarning)
            predict = fit(x_ND, y, strength)
        others = [warning for warning in warned if not issubclass(warning.category, ConvergenceWarning)]
        for warning in others:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        yield Fit(strength, predict, converged=len(others) == len(warned))


def _logistic(x_ND: NDArray[np.float32], y_N: NDArray[np.integer], strength: float) -> Predict:
    # scikit-learn's C weighs the *sum* of the cross-entropy.
    classifier = LogisticRegression(C=1 / (strength * len(x_ND)), max_iter=MAX_ITERATIONS)
    fitted = make_pipeline(StandardScaler(), classifier).fit(x_ND, y_N)
    if len(fitted.classes_) == 2:  # scikit-learn gives the score of the second class only
        return lambda x: np.stack([np.zeros(len(x)), fitted.decision_function(x)], axis=1)
    return lambda x: fitted.decision_function(x)


def _one_by_one(x_ND: NDArray[np.float32], targets_NK: NDArray[np.integer], strength: float) -> Predict:
    """One classifier per class. Images with target -1 for a class are ignored; if all or none of the others show it,
    all scores are 0."""
    predicts: list[Predict | None] = []
    for target_N in targets_NK.T:
        counted_N = target_N >= 0
        both = len(np.unique(target_N[counted_N])) == 2
        predicts.append(_logistic(x_ND[counted_N], target_N[counted_N], strength) if both else None)
    return lambda x: np.stack([p(x)[:, 1] if p else np.zeros(len(x)) for p in predicts], axis=1)


def sgd_fits(
    x_ND: NDArray[np.float32],
    y: NDArray[np.integer],
    ids_N: NDArray[np.integer],
    strengths: Sequence[float],
    config: ProbeSettings,
    runtime: Runtime,
) -> Fits:
    """As `logistic_fits`, with `train_heads`, on the images `ids_N`. Two classes have one classifier, as there."""
    binary = y.ndim == 1 and int(y.max()) == 1
    heads = train_heads(x_ND, y[:, None] if binary else y, ids_N, strengths, config.sgd, config.seed, runtime)
    for place, strength in enumerate(strengths):
        predict = partial(heads.scores, place)
        yield Fit(strength, partial(_of_two, predict) if binary else predict)


def _of_two(predict: Predict, x_ND: NDArray[np.float32]) -> NDArray[np.floating]:
    return np.pad(predict(x_ND), ((0, 0), (1, 0)))  # the first class scores 0


def ridge_fits(x_ND: NDArray[np.float32], y: NDArray[np.integer], strengths: Sequence[float]) -> Fits:
    """Least squares to one-hot labels on standardised features, plus `l2 * ||W||^2` relative to the *mean* squared
    error.

    One eigendecomposition of the D x D covariance serves all strengths. Ignored targets count as 1/2.
    """
    scaler = StandardScaler().fit(x_ND)
    z_ND = scaler.transform(x_ND).astype(np.float64)
    goal_NK = np.eye(y.max() + 1)[y] if y.ndim == 1 else np.where(y < 0, 0.5, y)
    mean_K = goal_NK.mean(axis=0)
    values_D, vectors_DD = np.linalg.eigh(z_ND.T @ z_ND / len(z_ND))
    rotated_DK = vectors_DD.T @ (z_ND.T @ (goal_NK - mean_K) / len(z_ND))
    for strength in strengths:
        weight_DK = vectors_DD @ (rotated_DK / (values_D.clip(min=0) + strength)[:, None])
        yield Fit(strength, lambda x, weight_DK=weight_DK: scaler.transform(x) @ weight_DK + mean_K)  # type: ignore[misc]


def lars_fits(
    x_ND: NDArray[np.float32], y: NDArray[np.integer], base_lrs: Sequence[float], config: LarsSettings, seed: int
) -> Fits:
    """Classifiers trained as MAE's linear probe: BatchNorm without affine part, LARS, cosine schedule.

    All learning rates start from the same weights and see the same order of images. MAE draws new crops and flips in
    every epoch. Here the features of the centre crops are computed once, so that ninety epochs take seconds and
    several learning rates can be compared.

    Source: He et al. 2022 (arXiv 2111.06377), appendix A.1; LARS: You et al. 2017.
    """
    x, labels = torch.from_numpy(x_ND), torch.from_numpy(y.astype(np.int64))
    for base_lr in base_lrs:
        yield Fit(base_lr, _train_with_lars(x, labels, base_lr, config, seed))


def _train_with_lars(x_ND: Tensor, labels: Tensor, base_lr: float, config: LarsSettings, seed: int) -> Predict:
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
