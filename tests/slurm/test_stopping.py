"""Jobs that are stopped by their time limit, other jobs or their owner: no step is lost, none is taken twice."""

from pathlib import Path

import pytest
from cluster import Cluster
from submitted import (
    SECONDS,
    Submitted,
    Tally,
    experts,
    missing_steps,
    repeated_steps,
    resumed_after,
    submit,
)
from tiny_run import TinyData, assert_same_state

PAIR = ("nodes=2", "minutes=30")


def count_steps(told: str, tally: Tally) -> None:
    """A run that was stopped and went on took every step once, by its log."""
    stops = len(resumed_after(told))
    assert stops, told
    tally.stops += stops
    tally.missing += missing_steps(told)
    tally.repeated += repeated_steps(told)
    assert (missing_steps(told), repeated_steps(told)) == (0, 0)


def test_time_limit(cluster: Cluster, data: TinyData, tally: Tally, tmp_path: Path) -> None:
    run = tmp_path / "run"
    limit = ("nodes=2", "minutes=2", "signal_seconds=30")
    job = submit(cluster, *limit, *experts(data, run, "optim.epochs=5000"))
    # Not after one start: on a busy machine SLURM may warn a job of two minutes before its first step.
    cluster.wait_until(lambda: resumed_after(job.told()), SECONDS, "the run goes on from a step")
    assert job.known("Restarts") != "0"
    cluster.run("scancel", job.number)
    job.wait_for("CANCELLED")
    assert "goes back into the queue: stopped as requested" in job.told()
    count_steps(job.told(), tally)
    tally.requeues += int(job.known("Restarts"))


@pytest.mark.parametrize(
    ("partition", "requeued_by_us"),
    [("low", True), ("abrupt", False)],
    ids=["warned before", "no time after the warning"],
)
def test_preemption(
    partition: str, requeued_by_us: bool, cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, *PAIR, f"partition={partition}", *experts(data, run))
    job.wait_for_step(run, step=5)
    cluster.run("srun", "--partition=high", "--nodes=4", "--exclusive", "true")
    job.wait_for("COMPLETED")
    assert job.known("Restarts") == "1"
    assert ("goes back into the queue" in job.told()) == requeued_by_us
    count_steps(job.told(), tally)
    tally.requeues += int(job.known("Restarts"))
    assert_same_state(run, alone, tolerance=0)


def test_cancelled_job_goes_on_when_submitted_again(
    cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = submit(cluster, *PAIR, *experts(data, run))
    first.wait_for_step(run, step=5)
    cluster.run("scancel", first.number)
    first.wait_for("CANCELLED")
    _wait_until_gone(first)
    second = submit(cluster, *PAIR, *experts(data, run))
    second.wait_for("COMPLETED")
    assert "goes back into the queue" not in first.told()
    count_steps(first.told() + second.told(), tally)
    assert_same_state(run, alone, tolerance=0)
    assert sorted(path.name for path in (run / "launches").iterdir()) == ["0001", "0002"]


def _wait_until_gone(job: Submitted) -> None:
    cluster = job.cluster
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), SECONDS, "the queue is empty")
