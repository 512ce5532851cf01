"""One process alone: what it needs of the environment is there while it needs it, and gone after it."""

import os
import subprocess
import sys

import pytest

from moce_ds.distributed.runtime import started

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


TWICE = """
from moce_ds.common.host.program import run_main
from moce_ds.distributed.runtime import lone_device
from moce_ds.common.host import threads
threads.apply_choice()
run_main(lambda: (lone_device(), lone_device()))
"""


def test_a_process_without_a_group_says_once_how_many_threads_it_takes() -> None:
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", TWICE], env=without, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("per process, since") == 1, done.stderr
