"""One process alone: what it needs of the environment is there while it needs it, and gone after it."""

import os

import pytest

from moce_ds.runtime import started

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_a_process_alone_leaves_no_rank_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with started() as runtime:
        assert (runtime.rank, runtime.world_size) == (0, 1)
        assert all(name in os.environ for name in NAMES)
    # Else a launcher that this process starts afterwards would take itself for a rank.
    assert [name for name in NAMES if name in os.environ] == ["LOCAL_RANK"], "which was given"
