"""Linear classifiers without a learning rate: logistic regression, and ridge regression in closed form.

Labels are positions [N], or targets [N, K] (see `metrics`).

Axes: N images, D features, K classes.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Predict = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""Features [N, D] -> scores [N, K]; the highest score is the predicted class."""

MAX_ITERATIONS = 500
"""Iterations of logistic regression, which converges earlier unless the regularisation is very weak."""


class Fit(NamedTuple):
    """A classifier fitted with one strength, and whether the fit converged."""

    strength: float
    predict: Predict
    converged: bool = True


Fits = Iterator[Fit]


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
