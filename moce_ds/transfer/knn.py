"""Weighted k-nearest-neighbour accuracy on frozen features, as DINO's protocol has it.

Axes: N images of a split, Q images of one block of test images, D features, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce_ds.errors import DataError

_BLOCK_ENTRIES = 2**24  # similarities held at a time: 64 MiB in float32


@dataclass(frozen=True)
class Score:
    """Accuracy on a task's test images, with how it was obtained.

    Attributes:
        top1: share of the test images with the right class, 0-1.
        mean_per_class: the same share per class, averaged over the classes present in the test split, 0-1.
        n_train: images in the training split, all of them used.
        n_test: images in the test split.
        settings: what was set or chosen, such as k or the regularisation; JSON values only.
    """

    top1: float
    mean_per_class: float
    n_train: int
    n_test: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> Score:
    """Accuracy of a vote of the k nearest training images, each weighing exp(cosine / temperature).

    Fewer than k training images all vote; `settings["k"]` says how many did. Similarities are computed in
    blocks of test images, so memory does not grow with the test split.

    Args:
        train_ND, test_ND: float32 features, any scale (they are L2-normalised here).
        train_labels_N, test_labels_N: integer class of each image.
        k: number of neighbours.
        temperature: of the vote; smaller gives the nearest ones more weight.

    Raises:
        DataError: see `check_split`.

    Source: Wu et al. 2018 (arXiv 1805.01978), with k and temperature of DINO (Caron et al. 2021).
    """
    check_split(train_ND, train_labels_N, test_ND, test_labels_N)
    k = min(k, len(train_ND))
    classes, train_class_N = torch.unique(train_labels_N, return_inverse=True)
    train_ND = normalize(train_ND.float(), dim=1)
    block = max(1, _BLOCK_ENTRIES // len(train_ND))
    votes = [
        _vote(normalize(test_QD.float(), dim=1) @ train_ND.T, train_class_N, len(classes), k, temperature)
        for test_QD in test_ND.split(block)
    ]
    return score(classes[torch.cat(votes)], test_labels_N, len(train_ND), {"k": k, "temperature": temperature})


def score(predicted_N: Tensor, labels_N: Tensor, n_train: int, settings: Mapping[str, Any]) -> Score:
    """The `Score` of predicted classes against the true ones."""
    right_N = (predicted_N == labels_N).cpu().numpy()
    _, class_N = np.unique(labels_N.cpu().numpy(), return_inverse=True)
    per_class_K = np.bincount(class_N, weights=right_N) / np.bincount(class_N)
    return Score(float(right_N.mean()), float(per_class_K.mean()), n_train, len(right_N), settings)


def check_split(train_ND: Tensor, train_labels_N: Tensor, test_ND: Tensor, test_labels_N: Tensor) -> None:
    """Refuse features and labels that no classifier can be judged on.

    Raises:
        DataError: an empty split, labels that do not fit the features, unequal widths, values that are not finite,
            fewer than two classes, or a test class without a training image.
    """
    for split, features_ND, labels_N in (
        ("training", train_ND, train_labels_N),
        ("test", test_ND, test_labels_N),
    ):
        if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
            raise DataError(
                f"The {split} split has features {tuple(features_ND.shape)} and labels {tuple(labels_N.shape)}; "
                "expected [N, D] and [N]: one feature vector and one label per image."
            )
        if len(features_ND) == 0:
            raise DataError(f"The {split} split holds no images; expected at least one per class.")
        bad = int((~torch.isfinite(features_ND)).any(dim=1).sum())
        if bad:
            raise DataError(
                f"{bad} of {len(features_ND)} {split} features hold NaN or infinity; compute them again with "
                "`moce features`, and check that the checkpoint's loss was finite."
            )
    if train_ND.shape[1] != test_ND.shape[1]:
        raise DataError(
            f"Training features have {train_ND.shape[1]} dimensions and test features {test_ND.shape[1]}; "
            "expected both from the same encoder."
        )
    known = set(train_labels_N.tolist())
    if len(known) < 2:
        raise DataError("The training split holds a single class; accuracy needs at least two.")
    if missing := sorted(set(test_labels_N.tolist()) - known):
        raise DataError(
            f"Test classes {missing} have no training image; split the task so that every class is in both."
        )


def _vote(similarity_QN: Tensor, train_class_N: Tensor, n_classes: int, k: int, temperature: float) -> Tensor:
    similarity_Qk, neighbour_Qk = similarity_QN.topk(k, dim=1)
    # A common factor per row changes no vote; dividing by the largest weight keeps small temperatures finite.
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp()
    votes_QK = weight_Qk.new_zeros(len(similarity_QN), n_classes)
    return votes_QK.scatter_add_(1, train_class_N[neighbour_Qk], weight_Qk).argmax(dim=1)
