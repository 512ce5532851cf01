"""Clusters that several processes make are, byte for byte, those of one process.

Axes: N images, D width.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness import run_distributed

from moce_ds.bench.synthetic_features import write_synthetic_features
from moce_ds.clustering import build, points
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.common.errors import DataError, MoceError
from moce_ds.distributed import in_order
from moce_ds.distributed.in_order import own_units, take_in_order
from moce_ds.distributed.runtime import Runtime, started

SAMPLED = ClusterSettings(num_clusters=8, fit_images_per_cluster=60, rounds=1, kmeans_iterations=3, tolerance=0.2)
ALL = replace(SAMPLED, fit_images_per_cluster=None)


def make_clusters(folder: Path, out: Path) -> list[str]:
    """Write clusters of a sample and of all images, and provoke errors; returns the messages of the errors."""
    torch.set_num_threads(1)
    messages = []
    with started() as runtime, patch.object(points, "ROWS", 64):
        build.write_clusters(folder / "features", out / "sampled", SAMPLED, runtime)
        with patch.object(build, "_MOST_KEPT", 400 * 4 * 16):
            build.write_clusters(folder / "features", out / "all", ALL, runtime)
        assert runtime.world_size == 1 or _order(runtime) == list(range(11)) * 2
        for act in (
            lambda: _failing(runtime),
            lambda: build.write_clusters(folder / "damaged", out / "no", ALL, runtime),
        ):
            try:
                act()
            except MoceError as error:
                messages.append(str(error))
    return messages


def _order(runtime: Runtime) -> list[int]:
    """The numbers of 11 units as they are taken, in batches of one and all at once."""
    taken: list[int] = []
    for most in (1, 2**20):
        own = (torch.tensor([unit]) for unit in own_units(11, runtime))
        with patch.object(in_order, "_BATCH_BYTES", most):
            take_in_order(own, 11, torch.tensor([0]), lambda result: taken.append(int(result)), runtime)
    return taken


def _failing(runtime: Runtime) -> None:
    def results() -> Iterator[torch.Tensor]:
        for unit in own_units(7, runtime):
            if unit == 4:
                raise DataError("unit 4 cannot be computed")
            yield torch.tensor([unit])

    take_in_order(results(), 7, torch.tensor([0]), lambda result: None, runtime)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for name in ("features", "damaged"):
        write_synthetic_features(folder / name, 1100, 16, block_rows=96)
    np.save(folder / "damaged/block-000007.npy", np.zeros((96, 16), dtype=np.float16))
    return folder


def test_three_processes_write_the_clusters_of_one(folder: Path, tmp_path: Path) -> None:
    messages = {size: run_distributed(make_clusters, size, folder, tmp_path / str(size)) for size in (1, 3)}
    for name in ("sampled", "all"):
        for file in ("clusters.safetensors", "ids.npy", "clusters.json"):
            written = [(tmp_path / size / name / file).read_bytes() for size in ("1", "3")]
            assert written[0] == written[1], f"{name}/{file}"
    for rank in [*messages[1], *messages[3]]:
        assert rank[0] == "unit 4 cannot be computed" and "block-000007.npy is damaged" in rank[1]
    assert sorted(path.name for path in (tmp_path / "3").iterdir()) == ["all", "sampled"]
