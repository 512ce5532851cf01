"""k-means with faiss: centroids on the sphere, all points used, bad input refused."""

import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from moce_ds.clustering.kmeans import kmeans, streamed_step
from moce_ds.common.errors import ConfigError, DataError
from tests.examples.alone import ALONE


@pytest.fixture(scope="module")
def digits_ND() -> np.ndarray:
    pixels_ND = load_digits().data.astype(np.float32)
    centred_ND = pixels_ND - pixels_ND.mean(axis=0)
    return centred_ND / np.linalg.norm(centred_ND, axis=1, keepdims=True)


def test_centroids_have_norm_1_and_come_again_with_the_seed(digits_ND: np.ndarray) -> None:
    centroids_MD = kmeans(digits_ND, 10, seed=3, iterations=10)
    assert centroids_MD.shape == (10, 64) and centroids_MD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids_MD, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(centroids_MD, kmeans(digits_ND, 10, seed=3, iterations=10))
    assert not np.array_equal(centroids_MD, kmeans(digits_ND, 10, seed=4, iterations=10))


def of_faiss(points_ND: np.ndarray, num_clusters: int, iterations: int, **limit: int) -> np.ndarray:
    """The centroids of faiss itself, without a stop between the iterations."""
    solver = faiss.Kmeans(
        points_ND.shape[1],
        num_clusters,
        niter=iterations,
        seed=1,
        spherical=True,
        min_points_per_centroid=1,
        **limit,
    )
    solver.train(points_ND)
    return solver.centroids


def test_iterations_one_by_one_are_those_of_faiss_in_one_go(digits_ND: np.ndarray) -> None:
    seen: list[None] = []
    centroids_MD = kmeans(digits_ND, 12, seed=1, iterations=8, watch=lambda: seen.append(None))
    np.testing.assert_allclose(centroids_MD, of_faiss(digits_ND, 12, 8, max_points_per_centroid=10_000), atol=1e-5)
    assert len(seen) == 8


def test_all_points_are_used(digits_ND: np.ndarray) -> None:
    centroids_MD = kmeans(digits_ND, 4, seed=1, iterations=5)
    np.testing.assert_allclose(centroids_MD, of_faiss(digits_ND, 4, 5, max_points_per_centroid=10_000), atol=1e-5)
    # The default of faiss is 256 points per centroid; the digits are more than 4 times that.
    assert not np.allclose(centroids_MD, of_faiss(digits_ND, 4, 5), atol=1e-3)


def test_bad_input_is_refused(digits_ND: np.ndarray) -> None:
    with pytest.raises(DataError, match="5 images cannot form 6 clusters: set num_clusters to 5 or less"):
        kmeans(digits_ND[:5], 6, seed=0, iterations=1)
    broken_ND = digits_ND.copy()
    broken_ND[17, 3] = np.nan
    with pytest.raises(DataError, match=r"Feature 17 .* not finite"):
        kmeans(broken_ND, 6, seed=0, iterations=1)
    with pytest.raises(DataError, match="centroid at the origin"):
        kmeans(np.zeros((20, 4), dtype=np.float32), 2, seed=0, iterations=2)


def test_a_missing_faiss_names_the_extras(digits_ND: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"moce-ds\[cpu\].*moce-ds\[cu13\].*moce-ds\[cu12\]"):
        kmeans(digits_ND, 2, seed=0, iterations=1)


def test_a_streamed_step_is_a_step_of_k_means(digits_ND: np.ndarray) -> None:
    start_MD = digits_ND[::180]
    points_ND = torch.from_numpy(digits_ND)
    found_MD = streamed_step(lambda: points_ND.split(100), torch.from_numpy(start_MD), ALONE).numpy()
    nearest_N = (digits_ND @ start_MD.T).argmax(axis=1)
    sums_MD = np.stack([digits_ND[nearest_N == cluster].sum(axis=0, dtype=np.float64) for cluster in range(10)])
    np.testing.assert_allclose(found_MD, sums_MD / np.linalg.norm(sums_MD, axis=1, keepdims=True), atol=1e-6)


def test_a_streamed_step_keeps_centroids_without_points_and_refuses_nan(digits_ND: np.ndarray) -> None:
    points_ND, start_MD = torch.from_numpy(digits_ND[:50]), torch.eye(2, 64)
    start_MD[1] = -points_ND.mean(dim=0)
    start_MD[0] = -start_MD[1]
    found_MD = streamed_step(lambda: [points_ND[(points_ND @ start_MD[0]) > 0]], start_MD, ALONE)
    assert torch.equal(found_MD[1], start_MD[1]) and not torch.equal(found_MD[0], start_MD[0])
    points_ND[7, 3] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        streamed_step(lambda: [points_ND], start_MD, ALONE)


def test_importing_the_module_does_not_import_faiss() -> None:
    code = "import sys, moce_ds.clustering.build; sys.exit('faiss' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
