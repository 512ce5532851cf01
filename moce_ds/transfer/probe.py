"""Linear probe: multinomial logistic regression on frozen, standardised features.

Axes: N images of a split, D features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moce_ds.errors import DataError
from moce_ds.transfer.knn import Score, check_split, score

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_MAX_ITERATIONS = 500


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    validation_share: float = 0.2,
    seed: int = 0,
) -> Score:
    """Test accuracy of a linear classifier whose regularisation was chosen without looking at the test split.

    Every strength is fitted on a part of the training split and judged on the rest of it (stratified by class); the
    best one, the stronger of equals, is fitted again on the whole training split and judged on the test split.
    Features are standardised with the statistics of the images fitted on, which is what the usual probe's
    BatchNorm without affine part does. Deterministic for a given seed.

    Args:
        train_ND, test_ND: float32 features.
        train_labels_N, test_labels_N: integer class of each image.
        strengths: weights of `||W||^2 / 2` beside the *mean* cross-entropy, so that they mean the same for any N.
        validation_share: share of each class of the training split that chooses the strength, between 0 and 1.
        seed: of the validation split.

    Raises:
        DataError: see `check_split`; also when no class has two training images.
    """
    check_split(train_ND, train_labels_N, test_ND, test_labels_N)
    x_ND, y_N = train_ND.float().cpu().numpy(), train_labels_N.cpu().numpy()
    validation_N = stratified_mask(y_N, validation_share, seed)
    accuracies = {
        strength: fit(x_ND[~validation_N], y_N[~validation_N], strength).score(x_ND[validation_N], y_N[validation_N])
        for strength in sorted(strengths, reverse=True)
    }
    best = max(accuracies, key=lambda strength: accuracies[strength])
    predicted_N = torch.from_numpy(fit(x_ND, y_N, best).predict(test_ND.float().cpu().numpy()))
    chosen = {
        "l2": best,
        "validation_top1": float(accuracies[best]),
        "n_validation": int(validation_N.sum()),
        "seed": seed,
    }
    return score(predicted_N, test_labels_N.cpu(), len(x_ND), chosen)


def stratified_mask(labels_N: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """True for a random `share` of each class: at least one image, and never all; none of a class of one.

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
            "No class has two training images, so none can be set aside to choose the probe's regularisation; "
            "use k-NN (`moce knn`) on so small a task."
        )
    return mask_N


def fit(x_ND: NDArray[np.float32], y_N: NDArray[np.int64], strength: float) -> Pipeline:
    """Standardisation and classifier, fitted; `strength` as in `linear_probe`."""
    # scikit-learn weighs the *sum* of the cross-entropy by C.
    classifier = LogisticRegression(C=1 / (strength * len(x_ND)), max_iter=_MAX_ITERATIONS)
    return make_pipeline(StandardScaler(), classifier).fit(x_ND, y_N)
