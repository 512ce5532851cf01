"""Jobs that lose a node, the network or a process: they end soon, begin again by themselves and lose little."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import Cluster
from submitted import SECONDS, Submitted, Tally, experts, missing_steps, moce, repeated_steps, resumed_after, submit
from tiny_run import TinyData, assert_same_state, losses, tiny_settings

from moce_ds.inspection.study_folder import StudyFolder

PAIR = ("nodes=2", "minutes=30")
EVERY = 10  # steps from checkpoint to checkpoint


def recovered(job: Submitted, run: Path, tally: Tally, what: str, harmed: float) -> None:
    """The job trains again, from a checkpoint that is not old, and comes to its end."""
    job.wait_for_step(run, 1, attempt=2)
    seconds = time.monotonic() - harmed
    job.wait_for("COMPLETED")
    told = job.told()
    tally.recoveries[what] = seconds, repeated_steps(told)
    assert job.known("Restarts") == "1" and len(resumed_after(told)) == 1
    tally.requeues += 1
    # While a checkpoint is being written the one before counts.
    assert repeated_steps(told) <= 2 * EVERY and missing_steps(told) == 0


@pytest.mark.parametrize("node", ["node1", "node2"], ids=["of the first process", "of another process"])
def test_node_dies(node: str, cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, *PAIR, *experts(data, run))
    job.wait_for_step(run, EVERY + 2)
    harmed = time.monotonic()
    cluster.kill(node)
    recovered(job, run, tally, f"{node} of 2 dead, another in its place", harmed)
    assert_same_state(run, alone, tolerance=0)


def test_fewer_nodes_are_left(cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, "nodes=4", "min_nodes=2", "minutes=30", *experts(data, run))
    job.wait_for_step(run, EVERY + 2)
    assert job.known("NumNodes") == "4"
    harmed = time.monotonic()
    cluster.kill("node4")
    recovered(job, run, tally, "node4 of 4 dead, the run goes on with 2", harmed)
    third = job.log.with_name(f"{job.number}_2_log.out").read_text()
    assert "node3 stays idle: the run can use 2 of 3 nodes." in third
    np.testing.assert_allclose(losses(run), losses(alone), rtol=0, atol=1e-4)  # other sums, over two hundred steps


def test_node_is_dead_before_the_job_begins(
    cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, "nodes=4", "min_nodes=2", "minutes=30", "extra.hold=true", *experts(data, run))
    cluster.kill("node2")
    cluster.run("scontrol", "release", job.number)  # SLURM has not missed the node yet
    job.wait_for("COMPLETED")
    # By the first process, if srun stops it before it kills it, else by the end of the job's script.
    assert "Application launch failed" in job.told() and "goes back into the queue" in job.told()
    assert job.known("Restarts") == "1" and missing_steps(job.told()) == 0
    tally.requeues += 1
    np.testing.assert_allclose(losses(run), losses(alone), rtol=0, atol=1e-4)


def test_srun_that_fails_is_tried_again(
    cluster: Cluster, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failing = 'if [ -z "$SLURM_RESTART_COUNT" ]; then srun() { return 7; }; fi'
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump({"minutes": 5, "setup": ["set -e", failing]}))
    job = submit(cluster, "profile.yaml", "inspect", data.shards)
    job.wait_for("COMPLETED")
    assert "srun ended with status 7, and no process of the job gave a reason." in job.told()
    assert "goes back into the queue: failure 1 of at most 3 in a row" in job.told()
    assert job.known("Restarts") == "1"


def test_network_is_cut(cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, *PAIR, *experts(data, run))
    job.wait_for_step(run, EVERY + 2)
    harmed = time.monotonic()
    cluster.cut("node2")
    recovered(job, run, tally, "node2 of 2 cut off, another in its place", harmed)
    written = (run / "metrics.jsonl").read_bytes()
    cluster.join("node2")
    cluster.wait_until(lambda: cluster.state("node2") == "idle", SECONDS, "the old processes have ended")
    assert (run / "metrics.jsonl").read_bytes() == written
    assert_same_state(run, alone, tolerance=0)


def test_process_is_killed(cluster: Cluster, data: TinyData, alone: Path, tally: Tally, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, *PAIR, *experts(data, run))
    job.wait_for_step(run, EVERY + 2)
    harmed = time.monotonic()
    os.kill(_trainer(job, rank=1), signal.SIGKILL)
    recovered(job, run, tally, "a process of 2 killed", harmed)
    assert "Rank 1 on node2 was killed by SIGKILL." in job.log.with_name(f"{job.number}_1_log.out").read_text()
    assert_same_state(run, alone, tolerance=0)


def test_too_many_failures_end_the_job(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, *PAIR, "max_failures=0", *experts(data, run))
    job.wait_for_step(run, 1)
    os.kill(_trainer(job, rank=0), signal.SIGKILL)
    job.wait_for("FAILED")
    assert "1 failures in a row; max_failures=0 are allowed." in job.told()
    assert job.known("Restarts") == "0"


def test_a_cell_of_an_array_begins_again_alone(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    base, shards, _, *words = tiny_settings(data.shards, tmp_path, "optim.epochs=30", "run.checkpoint_every=10")
    grid = {"grid": {"run.seed": [0, 1]}, "cells": [{"nodes": 2}]}
    settings = {"out": str(tmp_path / "study"), "pretrain": base, "set": [shards, *words], **grid}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    status, output = moce("launch", "slurm", "minutes=5", "study", tmp_path / "study.yaml")
    assert status == 0, output
    number = re.findall(r"^Job (\d+) is queued", output, re.MULTILINE)[0]
    begun = tmp_path.glob
    cluster.wait_until(lambda: len(list(begun("study/**/metrics.jsonl"))) == 2, SECONDS, "both cells train")
    # That task whose own number is the array's.
    os.kill(_trainer(Submitted(cluster, number, tmp_path), rank=0), signal.SIGKILL)
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), SECONDS, "the queue is empty")
    shown = cluster.run("scontrol", "--oneliner", "show", "job", number)
    assert sorted(re.findall(r"Restarts=(\d+)", shown)) == ["0", "1"], shown
    assert [cell.state for cell in StudyFolder.open(tmp_path / "study").cells] == ["done"] * 2


def _trainer(job: Submitted, rank: int) -> int:
    """The process that trains as that rank."""
    of_cluster = f"SLURM_CONF={job.cluster.environment['SLURM_CONF']}"  # other clusters have jobs of that number
    wanted = {word.encode() for word in (of_cluster, f"SLURM_JOB_ID={job.number}", f"RANK={rank}")}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended meanwhile
            if wanted <= set(path.read_bytes().split(b"\0")):
                return int(path.parent.name)
    raise AssertionError(f"no process is rank {rank} of job {job.number}")
