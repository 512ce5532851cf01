"""Metrics of a task: top-1, mean accuracy per class, and VOC2007's 11-point mean average precision.

Labels are classes [N], or, where an image may show several classes, targets [N, K]: 1 shown, 0 not shown, -1 ignored
(VOC's "difficult").

Axes: N images, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.common.errors import DataError
from moce_ds.evaluation.settings import Metric

DISPLAY_NAMES: dict[str, str] = {"top1": "top-1", "mean_per_class": "mean per class", "map11": "11-point mAP"}


@dataclass(frozen=True)
class Score:
    """Accuracy on the test images of a task, and how it was measured.

    Attributes:
        top1: share of the test images with the right class, 0-1.
        mean_per_class: the same share per class, averaged over the classes present in the test split, 0-1.
        n_train: images in the training split, including the validation images.
        n_test: images in the test split.
        settings: settings and choices, such as k or the regularisation; JSON values only.
    """

    top1: float
    mean_per_class: float
    n_train: int
    n_test: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Values by metric."""
        return {"top1": self.top1, "mean_per_class": self.mean_per_class}


@dataclass(frozen=True)
class MultiLabelScore:
    """As `Score`, for a task whose images show several classes: 11-point mAP, 0-1."""

    map11: float
    n_train: int
    n_test: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Values by metric."""
        return {"map11": self.map11}


def top1(predicted_N: NDArray[np.integer], labels_N: NDArray[np.integer]) -> float:
    """Share of images with the right class, 0-1."""
    return float((predicted_N == labels_N).mean())


def mean_per_class(predicted_N: NDArray[np.integer], labels_N: NDArray[np.integer]) -> float:
    """The accuracy of each class, averaged over the classes in `labels_N`, 0-1."""
    _, class_N = np.unique(labels_N, return_inverse=True)
    per_class_K = np.bincount(class_N, weights=predicted_N == labels_N) / np.bincount(class_N)
    return float(per_class_K.mean())


def average_precision_11(scores_N: NDArray[np.floating], target_N: NDArray[np.integer]) -> float:
    """VOC2007's average precision of one class, 0-1: the mean over recalls r = 0, 0.1 ... 1 of the best precision at a
    recall of at least r. Images with target -1 are ignored. Among equal scores the earlier image ranks first.

    Recalls are compared as integers: 3 of 10 *is* a recall of 0.3, which floating point may round down.

    Raises:
        DataError: no image shows the class.

    Source: Everingham et al. 2010, section 4.2.
    """
    counted_N = target_N >= 0
    ranked = np.argsort(-scores_N[counted_N], kind="stable")
    shown = target_N[counted_N][ranked] == 1
    hits = np.cumsum(shown)
    if not shown.any():
        raise DataError("No test image shows the class: its average precision is not defined.")
    precision = hits / np.arange(1, len(shown) + 1)
    return float(np.mean([precision[10 * hits >= tenths * hits[-1]].max() for tenths in range(11)]))


def mean_average_precision_11(scores_NK: NDArray[np.floating], targets_NK: NDArray[np.integer]) -> float:
    """`average_precision_11` averaged over the classes that some image shows. Raises DataError if there is none."""
    shown = np.flatnonzero((targets_NK == 1).any(axis=0))
    if not len(shown):
        raise DataError("No test image shows any class: average precision is not defined.")
    return float(np.mean([average_precision_11(scores_NK[:, k], targets_NK[:, k]) for k in shown]))


def figure(metric: Metric, scores_NK: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """One metric of class scores; labels are positions [N], or targets [N, K]."""
    if metric == "map11":
        return mean_average_precision_11(scores_NK, labels)
    return class_figure(metric, scores_NK.argmax(axis=1), labels)


def class_figure(metric: Metric, predicted_N: NDArray[np.integer], labels_N: NDArray[np.integer]) -> float:
    """Top-1 or mean per class of predicted classes."""
    return {"top1": top1, "mean_per_class": mean_per_class}[metric](predicted_N, labels_N)


def judge(
    scores_NK: NDArray[np.floating], labels: NDArray[np.integer], n_train: int, settings: Mapping[str, Any]
) -> Score | MultiLabelScore:
    """All metrics of class scores; labels are positions [N], or targets [N, K]."""
    if labels.ndim == 2:
        return MultiLabelScore(mean_average_precision_11(scores_NK, labels), n_train, len(labels), settings)
    return Score(*figures_of(scores_NK.argmax(axis=1), labels), n_train, len(labels), settings)


def figures_of(predicted_N: NDArray[np.integer], labels_N: NDArray[np.integer]) -> tuple[float, float]:
    """Top-1 and mean per class, 0-1, of predicted classes."""
    return top1(predicted_N, labels_N), mean_per_class(predicted_N, labels_N)


def default_metric(labels: Tensor | NDArray[np.integer]) -> Metric:
    """Top-1, or 11-point mAP for targets [N, K]."""
    return "map11" if labels.ndim == 2 else "top1"


def accuracy_record(verb: str, task: str, model: str, score: Score | MultiLabelScore) -> dict[str, Any]:
    """A k-NN, probe or fine-tuning result as plain data."""
    return {
        "verb": verb,
        "task": task,
        "model": model,
        **score.figures,
        "n_train": score.n_train,
        "n_test": score.n_test,
        "settings": dict(score.settings),
    }
