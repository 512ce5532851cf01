"""Linear probe: a linear classifier on frozen features, with a strength chosen on validation images.

Labels are classes [N], or targets [N, K] (see `metrics`).

Axes: N images of a split, D features, K classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.errors import DataError
from moce_ds.evaluation.knn import check_split, positions
from moce_ds.evaluation.lars import lars_fits
from moce_ds.evaluation.linear import Fits, logistic_fits, ridge_fits
from moce_ds.evaluation.metrics import Metric, MultiLabelScore, Score, default_metric, figure, judge
from moce_ds.evaluation.settings import ProbeSettings


def linear_probe(
    train_ND: Tensor,
    train_labels: Tensor,
    test_ND: Tensor,
    test_labels: Tensor,
    config: ProbeSettings | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    choose_by: Metric | None = None,
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

    figures, unfinished = {}, set()
    for fit in _fits(config, x_ND[~held_N], y[~held_N], _strengths(config)):
        figures[fit.strength] = figure(metric, fit.predict(x_ND[held_N]), y[held_N])
        unfinished |= set() if fit.converged else {fit.strength}
    best = max(figures, key=lambda strength: figures[strength])
    (final,) = _fits(config, x_ND, y, [best])
    unfinished |= set() if final.converged else {best}
    settings = {
        "method": config.method,
        "base_lr" if config.method == "lars" else "l2": best,
        f"validation_{metric}": figures[best],
        "n_validation": int(held_N.sum()),
        "seed": config.seed,
        **({"not_converged": sorted(unfinished)} if unfinished else {}),
    }
    return judge(final.predict(test_ND.float().cpu().numpy()), test_y, len(x_ND), settings)


def _strengths(config: ProbeSettings) -> list[float]:
    """Strengths in order: the strongest regularisation, or the lowest learning rate, first."""
    return sorted(config.lars.base_lr) if config.method == "lars" else sorted(config.l2, reverse=True)


def _fits(config: ProbeSettings, x_ND: NDArray[np.float32], y: NDArray[np.integer], strengths: list[float]) -> Fits:
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
