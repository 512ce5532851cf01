"""The probe's four methods, on scikit-learn's digits: against one another, scikit-learn's own, and several labels."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moce_ds.common.config.settings import load
from moce_ds.common.errors import ConfigError, DataError
from moce_ds.evaluation.knn import knn_accuracy
from moce_ds.evaluation.metrics import MultiLabelScore
from moce_ds.evaluation.probe import lars_fits, linear_probe, ridge_fits
from moce_ds.evaluation.settings import LarsSettings, ProbeSettings, SgdSettings

METHODS = ("logistic", "closed_form", "lars", "sgd")
FAST = LarsSettings(base_lr=[1.0, 10.0], epochs=30, warmup_epochs=3, batch_size=64)
FAST_SGD = SgdSettings(epochs=30, batch_size=64)
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Split:
    """Random features of the pixels: none is constant, as those of an encoder are not."""
    pixels, labels = load_digits(return_X_y=True)
    directions = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    features_ND, labels_N = torch.relu(torch.from_numpy(pixels).float() @ directions), torch.from_numpy(labels).long()
    return features_ND[:600], labels_N[:600], features_ND[600:1100], labels_N[600:1100]


@pytest.fixture(scope="module")
def several(digits: Split) -> Split:
    """The same images with targets for three properties; a tenth of the training targets do not count."""

    def targets(labels_N: Tensor) -> Tensor:
        return torch.stack([labels_N % 2 == 0, labels_N > 5, labels_N == 3], dim=1).to(torch.int8)

    train_ND, train_labels_N, test_ND, test_labels_N = digits
    train_NK = targets(train_labels_N)
    train_NK[torch.rand(train_NK.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = -1
    return train_ND, train_NK, test_ND, targets(test_labels_N)


def config(method: str, **words: object) -> ProbeSettings:
    return ProbeSettings(method=method, lars=FAST, sgd=FAST_SGD, **words)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_repeats_itself(digits: Split, method: str) -> None:
    found = linear_probe(*digits, config(method))
    assert found.figures["top1"] > 0.88
    assert found.settings["method"] == method
    assert linear_probe(*digits, config(method)) == found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_on_the_validation_images_given(digits: Split, method: str) -> None:
    """All labels of the validation split wrong: strengths that learn nothing are the best ones."""
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    split = (train_ND[:500], train_labels_N[:500], test_ND, test_labels_N)
    held = train_ND[500:], train_labels_N[500:]
    lars = LarsSettings(base_lr=[1e-6, 10.0], epochs=20)
    settings = ProbeSettings(method=method, l2=[1e5, 1e-3], lars=lars, sgd=FAST_SGD)  # type: ignore[arg-type]
    right = linear_probe(*split, settings, held)
    wrong = linear_probe(*split, settings, (held[0], (held[1] + 1) % 10))
    key = "base_lr" if method == "lars" else "l2"
    assert (right.settings[key], wrong.settings[key]) == ((10.0, 1e-6) if method == "lars" else (1e-3, 1e5))
    assert right.settings["n_validation"] == 100 and right.n_train == 600


@pytest.mark.parametrize("method", METHODS)
def test_several_labels_an_image(several: Split, method: str) -> None:
    found = linear_probe(*several, config(method))
    assert isinstance(found, MultiLabelScore)
    assert found.map11 > 0.85
    assert set(found.settings) >= {"validation_map11", "n_validation"} and found.settings["n_validation"] == 120


@pytest.fixture(scope="module")
def unsure(digits: Split) -> Split:
    """Class 0 is 3 or 5, but nine of ten 5s do not count; class 1 is 3, but nine of ten 8s do not count."""
    train_ND, train_labels_N, test_ND, test_labels_N = digits

    def targets(labels_N: Tensor) -> Tensor:
        return torch.stack([(labels_N == 3) | (labels_N == 5), labels_N == 3], dim=1).to(torch.int8)

    train_NK, many_N = targets(train_labels_N), torch.arange(600) % 10 > 0
    train_NK[(train_labels_N == 5) & many_N, 0] = -1
    train_NK[(train_labels_N == 8) & many_N, 1] = -1
    return train_ND, train_NK, test_ND, targets(test_labels_N)


def taken_for(value: int, unsure: Split) -> Split:
    train_ND, train_NK, test_ND, test_NK = unsure
    return train_ND, torch.where(train_NK < 0, value, train_NK), test_ND, test_NK


@pytest.mark.parametrize("method", [*METHODS, "knn"])
def test_what_does_not_count_is_learnt_neither_as_shown_nor_as_not_shown(unsure: Split, method: str) -> None:
    def measured(split: Split) -> float:
        return (knn_accuracy(*split) if method == "knn" else linear_probe(*split, config(method))).figures["map11"]

    values = (0,) if method == "lars" else (0, 1)  # so few steps of LARS do not tell a 3 from an 8 anyway
    assert measured(unsure) > max(measured(taken_for(value, unsure)) for value in values) + 0.02


def test_the_first_step_of_lars_is_a_thousandth_of_the_weights_times_the_rate(digits: Split) -> None:
    x_ND = StandardScaler().fit_transform(digits[0].numpy()).astype(np.float32)
    one_step = LarsSettings(epochs=1, warmup_epochs=0, batch_size=600)
    predicts = [fit.predict for fit in lars_fits(x_ND, digits[1].numpy(), [1e-9, 50.0], one_step, seed=0)]
    # Scores are affine: what a unit of each feature adds is the weight, but for one factor that all have.
    start_DK, after_DK = (p(np.eye(128, dtype=np.float32)) - p(np.zeros((1, 128), np.float32)) for p in predicts)
    moved = np.linalg.norm(after_DK - start_DK) / np.linalg.norm(start_DK)
    assert moved == pytest.approx(50.0 * 600 / 256 * 1e-3, rel=1e-2)


def test_knn_votes_for_several_labels(several: Split) -> None:
    found = knn_accuracy(*several)
    assert isinstance(found, MultiLabelScore) and found.map11 > 0.9


def test_ridge_equals_scikit_learn(digits: Split) -> None:
    x_ND, y_N, test_ND = digits[0].numpy(), digits[1].numpy(), digits[2].numpy()
    scaler = StandardScaler().fit(x_ND)
    for strength, predict, _ in ridge_fits(x_ND, y_N, [10.0, 1e-2]):
        reference = Ridge(alpha=strength * len(x_ND)).fit(scaler.transform(x_ND).astype(np.float64), np.eye(10)[y_N])
        np.testing.assert_allclose(predict(test_ND), reference.predict(scaler.transform(test_ND)), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_two_classes(digits: Split, method: str) -> None:
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    assert (
        linear_probe(train_ND, train_labels_N // 9, test_ND, test_labels_N // 9, config(method)).figures["top1"] > 0.93
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_class_of_one_image_does_not_hinder(digits: Split, method: str) -> None:
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    labels_N = train_labels_N.clone()
    labels_N[0] = 77
    assert linear_probe(train_ND, labels_N, test_ND, test_labels_N, config(method)).figures["top1"] > 0.8


def test_what_does_not_go_together_is_named(digits: Split, several: Split) -> None:
    train_ND, train_labels_N, test_ND, _ = digits
    with pytest.raises(DataError, match=r"Validation classes .* have no training image"):
        linear_probe(*digits, config("logistic"), (train_ND, train_labels_N + 5))
    with pytest.raises(DataError, match=r"Training labels are \[600\] and test labels \[500, 3\]"):
        linear_probe(train_ND, train_labels_N, test_ND, several[3])
    with pytest.raises(ConfigError, match="method: got 'svm'"):
        load(ProbeSettings, None, ["method=svm"])
    with pytest.raises(ConfigError, match="l2"):
        load(ProbeSettings, None, ["l2=[]"])
