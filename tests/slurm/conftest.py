"""The tests of this folder are marked `slurm`, and share one real cluster of four nodes, restored after each.

They wait more than they compute: with several workers of pytest-xdist, each has a cluster of its own.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from cluster_packages import missing
from submitted import Tally, run_alone
from tiny_run import TinyData, write_data

from moce_ds.common.storage.locks import held


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def of_all_workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same for all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(request.config, "workerinput") else folder


@pytest.fixture(scope="session")
def cluster(of_all_workers: Path, tally: Tally, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four idle nodes; programs that a test starts see it.

    Where none can be had the test is skipped, or fails if CI_REQUIRE_SLURM is set.
    """
    with held(of_all_workers / "packages.lock"):  # installed by one
        reason = missing()
    if reason:
        (pytest.fail if os.environ.get("CI_REQUIRE_SLURM") else pytest.skip)(reason)
    with Cluster.start(tmp_path_factory.mktemp("cluster"), nodes=4) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster
        jobs = cluster.run("sacct", "--allusers", "--allocations", "--noheader", "--format=JobID")
        tally.jobs = len(set(jobs.split()))


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
def alone(data: TinyData, of_all_workers: Path) -> Path:
    """The run of `experts`, never stopped."""
    run = of_all_workers / "alone"
    with held(of_all_workers / "alone.lock"):
        return run if (run / "metrics.jsonl").exists() else run_alone(data, run)


TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    """Filled in by the tests."""
    return request.config.stash.setdefault(TALLY, Tally())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what it saw."""
    if hasattr(session.config, "workeroutput") and TALLY in session.config.stash:
        session.config.workeroutput["tally"] = asdict(session.config.stash[TALLY])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker saw; one that died has left nothing."""
    seen = getattr(node, "workeroutput", {}).get("tally")
    if seen:
        node.config.stash.setdefault(TALLY, Tally()).add(Tally(**seen))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was seen."""
    tally = config.stash.get(TALLY, None)
    if tally is None:
        return
    terminalreporter.section("SLURM")
    terminalreporter.line(f"{tally.jobs} jobs, {tally.requeues} requeues")
    terminalreporter.line(f"{tally.stops} stops and resumes: {tally.missing} steps lost, {tally.repeated} repeated")
    for harm, (seconds, repeated) in tally.recoveries.items():
        terminalreporter.line(f"{harm}: {seconds:.0f} s until it trained again, {repeated} steps repeated")
