"""Weighted k-nearest-neighbour accuracy on frozen features, with DINO's protocol.

Labels are classes [N], or targets [N, K] (see `metrics`).

Axes: N images of a split, Q images of one block of test images, D features, K classes, k neighbours.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce_ds.common.errors import DataError
from moce_ds.evaluation.metrics import MultiLabelScore, Score, judge
from moce_ds.evaluation.settings import KnnSettings

BLOCK_ENTRIES = 2**24
"""Similarities in memory at a time: 64 MiB in float32."""


def knn_accuracy(
    train_ND: Tensor,
    train_labels: Tensor,
    test_ND: Tensor,
    test_labels: Tensor,
    config: KnnSettings | None = None,
) -> Score | MultiLabelScore:
    """Accuracy of a vote of the k nearest training images, each weighted by exp(cosine / temperature).

    If there are fewer than k training images, all vote; `settings["k"]` is the number of voters. Similarities are
    computed in blocks of test images, so memory does not grow with the test split. With targets, the score of a class
    is its share of the vote, without neighbours that are ignored for the class.

    Args:
        train_ND, test_ND: float32 features of any scale (they are L2-normalised here).
        train_labels, test_labels: integer class of each image [N], or targets [N, K].

    Raises:
        DataError: see `check_split`.

    Source: Wu et al. 2018 (arXiv 1805.01978), with k and temperature of DINO (Caron et al. 2021).
    """
    config = config or KnnSettings()
    check_split(train_ND, train_labels, test_ND, test_labels)
    k = min(config.k, len(train_ND))
    train_y, test_y = positions(train_labels, test_labels)
    train_ND = normalize(train_ND.float(), dim=1)
    block = max(1, BLOCK_ENTRIES // len(train_ND))
    votes_NK = torch.cat(
        [
            _vote(normalize(test_QD.float(), dim=1) @ train_ND.T, train_y, k, config.temperature)
            for test_QD in test_ND.split(block)
        ]
    )
    settings = {"k": k, "temperature": config.temperature}
    return judge(votes_NK.cpu().numpy(), test_y.cpu().numpy(), len(train_ND), settings)


def positions(train_labels: Tensor, *others: Tensor) -> list[Tensor]:
    """Classes as positions in the sorted classes of the training split; targets unchanged."""
    if train_labels.ndim == 2:
        return [train_labels, *others]
    classes = torch.unique(train_labels)
    return [torch.searchsorted(classes, labels) for labels in (train_labels, *others)]


def check_split(
    train_ND: Tensor, train_labels: Tensor, test_ND: Tensor, test_labels: Tensor, test: str = "test"
) -> None:
    """Check that a classifier can be evaluated on features and labels; `test` names the second split in errors.

    Raises:
        DataError: an empty split, labels that do not match the features, unequal widths, non-finite values, fewer than
            two classes, or a test class without a training image.
    """
    for split, features_ND, labels in (("training", train_ND, train_labels), (test, test_ND, test_labels)):
        if features_ND.ndim != 2 or labels.ndim not in (1, 2) or labels.shape[:1] != features_ND.shape[:1]:
            raise DataError(
                f"The {split} split has features {tuple(features_ND.shape)} and labels {tuple(labels.shape)}; "
                "expected [N, D] and [N] or [N, K]: one feature vector and one label per image, or one target per "
                "class."
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
            f"Training features have {train_ND.shape[1]} dimensions and {test} features {test_ND.shape[1]}; "
            "expected both from the same encoder."
        )
    if train_labels.shape[1:] != test_labels.shape[1:]:
        raise DataError(
            f"Training labels are {list(train_labels.shape)} and {test} labels {list(test_labels.shape)}; "
            "expected both with one label per image, or with one target per class for the same classes."
        )
    if train_labels.ndim == 1:
        check_classes(train_labels, test_labels, test)


def check_classes(train_labels_N: Tensor, test_labels_N: Tensor, test: str) -> None:
    """Raise DataError for a single class, or a class of the split `test` without a training image."""
    known = set(train_labels_N.tolist())
    if len(known) < 2:
        raise DataError("The training split holds a single class; accuracy needs at least two.")
    if missing := sorted(set(test_labels_N.tolist()) - known):
        raise DataError(
            f"{test.capitalize()} classes {missing} have no training image; split the task so that every class is in "
            "both."
        )


def _vote(similarity_QN: Tensor, train_y: Tensor, k: int, temperature: float) -> Tensor:
    similarity_Qk, neighbour_Qk = similarity_QN.topk(k, dim=1)
    # A common factor per row does not change the vote; dividing by the largest weight keeps small temperatures finite.
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp()
    if train_y.ndim == 1:
        votes_QK = weight_Qk.new_zeros(len(similarity_QN), int(train_y.max()) + 1)
        return votes_QK.scatter_add_(1, train_y[neighbour_Qk], weight_Qk)
    targets_QkK = train_y[neighbour_Qk]
    for_QK, all_QK = (
        torch.einsum("qk,qkc->qc", weight_Qk, part.float()) for part in (targets_QkK == 1, targets_QkK >= 0)
    )
    return for_QK / all_QK.clamp(min=torch.finfo(torch.float32).tiny)
