"""The tests of this folder are marked `slurm`, and share one real cluster of four nodes, restored after each."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_packages import missing


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four idle nodes; programs that a test starts see it.

    Where none can be had the test is skipped, or fails if CI_REQUIRE_SLURM is set.
    """
    if reason := missing():
        (pytest.fail if os.environ.get("CI_REQUIRE_SLURM") else pytest.skip)(reason)
    with Cluster.start(tmp_path_factory.mktemp("cluster"), nodes=4) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture(autouse=True)
def _restored(cluster: Cluster) -> Iterator[None]:
    """What a test breaks is whole again for the next one."""
    yield
    cluster.restore()
