"""Several processes use the cache of features together: all of them, or none.

Axes: N images, D width.
"""

import os
import pstats
import shutil
from cProfile import Profile
from pathlib import Path

import numpy as np
import pytest
from harness import run_distributed

from moce_ds.data.task_images import opened_images
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.encoders.features import encode_all
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.models.vit import load_encoder

SPLITS = ("classes", "flat", "other")


@pytest.fixture
def splits(tiny_images: Path, tmp_path: Path) -> Path:
    """The same images, in the same order, with other classes each time: other sets with the same features."""
    images = sorted((tiny_images / "flower").iterdir())[:9]
    for split in SPLITS:
        for number, image in enumerate(images):
            label = {"classes": "a" if number < 4 else "b", "flat": "", "other": "b"}[split]
            (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, tmp_path / split / label / image.name)
    return tmp_path


def encoded(encoder: Path, folder: Path, runtime: Runtime) -> tuple[np.ndarray, int]:
    """The features of a folder, and how many batches this process has encoded."""
    profile, config = Profile(), EncodeSettings(batch_size=2, threads=1)
    with opened_images(folder) as images:
        features_ND = profile.runcall(encode_all, load_encoder(encoder), images, config, runtime)
    calls = {name: numbers[0] for (_, _, name), numbers in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    return features_ND.numpy(), calls.get("features", 0)


def encoded_thrice(encoder: Path, splits: Path) -> list[tuple[np.ndarray, int]]:
    """First nothing is kept; then all processes find the features; then one of them uses another cache."""
    os.environ["MOCE_CACHE"] = str(splits / "cache")
    with started() as runtime:
        found = [encoded(encoder, splits / split, runtime) for split in SPLITS[:2]]
        if runtime.rank == 1:
            os.environ["MOCE_CACHE"] = str(splits / "empty")
        return [*found, encoded(encoder, splits / SPLITS[2], runtime)]


def test_all_processes_or_none_use_the_cache(splits: Path, tiny_encoder: Path) -> None:
    ranks = run_distributed(encoded_thrice, 2, tiny_encoder, splits)
    assert [[batches for _, batches in found] for found in ranks] == [[3, 0, 3], [2, 0, 2]]
    first_ND = ranks[0][0][0]
    assert all(np.array_equal(first_ND, features_ND) for found in ranks for features_ND, _ in found)
    kept = {name: len(list(splits.glob(f"{name}/features-*"))) for name in ("cache", "empty")}
    assert kept == {"cache": 1, "empty": 0}, "the first process keeps them"
    assert len(list(splits.glob("cache/images-*"))) == 3, "two processes share each"
