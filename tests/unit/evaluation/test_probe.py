"""k-NN and linear probe on scikit-learn's 1,797 handwritten digits, against scikit-learn's own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from moce_ds.common.errors import DataError
from moce_ds.evaluation import knn, probe
from moce_ds.evaluation.knn import knn_accuracy
from moce_ds.evaluation.probe import Fits, linear_probe, logistic_fits, ridge_fits, stratified_mask
from moce_ds.evaluation.settings import KnnSettings, ProbeSettings

Split = tuple[Tensor, Tensor, Tensor, Tensor]
FitAll = Callable[[NDArray[np.float32], NDArray[np.int64], list[float]], Fits]


@pytest.fixture(scope="module")
def digits() -> Split:
    pixels, labels = load_digits(return_X_y=True)
    features_ND, labels_N = torch.from_numpy(pixels).float(), torch.from_numpy(labels).long()
    return features_ND[:600], labels_N[:600], features_ND[600:1100], labels_N[600:1100]


def test_knn_equals_scikit_learn(digits: Split) -> None:
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    result = knn_accuracy(*digits, KnnSettings(k=20, temperature=0.07))
    reference = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train_ND.numpy(), train_labels_N.numpy())
    predicted = reference.predict(test_ND.numpy())
    assert result.top1 == pytest.approx((predicted == test_labels_N.numpy()).mean(), abs=0.003)
    assert result.top1 > 0.92
    assert result.mean_per_class == pytest.approx(balanced_accuracy_score(test_labels_N.numpy(), predicted), abs=0.003)
    assert (result.n_train, result.n_test) == (600, 500)
    assert result.settings == {"k": 20, "temperature": 0.07}


def test_knn_weighs_by_similarity() -> None:
    train_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels_N = torch.tensor([7, 3, 3])
    query_ND, truth_N = torch.tensor([[5.0, 0.5]]), torch.tensor([7])
    assert knn_accuracy(train_ND, labels_N, query_ND, truth_N, KnnSettings(k=3)).top1 == 1.0
    majority_wins = knn_accuracy(train_ND, labels_N, query_ND, truth_N, KnnSettings(k=3, temperature=100.0))
    assert majority_wins.top1 == 0.0


def test_knn_is_independent_of_tiles_and_scale(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    scaled = (train_ND * 3, train_labels_N, test_ND * 0.2, test_labels_N)
    expected = knn_accuracy(*digits)
    monkeypatch.setattr(knn, "TRAINING_TILE", 90)
    assert knn_accuracy(*scaled) == expected


def test_knn_with_fewer_images_than_neighbours(digits: Split) -> None:
    train_ND, train_labels_N, _, _ = digits
    result = knn_accuracy(train_ND[:15], train_labels_N[:15], train_ND[:15], train_labels_N[:15])
    assert result.settings["k"] == 15
    assert result.top1 > 0.9


def test_probe_on_digits(digits: Split) -> None:
    result = linear_probe(*digits)
    assert result.top1 > 0.9
    assert abs(result.top1 - result.mean_per_class) < 0.02
    assert result.settings["n_validation"] == pytest.approx(120, abs=6)
    assert linear_probe(*digits) == result


def test_probe_never_looks_at_the_test_split(digits: Split) -> None:
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    shuffled_N = test_labels_N[torch.randperm(len(test_labels_N), generator=torch.Generator().manual_seed(0))]
    honest, nonsense = linear_probe(*digits), linear_probe(train_ND, train_labels_N, test_ND * 9, shuffled_N)
    assert nonsense.top1 < 0.3
    assert nonsense.settings == honest.settings


def test_probe_regularises_where_labels_are_noisy(digits: Split) -> None:
    """A third of the training labels wrong: hardly regularised, the probe learns them by heart."""
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    random = torch.Generator().manual_seed(0)
    wrong_N = torch.rand(600, generator=random) < 0.33
    noisy_N = torch.where(wrong_N, torch.randint(10, (600,), generator=random), train_labels_N)
    chosen = linear_probe(train_ND, noisy_N, test_ND, test_labels_N)
    weak = linear_probe(train_ND, noisy_N, test_ND, test_labels_N, ProbeSettings(l2=[1e-6]))
    assert chosen.settings["l2"] >= 0.1
    assert chosen.top1 > weak.top1 + 0.05


def test_probe_standardises_and_bears_a_constant_feature(digits: Split) -> None:
    train_ND, train_labels_N, test_ND, test_labels_N = digits
    scale_D = torch.logspace(-3, 3, train_ND.shape[1])
    scaled = linear_probe(train_ND * scale_D + 5, train_labels_N, test_ND * scale_D + 5, test_labels_N)
    assert scaled.top1 == pytest.approx(linear_probe(*digits).top1, abs=0.02)


@pytest.mark.parametrize("fits", [logistic_fits, ridge_fits])
def test_a_strength_means_the_same_for_any_number_of_images(digits: Split, fits: FitAll) -> None:
    x_ND, y_N = digits[0].numpy(), digits[1].numpy()

    def scores(copies: int, l2: float) -> NDArray[np.floating]:
        (fit,) = fits(np.tile(x_ND, (copies, 1)), np.tile(y_N, copies), [l2])
        return fit.predict(digits[2].numpy())

    np.testing.assert_allclose(scores(1, 0.1), scores(3, 0.1), atol=2e-3 * abs(scores(1, 0.1)).max())
    assert abs(scores(1, 0.3) - scores(1, 0.1)).max() > 0.02


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_strengths_that_do_not_converge_are_told(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not_converged" not in linear_probe(*digits, ProbeSettings(l2=[1.0])).settings
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 12)
    found = linear_probe(*digits, ProbeSettings(l2=[1e-4, 10.0, 1e-2]))
    assert found.settings["not_converged"] == [1e-4, 1e-2]
    targets = [torch.nn.functional.one_hot(labels) for labels in (digits[1], digits[3])]
    several = linear_probe(digits[0], targets[0], digits[2], targets[1], ProbeSettings(l2=[1e-6]))
    assert several.settings["not_converged"] == [1e-6]


def test_probe_prefers_the_stronger_of_equals() -> None:
    x_ND = torch.tensor([[-3.0], [-2.5], [-2.0], [2.0], [2.5], [3.0]])
    y_N = torch.tensor([0, 0, 0, 1, 1, 1])
    assert linear_probe(x_ND, y_N, x_ND, y_N, ProbeSettings(l2=[1e-3, 1e-1, 1e-2])).settings["l2"] == 1e-1


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda counts: max(counts) > 1),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_validation_split_is_stratified(counts: list[int], share: float, seed: int) -> None:
    labels_N = np.repeat(np.arange(len(counts)), counts)
    mask_N = stratified_mask(labels_N, share, seed)
    assert (mask_N == stratified_mask(labels_N, share, seed)).all()
    for label, count in enumerate(counts):
        taken = int(mask_N[labels_N == label].sum())
        assert taken < count
        assert abs(taken - share * count) <= 1
        assert taken >= (count > 1)


@pytest.mark.parametrize("measure", [knn_accuracy, linear_probe])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y, t, u: (x[:0], y[:0], t, u), "training split holds no images"),
        (lambda x, y, t, u: (x, y, t[:0], u[:0]), "test split holds no images"),
        (lambda x, y, t, u: (x, y * 0, t, u * 0), "single class"),
        (lambda x, y, t, u: (x, y, t, torch.where(u == 3, 77, u)), r"\[77\] have no training image"),
        (lambda x, y, t, u: (x, y, t.masked_fill(t == t[0, 2], torch.nan), u), "test features hold NaN"),
        (lambda x, y, t, u: (x / 0, y, t, u), "training features hold NaN"),
        (lambda x, y, t, u: (x, y[1:], t, u), r"one feature vector and one label per image"),
        (lambda x, y, t, u: (x, y, t[:, 1:], u), "from the same encoder"),
    ],
)
def test_bad_input_is_named(
    digits: Split, measure: Callable[..., object], spoil: Callable[..., Split], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        measure(*spoil(*digits))


def test_probe_needs_two_images_of_some_class(digits: Split) -> None:
    train_ND, train_labels_N, _, _ = digits
    with pytest.raises(DataError, match="No class has two training images"):
        linear_probe(train_ND[:10], train_labels_N[:10], train_ND[:10], train_labels_N[:10])
