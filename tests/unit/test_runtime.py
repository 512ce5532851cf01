"""One process alone: what it needs of the environment is there while it needs it, and gone after it."""

import os
from functools import cache

import pytest

from moce_ds.distributed import runtime
from moce_ds.distributed.runtime import lone_device, started
from moce_ds.host import threads

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_a_process_alone_leaves_no_rank_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with started() as alone:
        assert (alone.rank, alone.world_size) == (0, 1)
        assert all(name in os.environ for name in NAMES)
    # Else a launcher that this process starts afterwards would take itself for a rank.
    assert [name for name in NAMES if name in os.environ] == ["LOCAL_RANK"], "which was given"


def test_a_process_without_a_group_says_once_how_many_threads_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "_log_threads", cache(runtime._log_threads.__wrapped__))
    monkeypatch.setattr(threads, "notice", lambda: "3 threads per process")
    lone_device()
    lone_device()
    assert capsys.readouterr().err == "3 threads per process\n"
