"""Submitting as a user does, and reading what SLURM, the job's log and the run know of it."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster
from launching import local
from tiny_run import TinyData, tiny_settings

from moce_ds.common.storage.metrics_file import read_metrics
from tests.examples.moce_command import run_here

SECONDS = 400
"""In which everything that a test waits for happens, even on a busy machine."""

EPOCHS = 30  # of 5.6 steps: some seconds of training, in which a test finds the time to harm it


@dataclass
class Tally:
    """What all tests together saw, for the last lines of the session.

    Attributes:
        jobs: that the cluster ran.
        requeues: of all jobs that were watched to their end.
        stops: stops that were asked for, after which the run went on; `missing` and `repeated` steps of those runs.
        recoveries: by harm, seconds to the first step recorded after it, and the steps that were taken again.
    """

    jobs: int = 0
    requeues: int = 0
    stops: int = 0
    missing: int = 0
    repeated: int = 0
    recoveries: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """What was seen elsewhere too."""
        for name in ("jobs", "requeues", "stops", "missing", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recoveries |= other.recoveries


@dataclass(frozen=True)
class Submitted:
    """A job that was put into the queue by `moce launch slurm`."""

    cluster: Cluster
    number: str
    log: Path

    def told(self) -> str:
        """What its first process has written, in all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def known(self, name: str) -> str:
        """What SLURM knows of it, such as JobState or Restarts."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def wait_for(self, state: str) -> None:
        """Return when the job is in that state."""
        self.cluster.wait_until(lambda: self.known("JobState") == state, SECONDS, f"job {self.number} is {state}")

    def wait_for_step(self, run: Path, step: int, attempt: int = 1) -> None:
        """Return when so many steps are on record, the last of them by that attempt or a later one."""

        def there() -> bool:
            records = read_metrics(run / "metrics.jsonl")
            return bool(records) and records[-1]["step"] >= step and records[-1]["attempt"] >= attempt

        self.cluster.wait_until(there, SECONDS, f"step {step} of attempt {attempt} in {run}")


def submit(cluster: Cluster, *words: str | Path, log: Path | None = None) -> Submitted:
    """`moce launch slurm WORDS`, which must succeed."""
    status, output = moce("launch", "slurm", *words)
    assert status == 0, output
    job, path = re.search(r"^Job (\d+) is queued", output, re.M), re.search(r"tail -F (.*)", output)
    assert job and path, output
    return Submitted(cluster, job[1], log or Path(path[1]))


def moce(*words: str | Path) -> tuple[int, str]:
    """Exit status and output of a verb."""
    said = run_here(*words)
    return said.status, said.out + said.err


def experts(data: TinyData, run: Path, *other: str) -> list[str]:
    """The words of a run of experts that lie on two processes, with a checkpoint every ten steps."""
    own = ("experts.ep_size=2", "run.checkpoint_every=10", f"optim.epochs={EPOCHS}", "run.peer_timeout=8")
    return ["pretrain", *tiny_settings(data.shards, run, *own, *other, clusters=data.clusters)]


def run_alone(data: TinyData, run: Path) -> Path:
    """The same run, left alone on two processes of this machine."""
    subprocess.run([*local(2), *experts(data, run)], check=True, capture_output=True)
    return run


def resumed_after(told: str) -> list[int]:
    """The steps after which a run went on, by its log."""
    return [int(step) for step in re.findall(r"Resuming \S+ after step (\d+)", told)]


def repeated_steps(told: str) -> int:
    """How many steps were taken again, by the log of all starts of a run, which has a line for each."""
    steps = _told_steps(told)
    return len(steps) - len(set(steps))


def missing_steps(told: str) -> int:
    """How many steps up to the last one were never taken."""
    steps = set(_told_steps(told))
    return max(steps) - len(steps)


def _told_steps(told: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", told, re.M)]
