"""How often a job begins again. Real jobs are in tests/slurm."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from submitit.slurm.slurm import SlurmJobEnvironment

from moce_ds.cli.launch.slurm_job import SECRET_FILE, JobStart, Rank, place
from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.launch.slurm_queue import begin_launch
from moce_ds.common.errors import LOST_PEER
from moce_ds.common.host.rank import SECRET

LOST, STOPPED = 77, 76
ROOT = Path(__file__).parents[4]
RANK = (
    "import signal, sys; from moce_ds.cli.launch.slurm_job import Rank; "
    "Rank(tuple(sys.argv[1:]), (), 3, signal.SIGUSR2)()"
)


def start(folder: Path, restart: int) -> JobStart:
    return JobStart("7_1", folder, restart)


def after(capsys: pytest.CaptureFixture[str], folder: Path, ends: list[tuple[int, float]]) -> str:
    """What a start says that bears no failure, after starts that ended with a status after some seconds."""
    for restart, (status, seconds) in enumerate(ends):
        start(folder, restart).record_end("rank 0", status, seconds, lost=status == LOST)
    assert not start(folder, len(ends) - 1).begin_again(max_failures=0)
    return capsys.readouterr().err


def test_losses_in_a_row_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "3 failures in a row" in after(capsys, tmp_path, [(LOST, 5)] * 3)


@pytest.mark.parametrize("between", [(STOPPED, 5), (LOST, 4000)], ids=["stopped as asked", "lost after an hour"])
def test_what_ran_well_begins_the_count_anew(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, between: tuple[int, float]
) -> None:
    assert "2 failures in a row" in after(capsys, tmp_path, [(LOST, 5), (LOST, 5), between, (LOST, 5), (LOST, 4000)])


@pytest.mark.parametrize("statuses", [(1, LOST), (LOST, 1)], ids=str)
def test_a_loss_counts_whoever_records_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, statuses: tuple[int, int]
) -> None:
    assert not start(tmp_path, 0).has_ended
    for rank, status in enumerate(statuses):
        start(tmp_path, 0).record_end(f"rank {rank}", status, 5, lost=status == LOST)
    assert start(tmp_path, 0).has_ended and not start(tmp_path, 1).has_ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7_1_end_0.json", "7_1_lost_0.json"], "no draft is left"
    start(tmp_path, 0).begin_again(max_failures=0)
    assert "1 failures in a row" in capsys.readouterr().err


def test_processes_of_a_start_share_a_secret_that_others_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = []
    for name in ("one", "two"):
        folder = begin_launch(tmp_path / name, ["pretrain"], SlurmProfile())
        assert (folder / SECRET_FILE).stat().st_mode & 0o777 == 0o600
        assert (folder / "launch.json").stat().st_mode & 0o077, "nothing else is hidden"
        for node in ("0", "1"):
            job = {"JOB_ID": "7", "NTASKS": "4", "JOB_NUM_NODES": "2", "NODEID": node, "PROCID": node, "LOCALID": "0"}
            for variable, value in (job | {"JOB_NODELIST": "node[1-2]"}).items():
                monkeypatch.setenv(f"SLURM_{variable}", value)
            places = [place(SlurmJobEnvironment(), start(folder, restart), nodes=2) for restart in (0, 1)]
            secrets.append([given[SECRET] for given in places])
            assert {given["MASTER_ADDR"] for given in places} == {"node1"}
    assert secrets[0] == secrets[1] != secrets[2] == secrets[3], "of all nodes, but not of another launch"
    assert len(secrets[0][0]) > 32 and secrets[0][0] != secrets[0][1], "another one at each start"


def test_the_processes_of_one_node_meet_on_its_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_ID": "7", "NTASKS": "4", "JOB_NUM_NODES": "2", "NODEID": "0", "PROCID": "1", "LOCALID": "1"}
    for variable, value in (job | {"JOB_NODELIST": "node[1-2]"}).items():
        monkeypatch.setenv(f"SLURM_{variable}", value)
    given = place(SlurmJobEnvironment(), start(tmp_path, 0), nodes=1)  # the other node stays idle
    assert (given["MASTER_ADDR"], given["WORLD_SIZE"], given["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", "2", "2")


def started(folder: Path, child: str, rank: int = 3) -> subprocess.Popen[str]:
    """One of a job's four processes, whose child runs some Python and says when it is there."""
    job = {"JOB_ID": "7", "NTASKS": "4", "JOB_NUM_NODES": "4", "NODEID": rank, "PROCID": rank, "LOCALID": "0"}
    slurm = {f"SLURM_{name}": str(value) for name, value in (job | {"JOB_NODELIST": "node[1-4]"}).items()}
    command = [sys.executable, "-c", RANK, sys.executable, "-c", f"print('there', flush=True); {child}"]
    environment = {**os.environ, **slurm, "SUBMITIT_FOLDER": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)


def fourth_process(folder: Path, child: str, asked: bool) -> int:
    """How it ends."""
    with started(folder, child) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        if asked:
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)


def test_a_stop_is_told_by_the_first_process_alone(tmp_path: Path) -> None:
    """A srun that cannot start all processes asks the others to stop. If the first is killed before it can say so, none
    of them explains the end of the job, which then begins again."""
    assert fourth_process(tmp_path, "import time; time.sleep(60)", asked=True) == 0
    assert not JobStart("7", tmp_path, 0).has_ended
    assert fourth_process(tmp_path, "raise SystemExit(2)", asked=False) == 2
    assert JobStart("7", tmp_path, 0).has_ended


@pytest.mark.parametrize("failed", [False, True], ids=["asked by SLURM", "another process failed"])
def test_a_job_is_requeued_after_a_stop_but_not_after_a_failure(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one process has failed, srun ends the others with the signal by which SLURM asks for a stop."""
    for name, script in (("squeue", "echo RUNNING"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if failed:
        JobStart("7", tmp_path, 0).record_end("rank 1 on node2", 2, 3.0, lost=False)
    with started(tmp_path, "import time; time.sleep(60)", rank=0) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == STOPPED
    assert failed != (tmp_path / "asked").exists()


_UNRECORDED = (
    r"Error: The end of rank 3 on \S+ cannot be recorded: No such file or directory .*\n"
    r"(WARNING: Rank 3 on \S+ ended with status 75\.\n)?"
)


def test_an_end_that_cannot_be_recorded_is_one_message_and_keeps_the_status(tmp_path: Path) -> None:
    """As where the disk of the logs is full. A loss is not put back into the queue: uncounted, it could be for ever."""
    gone = tmp_path / "gone"  # removed while the child runs; root may write into every folder
    for child, status in (("raise SystemExit(3)", 3), (f"raise SystemExit({LOST_PEER})", LOST_PEER)):
        gone.mkdir(exist_ok=True)
        (gone / SECRET_FILE).write_text("word")
        with started(gone, f"import shutil; shutil.rmtree({str(gone)!r}); {child}") as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == status
        assert re.fullmatch(_UNRECORDED, err)
        assert "queue" not in out + err


@pytest.mark.parametrize(("number", "status"), [(errno.ESTALE, LOST_PEER), (errno.EACCES, 1)])
def test_a_secret_that_cannot_be_read_is_one_message(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"JOB_ID": "7", "NTASKS": "1", "JOB_NUM_NODES": "1", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    for variable, value in (job | {"JOB_NODELIST": "node1"}).items():
        monkeypatch.setenv(f"SLURM_{variable}", value)
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    (tmp_path / SECRET_FILE).write_text("word")
    fault = OSError(number, os.strerror(number), str(tmp_path / SECRET_FILE))
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=fault))  # no file server is at hand that loses a file
    with pytest.raises(SystemExit) as ended:
        Rank((sys.executable, "-c", ""), (), 3, signal.SIGUSR2)()
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert re.fullmatch(rf"Error: This process of the job on \S+ cannot run: {os.strerror(number)} .*\n", told), told
