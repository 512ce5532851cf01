"""Logistic regression in minibatches, on scikit-learn's digits: the optimum of L-BFGS, within bounded memory."""

import hashlib
import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy

from moce_ds.common.config.settings import load, to_tree
from moce_ds.evaluation.probe import logistic_fits, sgd_fits
from moce_ds.evaluation.probe_sgd import train_heads
from moce_ds.evaluation.settings import ProbeSettings, SgdSettings, decisive
from tests.examples.alone import ALONE

STRENGTHS = [1.0, 1e-1, 1e-2]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@pytest.fixture(scope="module")
def noisy() -> tuple[Floats, Ints]:
    """A fifth of the labels is wrong, so that no strength separates the classes."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    x_ND = np.maximum(pixels @ random.standard_normal((64, 96)), 0).astype(np.float32)
    wrong_N = random.random(len(labels)) < 0.2
    return x_ND[:1000], np.where(wrong_N, random.integers(0, 10, len(labels)), labels)[:1000]


def objective(scores_NK: NDArray[np.floating], weight_DK: NDArray[np.floating], y_N: Ints, strength: float) -> float:
    loss = cross_entropy(torch.from_numpy(scores_NK).double(), torch.from_numpy(y_N))
    return float(loss) + strength / 2 * float(np.square(weight_DK).sum())


def test_it_reaches_the_optimum_of_l_bfgs(noisy: tuple[Floats, Ints]) -> None:
    """The objective within 0.5 percent and 99 of 100 predictions, for every strength."""
    x_ND, y_N = noisy
    config = ProbeSettings(sgd=SgdSettings(epochs=60, batch_size=128))
    fits = sgd_fits(x_ND, y_N, np.arange(1000), STRENGTHS, config, ALONE)
    scale_D = x_ND.std(axis=0)
    for fit, expected in zip(fits, logistic_fits(x_ND, y_N, STRENGTHS), strict=True):
        # Scores are affine: what a deviation of each feature adds is the weight.
        weights = [p(np.diag(scale_D)) - p(np.zeros((1, 96), np.float32)) for p in (fit.predict, expected.predict)]
        scores = [p(x_ND) for p in (fit.predict, expected.predict)]
        found, best = (objective(*pair, y_N, fit.strength) for pair in zip(scores, weights, strict=True))
        assert found == pytest.approx(best, rel=5e-3)
        assert (scores[0].argmax(axis=1) == scores[1].argmax(axis=1)).mean() > 0.99


def test_classifiers_of_one_pass_do_not_influence_each_other(noisy: tuple[Floats, Ints]) -> None:
    config = ProbeSettings(sgd=SgdSettings(epochs=3, batch_size=64))
    together = list(sgd_fits(*noisy, np.arange(1000), STRENGTHS, config, ALONE))
    for place, strength in enumerate(STRENGTHS):
        (alone,) = sgd_fits(*noisy, np.arange(1000), [strength], config, ALONE)
        np.testing.assert_allclose(alone.predict(noisy[0]), together[place].predict(noisy[0]), atol=2e-3)


def test_only_the_given_images_count(noisy: tuple[Floats, Ints]) -> None:
    x_ND, y_N = noisy
    spoilt_ND = x_ND.copy()
    spoilt_ND[500:] = np.nan
    for x in (x_ND, spoilt_ND):
        heads = train_heads(x, y_N, np.arange(500), [0.1], SgdSettings(epochs=2), 0, ALONE)
        assert bool(heads.weight_DSK.isfinite().all())
    np.testing.assert_allclose(heads.mean_D, x_ND[:500].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(heads.scale_D, StandardScaler().fit(x_ND[:500]).scale_, rtol=1e-5)


def test_a_constant_feature_is_left_out(noisy: tuple[Floats, Ints]) -> None:
    x_ND = np.concatenate([noisy[0], np.full((1000, 1), 123.456, np.float32)], axis=1)
    heads = train_heads(x_ND, noisy[1], np.arange(1000), [0.1], SgdSettings(epochs=2), 0, ALONE)
    assert heads.scale_D[-1] == 1.0 and float(heads.weight_DSK[-1].detach().abs().max()) < 1e-2


def test_a_class_without_both_answers_scores_nothing(noisy: tuple[Floats, Ints]) -> None:
    x_ND, y_N = noisy
    targets_NK = np.stack([y_N == 3, np.ones_like(y_N), np.where(y_N == 3, 1, -1)], axis=1)
    (fit,) = sgd_fits(x_ND, targets_NK, np.arange(1000), [0.1], ProbeSettings(), ALONE)
    scores_NK = fit.predict(x_ND)
    assert abs(scores_NK[:, 0]).max() > 1 and not scores_NK[:, 1:].any()


def test_the_settings_of_sgd_identify_its_results_alone() -> None:
    """Results of earlier versions, which had no `sgd`, stay valid."""
    assert "sgd" not in decisive(ProbeSettings()) and list(decisive(ProbeSettings())) == [
        name for name in to_tree(ProbeSettings()) if name != "sgd"
    ]
    assert decisive(load(ProbeSettings, None, ["method=sgd"]))["sgd"]["epochs"] == 20
    # The digest of the default settings in the last version without `sgd`.
    digest = hashlib.sha256(json.dumps(decisive(ProbeSettings())).encode()).hexdigest()
    assert digest == "25e2807f4b09d7eb8161cbd44290957333bf503af2d181796a4a93e0f1ae9697"
