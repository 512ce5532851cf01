"""How typical a task is: real clusters of real digits, held against further digits, photographs and noise.

Axes: N images, M clusters.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from moce_ds.clustering.build import ClusterSettings, build_clusters
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.selection.vote import Typicality
from tests.unit.data.test_clusters import write_features

SIDE = 8
Images = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Clusters:
    """Of every other digit, a feature being the pixels."""
    folder = tmp_path_factory.mktemp("typicality")
    features = write_features(folder / "features", load_digits().data[::2])
    return build_clusters(features, folder / "clusters", ClusterSettings(num_clusters=12, max_iterations=3000))[0]


def digits_held_out() -> np.ndarray:
    return np.asarray(load_digits().data[1::2])


def photographs() -> np.ndarray:
    """Crops, gray, in the digits' 8 x 8 pixels from 0 to 16."""
    random, crops = np.random.default_rng(0), []
    for photo in load_sample_images().images:
        for _ in range(100):
            top, left = random.integers(0, 300), random.integers(0, 500)
            crop = Image.fromarray(photo[top : top + 96, left : left + 96]).convert("L").resize((SIDE, SIDE))
            crops.append(np.asarray(crop).ravel() / 16)
    return np.array(crops)


def noise() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 16, (200, SIDE * SIDE))


def typicality(features_ND: np.ndarray, clusters: Clusters) -> Typicality:
    return Typicality.of(*clusters.assign_with_cosine(features_ND.astype(np.float32)), clusters)


def test_further_images_of_the_training_domain_are_typical(clusters: Clusters) -> None:
    found = typicality(digits_held_out(), clusters)
    assert found.verdict == "typical" and found.low_share is not None and 0.02 < found.low_share < 0.1
    assert found.cosine == pytest.approx(found.training_cosine, abs=0.02)


@pytest.mark.parametrize("make", [photographs, noise])
def test_images_of_another_domain_are_like_nothing_seen(clusters: Clusters, make: object) -> None:
    found = typicality(make(), clusters)  # type: ignore[operator]
    assert found.verdict == "unlike anything in the pre-training set"
    assert found.cosine < found.training_cosine - 0.1
    assert "unlike anything in the pre-training set" in found.summary and "5% are expected" in found.summary


def test_some_strange_images_make_a_task_unusual(clusters: Clusters) -> None:
    digits_ND = digits_held_out()
    mixed_ND = np.concatenate([digits_ND[:600], photographs()])
    assert typicality(mixed_ND, clusters).verdict == "unusual"


def test_five_in_a_hundred_training_images_are_below(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", load_digits().data)
    clusters, _ = build_clusters(features, tmp_path / "clusters", ClusterSettings(num_clusters=4, max_iterations=3000))
    ids_N, cosine_N = clusters.assign_with_cosine(load_digits().data.astype(np.float32))
    assert (load_ids(tmp_path / "clusters", "shards-a", 1797) == ids_N).all()
    assert clusters.low_cosine_M is not None
    for cluster in range(4):
        below = (cosine_N[ids_N == cluster] < clusters.low_cosine_M[cluster]).mean()
        assert below == pytest.approx(0.05, abs=1 / clusters.sizes_M[cluster])


def test_clusters_of_an_earlier_version_say_unknown(clusters: Clusters) -> None:
    found = typicality(digits_held_out(), replace(clusters, low_cosine_M=None))
    assert (found.verdict, found.low_share) == ("unknown", None)
    assert found.summary.startswith("How typical: unknown, the run's clusters are of an earlier version")
    record = found.record()
    assert record["verdict"] == "unknown" and record["cosine"] == pytest.approx(found.cosine)
