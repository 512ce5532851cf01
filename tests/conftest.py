"""Small real things that many tests need: images, a shard set, its clusters, settings of a tiny model.

Axes: N images, M clusters, D pixels of a shrunken image.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_sample_images

from moce_ds.clustering.clusters import Clusters, normalised, save_ids
from moce_ds.config import load
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.training.settings import PretrainSettings

NUM_CLUSTERS = 6


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 real images: 20 handwritten digits of 16 px (PNG), 2 x 20 crops of photographs (JPEG, PNG)."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("china", "digits", "flower"):
        (folder / name).mkdir()
    for number, pixels in enumerate(load_digits().images[:20]):
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((16, 16))
        image.save(folder / "digits" / f"{number:02d}.png")
    random = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(20):
            height, width = random.integers(24, 64, 2)
            top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            crop.save(folder / name / f"{number:02d}.{'jpg' if number % 2 else 'png'}", quality=92)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those images as a shard set: shards of 25, 25 and 10; ids 0-19 china, 20-39 digits, 40-59 flower."""
    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(tiny_images, out, ShardSettings(images_per_shard=25, workers=1))
    return out


@pytest.fixture(scope="session")
def tiny_clusters(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clusters folder of that set: k-means on its pixels, so there is no encoder in it."""
    shards = ShardSet.open(tiny_shards)
    pixels_ND = np.stack([np.asarray(shards.decode(i).resize((8, 8))).ravel() for i in range(shards.count)])
    mean_D = pixels_ND.mean(axis=0, dtype=np.float32)
    kmeans = KMeans(NUM_CLUSTERS, n_init=2, random_state=0).fit(normalised(pixels_ND, mean_D))
    clusters = Clusters(
        embeddings_MD=normalised(kmeans.cluster_centers_, np.zeros_like(mean_D)),
        duals_M=np.zeros(NUM_CLUSTERS, np.float32),
        mean_D=mean_D,
        sizes_M=np.bincount(kmeans.labels_, minlength=NUM_CLUSTERS).astype(np.int64),
        cosine_M=np.full(NUM_CLUSTERS, 0.8, np.float32),
        eps=0.025,
        method="kmeans",
        shards_fingerprint=shards.fingerprint,
        encoder_fingerprint="pixels",
        encoder_input={"size": 8},
        provenance={},
    )
    folder = tmp_path_factory.mktemp("clusters") / "clusters"
    clusters.save(folder)
    save_ids(folder, kmeans.labels_)
    return folder


@pytest.fixture
def tiny_config(tiny_shards: Path, tmp_path: Path) -> Callable[..., PretrainSettings]:
    """Settings of a tiny dense MAE (16 px, patch 4, width 16, depth 3) that writes to `tmp_path`/run.

    Call it with `key=value` words to change them.
    """

    def make(*words: str) -> PretrainSettings:
        model = {"patch_size": 4, "width": 16, "depth": 3, "heads": 2}
        decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
        optim = {"epochs": 2, "batch_size": 12, "base_lr": 2e-2, "warmup_epochs": 0.2}
        tiny = [
            f"{group}.{k}={v}"
            for group, part in (("model", model | decoder), ("optim", optim))
            for k, v in part.items()
        ]
        tiny += [f"data.shards={tiny_shards}", "data.image_size=16", "data.threads=1", "engine.precision=fp32"]
        return load(PretrainSettings, None, [*tiny, f"run.out={tmp_path / 'run'}", *words])

    return make
