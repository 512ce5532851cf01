"""A rank that is killed, stops, or fails alone: the others end, say which it was and where, and all start again."""

import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import SECONDS, launched, local, ranks_of, run_to_end, send, wait_for_step, wait_until
from tiny_run import STEPS, TinyData, assert_same, tiny_settings

from moce_ds.common.errors import LOST_PEER, STOPPED
from moce_ds.common.storage.metrics_file import read_metrics

RANKS_SCRIPT = (sys.executable, Path(__file__).with_name("ranks.py"))


@pytest.fixture(scope="module")
def four(tiny_data: TinyData, runs: Path) -> list[str]:
    """Words of a run of four ranks, 2 x 2 experts; "four-kept" is that run without a loss of any rank."""
    words = tiny_settings(
        tiny_data.shards, runs / "four-kept", "experts.ep_size=2", "run.checkpoint_every=2", clusters=tiny_data.clusters
    )
    status, output = run_to_end(*local(4), "pretrain", *words)
    assert status == 0, output
    return words


def test_a_run_outlives_a_killed_and_a_stopped_rank(four: list[str], runs: Path) -> None:
    run = runs / "four-lost"
    with launched(
        *local(4, "--max-restarts", "2"), "pretrain", *four, f"run.out={run}", "run.peer_timeout=5"
    ) as launcher:
        for attempt, (number, lost) in enumerate([(signal.SIGKILL, 3), (signal.SIGSTOP, 1)], start=1):
            wait_for_step(run, 3 * attempt, attempt)
            ranks = ranks_of(launcher)
            assert sorted(ranks) == [0, 1, 2, 3]
            send(number, ranks[lost])
            wait_until(lambda old=ranks: not any(Path(f"/proc/{pid}").exists() for pid in old.values()))
        output, _ = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 0, output
    (killed_at,) = re.findall(
        r"Error: Rank 3 on \S+ has not answered for 5 s at step (\d+)\. It has died .*Rerun", output
    )
    stopped_at = set(re.findall(r"Error: Rank 1 on \S+ has not answered for 5 s at step (\d+)\. It has died", output))
    assert 3 <= int(killed_at) <= STEPS and len(stopped_at) == 1 and 6 <= int(*stopped_at) <= STEPS
    assert "Process 3 was killed by SIGKILL." in output
    assert re.findall(r"Restart (\d) of at most 2\.", output) == ["1", "2"]
    assert "Resuming" in output and "damaged" not in output

    records = read_metrics(run / "metrics.jsonl")
    attempts = [record["attempt"] for record in records]
    assert attempts[0] == 1 and attempts[-1] == 3 and attempts == sorted(attempts)
    assert not np.isnan([record["loss"] for record in records]).any()
    assert_same(runs, "four-kept", "four-lost", tolerance=0)


def test_an_unexpected_error_of_one_rank_reaches_the_others() -> None:
    status, output = run_to_end(*RANKS_SCRIPT, "defect", "1")
    assert status in (1, LOST_PEER), output
    told = re.findall(r"Error: Rank 2 on \S+ ended at step 7: RuntimeError: this is a defect", output)
    assert len(told) == 2 and output.count("Restart 1 of at most 1.") == 1, output
    assert "Traceback" in output, "of rank 2: a defect"


def test_an_explained_error_of_one_rank_is_told_by_the_others_and_costs_no_restart() -> None:
    status, output = run_to_end(*RANKS_SCRIPT, "fault", "1")
    assert status == 1 and "Restart" not in output, output
    assert re.search(r"Error: Rank 2 on \S+ ended at step 7: the disk is not there", output), output
    assert "Traceback" not in output


@pytest.mark.parametrize("role", ["disk", "disk, agreed"])
def test_a_disk_that_fails_on_one_machine_is_worth_a_restart(role: str) -> None:
    status, output = run_to_end(*RANKS_SCRIPT, role, "0")
    assert status == LOST_PEER, output
    told = re.findall(r"Error: Rank 2 on \S+ ended at step 7: shards/0\.tar: Input/output error", output)
    assert len(told) == (role == "disk"), "by the others; not where all know it"


def test_an_interrupted_rank_stops_all_as_asked() -> None:
    status, output = run_to_end(*RANKS_SCRIPT, "interrupted", "1")
    assert status == STOPPED and "Restart" not in output, output
    assert re.fullmatch(r"Rank 2 on \S+ was interrupted at step 7\.\n", output), "once a machine"


def test_what_a_user_has_ended_is_not_started_again() -> None:
    with launched(*RANKS_SCRIPT, "sleep", "3") as launcher:
        wait_until(lambda: len(ranks_of(launcher)) == 3)
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=SECONDS)
    assert (launcher.returncode, output) == (STOPPED, ""), "as asked"
