"""`python -m launchers.local` and torchrun as a user meets them: Ctrl-C, a killed process, a damaged shard."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import Told
from tiny_run import STEPS, TinyData, alter_images, assert_same, tiny_settings

from launchers.local import main as launch
from moce_ds.analysis.run_folder import read_metrics
from moce_ds.checkpoint_files import find, steps_of
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet

_SECONDS = 90  # a start takes about 5 s on an idle machine
LOCAL = (sys.executable, "-m", "launchers.local", "--nproc", "2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moce_ds")


@contextmanager
def launched(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A running launcher, its output in one pipe; whatever is left of it in the end is killed."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        for pid in ranks_of(process).values():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process number of every rank that a launcher has started and not yet seen end."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    found = {}
    for pid in children.read_text().split() if children.exists() else ():
        rank = re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text())
        if rank:
            found[int(rank[1])] = int(pid)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def wait_for_step(run: Path, step: int) -> None:
    """Return when `metrics.jsonl` has so many records."""
    wait_until(lambda: len(read_metrics(run / "metrics.jsonl")) >= step)


def run_to_end(*command: str | Path) -> tuple[int, str]:
    """Exit status and output."""
    with launched(*command) as process:
        output, _ = process.communicate(timeout=_SECONDS)
    return process.returncode, output


def test_interrupted_run_goes_on_exactly(data: TinyData, runs: Path, two: dict[str, Told]) -> None:
    run = runs / "launched"
    command = (*LOCAL, "pretrain", *tiny_settings(data.shards, run, "experts.ep_size=2", clusters=data.clusters))
    with launched(*command) as launcher:
        wait_for_step(run, 2)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=_SECONDS)
    assert launcher.returncode == 0, output
    (stopped,) = steps_of(run)
    assert 2 <= stopped < STEPS
    assert output.count(f"Stopped after step {stopped} as asked") == 1
    assert "Traceback" not in output

    status, output = run_to_end(*command)
    assert status == 0, output
    assert f"Resuming {run} after step {stopped}." in output and "Traceback" not in output
    assert_same(runs, "two-moce-ep2", "launched", tolerance=0)


def test_interrupted_while_starting(data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(*LOCAL, "pretrain", *tiny_settings(data.shards, run)) as launcher:
        wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{launcher.pid}/maps").read_text())
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=_SECONDS)
    assert (launcher.returncode, output) == (130, "Interrupted.\n")
    assert not run.exists()


def test_a_killed_process_is_named(data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(
        *LOCAL, "pretrain", *tiny_settings(data.shards, run, "optim.epochs=50", "run.checkpoint_every=2")
    ) as launcher:
        wait_for_step(run, 3)
        ranks = ranks_of(launcher)
        assert sorted(ranks) == [0, 1]
        killed = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=_SECONDS)
    assert time.monotonic() - killed < 40
    assert launcher.returncode not in (0, None)
    assert "Process 1 was killed by SIGKILL." in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert find(run).faults() == [], "what was saved before is whole"


def test_a_damaged_shard_ends_all_processes_alike(data: TinyData, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(data.shards, shards)
    sampler = ShuffledSampler(ShardSet.open(shards).count, 16, seed=0)
    alter_images(shards, [i for step in range(3) for i in sampler.batch(step).part(1, 2).ids.tolist()])  # of rank 1
    run = tmp_path / "run"
    began = time.monotonic()
    status, output = run_to_end(*LOCAL, "pretrain", *tiny_settings(shards, run, "optim.epochs=50"))
    assert time.monotonic() - began < 60
    assert status == 1
    assert "was altered after it was written" in output and str(shards) in output
    assert output.count("Error:") == 1
    assert "Traceback" not in output


def test_torchrun(data: TinyData, runs: Path, two: dict[str, Told]) -> None:
    status, output = run_to_end(*TORCHRUN, "pretrain", *tiny_settings(data.shards, runs / "torchrun"))
    assert status == 0, output
    assert_same(runs, "two-mae", "torchrun", tolerance=0)


def test_no_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch(["--nproc", "0", "pretrain"])
    assert "--nproc: got 0; expected at least 1" in capsys.readouterr().err
