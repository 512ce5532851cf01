"""A full disk stops a run with the reason, leaves the last checkpoint whole, and is nothing that space cannot mend.

The disk is a small file system in memory, which only root can mount; the run on it has two processes.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
from harness import run_distributed
from jobs import Job, Told, run_jobs
from tiny_run import STEPS, TinyData, assert_same, tiny_settings

from moce_ds.checkpoint.format import find, steps_of
from tests.examples.disk import Disk

DISK_SIZE = "24m"


def free(disk: Disk, run: Path) -> None:
    """Make space again, and list what the full disk has left of a run beside it."""
    found = [str(path.relative_to(run)) for part in ("checkpoints/*", "attempts/*/*") for path in run.glob(part)]
    damaged = find(run).faults() if steps_of(run) else []
    disk.free()
    run.with_suffix(".txt").write_text("\n".join([*sorted(found), *damaged]))


@pytest.fixture(scope="module")
def told(tiny_data: TinyData, small_disk: Disk, two_processes: object) -> list[dict[str, Told]]:
    """What two ranks were told: every run meets a full disk, and the same command again when there is space."""

    def words(name: str, *other: str) -> list[str]:
        common = ("experts.ep_size=2", "run.checkpoint_every=3")
        return tiny_settings(tiny_data.shards, small_disk.path / name, *common, *other, clusters=tiny_data.clusters)

    jobs = {}
    for name, other in {"async": [], "sync": ["run.async_checkpoint=false"]}.items():
        jobs[f"{name}-stopped"] = Job(words(name, *other), stop_after=4)
        jobs[f"{name}-full"] = Job(words(name, *other), before=partial(small_disk.fill, left=200_000))
        jobs[f"{name}-mended"] = Job(words(name, *other), before=partial(free, small_disk, small_disk.path / name))
    rarely = "run.checkpoint_every=1000"
    jobs["metrics-stopped"] = Job(words("metrics"), stop_after=4)
    jobs["metrics-full"] = Job(words("metrics", rarely), stop_after=6, act=partial(small_disk.fill, left=0), rank=0)
    jobs["metrics-mended"] = Job(words("metrics"), before=partial(free, small_disk, small_disk.path / "metrics"))
    for name, left in {"start": 0, "clusters": 40_000}.items():
        jobs[f"{name}-full"] = Job(words(name), before=partial(small_disk.fill, left=left))
        jobs[f"{name}-mended"] = Job(words(name), before=partial(free, small_disk, small_disk.path / name))
    return run_distributed(run_jobs, 2, jobs)


@pytest.mark.parametrize("name", ["async", "sync", "metrics", "start", "clusters"])
def test_all_ranks_end_with_the_reason(told: list[dict[str, Told]], small_disk: Disk, name: str) -> None:
    errors = [one[f"{name}-full"].error for one in told]
    assert "ArtefactError" in errors[0] and errors[0].count("No space left on device") == 1
    assert str(small_disk.path / name) in errors[0]
    assert errors[0].split(":", 1)[1] == errors[1].split(":", 1)[1]
    assert "Traceback" not in told[0][f"{name}-full"].text


@pytest.mark.parametrize("name", ["async", "sync", "metrics"])
def test_the_last_checkpoint_stays_whole(told: list[dict[str, Told]], small_disk: Disk, name: str) -> None:
    stopped = told[0][f"{name}-stopped"].steps
    assert 4 <= stopped < 6
    listed = (small_disk.path / f"{name}.txt").read_text().split()
    assert listed == ["checkpoints/step-00000003", f"checkpoints/step-{stopped:08d}"], (
        "nothing is left of the draft, and nothing is damaged"
    )


@pytest.mark.parametrize("name", ["async", "sync", "metrics", "start", "clusters"])
def test_with_space_the_same_command_goes_on(
    told: list[dict[str, Told]], runs: Path, small_disk: Disk, name: str
) -> None:
    assert [one[f"{name}-mended"].steps for one in told] == [STEPS, STEPS], told[0][f"{name}-mended"].error
    if f"{name}-stopped" in told[0]:
        assert f"after step {told[0][f'{name}-stopped'].steps}." in told[0][f"{name}-mended"].text
    shutil.copytree(small_disk.path / name, runs / f"disk-{name}")
    assert_same(runs, "two-moce-ep2", f"disk-{name}", tolerance=0)
    assert find(small_disk.path / name).faults() == []
