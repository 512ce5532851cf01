"""How many threads a process takes: the user's word, a quota, what others leave free, and how processes share."""

import os
from pathlib import Path

import pytest
import torch

from moce_ds.common.host import threads
from moce_ds.common.host.machine import control_groups


def test_the_users_number_is_left_alone() -> None:
    mine = {"OMP_NUM_THREADS": "7"}
    threads.apply_choice(mine)
    assert mine == {"OMP_NUM_THREADS": "7"} and threads.shared_by(2, mine) == {} and threads.notice(mine) is None


def test_processes_share_what_the_outermost_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cpus", lambda: 9)
    outer: dict[str, str] = {}
    threads.apply_choice(outer)
    assert outer["OMP_NUM_THREADS"] == "9" and "9 threads per process" in (threads.notice(outer) or "")
    monkeypatch.setattr(threads, "free_cpus", lambda: 1)  # since the outer process is at work
    child = outer | threads.shared_by(4, outer)
    assert child["OMP_NUM_THREADS"] == "2"
    threads.apply_choice(child | {"LOCAL_WORLD_SIZE": "4"})
    assert child["OMP_NUM_THREADS"] == "2"
    assert threads.shared_by(20, child)["OMP_NUM_THREADS"] == "1"
    child["OMP_NUM_THREADS"] = "3"  # a user's, in between
    assert threads.shared_by(4, child) == {}


@pytest.mark.parametrize(
    ("allowed", "cpus", "mean", "running", "free"),
    [
        (8, 8, 0.2, 0, 8),
        (8, 8, 5.9, 6, 2),
        (8, 8, 40.0, 50, 1),
        (8, 8, 7.0, 0, 8),
        (8, 8, 0.1, 9, 8),
        (2, 64, 20, 20, 2),
    ],
)
def test_load_of_others_is_left_to_them(allowed: int, cpus: int, mean: float, running: int, free: int) -> None:
    assert threads.cpus_left(allowed, cpus, mean, running) == free


def test_a_quota_of_the_control_group_counts(tmp_path: Path) -> None:
    assert threads.cgroup_cpus(tmp_path) > 1000
    (tmp_path / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cgroup_cpus(tmp_path) == 3
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert threads.cgroup_cpus(tmp_path) == 4
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.cgroup_cpus(tmp_path) > 1000


@pytest.mark.parametrize(
    ("told", "made", "found"),
    [
        ("0::/job/step\n", ["job/step"], ["job/step", "job", ""]),
        ("0::/of/the/host\n", [], [""]),  # a container with its own folders and the host's names
        ("0::/../../job\n", ["job"], ["job", ""]),
        ("4:cpu,cpuacct:/job\n3:memory:/other\n", ["cpu/job", "memory/other"], ["cpu/job", "cpu"]),
        ("", [], []),
    ],
)
def test_the_groups_above_count_too(told: str, made: list[str], found: list[str], tmp_path: Path) -> None:
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    own.write_text(told)
    for folder in ["", *made]:
        (mounted / folder).mkdir(parents=True, exist_ok=True)
    assert list(control_groups("cpu", own, mounted)) == [mounted / folder for folder in found]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(control_groups("cpu", tmp_path / "none", tmp_path)) == []


def test_the_tightest_group_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, quota in (("job", "200000"), ("job/step", "max")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(threads, "control_groups", lambda _: [tmp_path / "job/step", tmp_path / "job"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert threads.allowed_cpus() == 2


def test_a_resumed_run_tells_its_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now = torch.get_num_threads()
    monkeypatch.setattr(threads, "allowed_cpus", lambda: now + 1)
    chosen = {"OMP_NUM_THREADS": str(now), threads.CHOSEN: str(now)}
    assert threads.keep(now, chosen) is None and threads.keep(None, chosen) is None
    try:
        assert (threads.keep(now + 1, chosen) or "").startswith(f"{now + 1} threads per process, as this run")
        assert torch.get_num_threads() == now + 1
    finally:
        torch.set_num_threads(now)
