"""Metrics of a task, against numbers worked out by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from moce_ds.common.errors import DataError
from moce_ds.evaluation.metrics import (
    MultiLabelScore,
    Score,
    average_precision_11,
    figure,
    judge,
    mean_average_precision_11,
    mean_per_class,
    top1,
)


def ranked(*targets: int) -> float:
    """Average precision of images given from the highest score to the lowest."""
    return average_precision_11(-np.arange(len(targets), dtype=float), np.array(targets))


def test_accuracies_equal_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 7, 300), random.integers(0, 7, 300)
    predicted[:150] = labels[:150]
    labels[labels == 3], predicted[10] = 4, 3  # a class that no test image has
    assert top1(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert mean_per_class(predicted, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_eleven_points_by_hand() -> None:
    assert ranked(1, 1, 0, 0) == 1.0
    # Recall 1/2 with precision 1, recall 1 with precision 2/4: six recalls (0 to 0.5) and five (0.6 to 1).
    assert ranked(1, 0, 0, 1) == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    # Precisions 1/2, 2/3, 3/5 at recalls 1/3, 2/3, 1: the best one at a recall of *at least* r counts.
    assert ranked(0, 1, 1, 0, 1) == pytest.approx((7 * 2 / 3 + 4 * 3 / 5) / 11)


def test_a_recall_of_three_tenths_is_reached_by_three_of_ten() -> None:
    """In floating point 3 * 0.1 > 0.3: the recall 0.3 would be missed and precision at 4 of 10 taken instead."""
    targets = [1, 1, 1, *[0] * 97, *[1] * 7]
    late = [(3 + n) / (100 + n) for n in range(1, 8)]
    assert ranked(*targets) == pytest.approx((4 * 1 + 7 * max(late)) / 11)


def test_images_that_are_not_counted_change_nothing() -> None:
    assert ranked(-1, 1, -1, 0, -1, 0, 1, -1) == ranked(1, 0, 0, 1)


def test_of_equal_scores_the_earlier_image_ranks_first() -> None:
    assert average_precision_11(np.zeros(4), np.array([1, 0, 0, 1])) == ranked(1, 0, 0, 1)
    assert average_precision_11(np.zeros(2), np.array([0, 1])) == 0.5


def test_classes_that_no_image_shows_are_left_out_of_the_mean() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.1, 0.3, 0.5], [0.2, 0.4, 0.5]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1], [1, 0, 0]])
    expected = ((6 * 1 + 5 * 2 / 3) / 11 + 1 / 3) / 2
    assert mean_average_precision_11(scores, targets) == pytest.approx(expected)
    assert judge(scores, targets, 8, {"k": 1}) == MultiLabelScore(pytest.approx(expected), 8, 4, {"k": 1})
    assert figure("map11", scores, targets) == pytest.approx(expected)
    with pytest.raises(DataError, match="No test image shows any class"):
        mean_average_precision_11(scores, targets * 0)
    with pytest.raises(DataError, match="No test image shows the class"):
        average_precision_11(scores[:, 2], targets[:, 2])


def test_scores_of_single_labels_are_judged_by_the_highest() -> None:
    scores, labels = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]), np.array([0, 1, 1, 0])
    found = judge(scores, labels, 3, {})
    assert found == Score(0.75, 0.75, 3, 4, {})
    assert found.figures == {"top1": 0.75, "mean_per_class": 0.75}
    found = [figure(metric, scores, np.array([0, 1, 1, 1])) for metric in ("top1", "mean_per_class")]
    assert found == pytest.approx([1 / 2, 2 / 3])
