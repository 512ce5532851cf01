"""A team of processes: every task is done once, errors arrive, and a dead process is noticed."""

import os
import signal
from collections.abc import Iterator

import pytest

from moce_ds.common.errors import DataError
from moce_ds.common.host.team import LostWorkerError, as_they_come


def work(task: str) -> Iterator[int | str]:
    """Reports progress once, then yields the process, or fails in one of two ways."""
    yield 1
    if task == "damaged":
        raise DataError("x is damaged")
    if task == "fatal":
        os.kill(os.getpid(), signal.SIGKILL)
    yield f"{task} {os.getpid()}"


def done(tasks: list[str], workers: int) -> dict[str, list[int | str]]:
    found: dict[str, list[int | str]] = {task: [] for task in tasks}
    for task, value in as_they_come(work, iter(tasks), workers, __name__):
        found[task].append(value)
    return found


def test_tasks_are_taken_as_workers_become_free() -> None:
    found = done(list("abcdef"), 2)
    assert all(progress == 1 and str(result).startswith(task) for task, (progress, result) in found.items())
    processes = {str(result).split()[1] for _, result in found.values()}
    assert len(processes) == 2 and str(os.getpid()) not in processes
    assert done(["a"], 1) == {"a": [1, f"a {os.getpid()}"]}


def test_an_error_and_a_dead_process_are_told() -> None:
    with pytest.raises(DataError, match="x is damaged"):
        done(["a", "damaged"], 2)
    with pytest.raises(LostWorkerError) as lost:
        done(["a", "fatal"], 2)
    assert lost.value.task == "fatal"
