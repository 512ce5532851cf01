"""The tests of this folder are marked `slurm`, and share one real cluster of four nodes, restored after each."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_packages import missing
from submitted import Tally, run_alone
from tiny_run import TinyData, write_data


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four idle nodes; programs that a test starts see it.

    Where none can be had the test is skipped, or fails if CI_REQUIRE_SLURM is set.
    """
    if reason := missing():
        (pytest.fail if os.environ.get("CI_REQUIRE_SLURM") else pytest.skip)(reason)
    with Cluster.start(tmp_path_factory.mktemp("cluster"), nodes=4) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster
        jobs = cluster.run("sacct", "--allusers", "--allocations", "--noheader", "--format=JobID")
        request.config.stash[JOBS] = len(set(jobs.split()))


@pytest.fixture(autouse=True)
def _restored(cluster: Cluster) -> Iterator[None]:
    """What a test breaks is whole again for the next one."""
    yield
    cluster.restore()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Shards of a few images, and their clusters."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def alone(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `experts`, never stopped."""
    return run_alone(data, tmp_path_factory.mktemp("alone") / "run")


TALLY = pytest.StashKey[Tally]()
JOBS = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    """Filled in by the tests."""
    return request.config.stash.setdefault(TALLY, Tally())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was seen."""
    tally = config.stash.get(TALLY, None)
    if tally is None:
        return
    terminalreporter.section("SLURM")
    terminalreporter.line(f"{config.stash.get(JOBS, 0)} jobs, {tally.requeues} requeues")
    terminalreporter.line(f"{tally.stops} stops and resumes: {tally.missing} steps lost, {tally.repeated} repeated")
    for harm, (seconds, repeated) in tally.recoveries.items():
        terminalreporter.line(f"{harm}: {seconds:.0f} s until it trained again, {repeated} steps repeated")
