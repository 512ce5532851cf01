"""What `moce launch slurm` queues, records and refuses."""

import json
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from submitted import SECONDS, experts, moce, submit
from tiny_run import STEPS, TinyData, losses, tiny_settings

from moce_ds.inspection.study_folder import StudyFolder

LONG = "optim.epochs=5000"


def test_a_run_of_two_nodes_and_four_processes(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    size = ("nodes=2", "tasks_per_node=2", "gpus_per_node=2", "minutes=5", "env.MOCE_TEST=$HOME", "setup=[date]")
    job = submit(cluster, *size, "env.MOCE_DEVICE=cpu", "pretrain", *tiny_settings(data.shards, run))
    job.wait_for("COMPLETED")
    assert len(losses(run)) == STEPS and "= 4 processes x 1 parts x 4" in job.told()
    launch = run / "launches/0001"
    record = json.loads((launch / "launch.json").read_text())
    assert record["command"][:2] == ["moce", "pretrain"] and record["profile"]["tasks_per_node"] == 2
    assert len(record["commit"]) == 40 and record["packages"]["submitit"]
    assert yaml.safe_load((launch / "config.yaml").read_text()) == yaml.safe_load((run / "config.yaml").read_text())
    assert json.loads((launch / "jobs.json").read_text()) == [job.number]


def test_gpus_that_torch_cannot_use_are_an_error(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    """The GPUs of the cluster are not real, so torch sees none of them on any machine."""
    job = submit(cluster, "gpus_per_node=2", "minutes=5", "pretrain", *tiny_settings(data.shards, tmp_path / "run"))
    job.wait_for("FAILED")
    told = job.told()
    # By one of its two processes. The job starts again if the other one is ended before it sees that for itself.
    assert told.count("PyTorch sees no GPU, but ") == told.count("Starting with JobEnvironment") > 0, told


def test_a_verb_that_runs_alone(
    cluster: Cluster, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = submit(cluster, "nodes=2", "gpus_per_node=2", "minutes=5", "inspect", data.shards, "--verify")
    job.wait_for("COMPLETED")
    assert job.known("NumNodes") == "1"
    assert "Verified: everything is as it was written." in job.told()


def test_a_study_becomes_an_array(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    """Its cells measure a task, each in one process, also if several have trained."""
    words = tiny_settings(data.shards, tmp_path / "unused")
    study = tmp_path / "study.yaml"
    (tmp_path / "kinds").mkdir()
    for split in ("train", "test"):
        (tmp_path / "kinds" / split).symlink_to(data.shards)
    settings = {
        "out": str(tmp_path / "study"),
        "pretrain": words[0],
        "set": [words[1]],
        "grid": {"run.seed": [0, 1]},
        "cells": [{"processes": 1}, {"nodes": 2}],
        "tasks": {"kinds": str(tmp_path / "kinds")},
    }
    study.write_text(yaml.safe_dump(settings))
    status, output = moce("launch", "slurm", "minutes=5", "study", study)
    assert status == 0 and output.count("is queued: 2 jobs of") == 2, output
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), SECONDS, "the queue is empty")
    done = StudyFolder.open(tmp_path / "study")
    assert [cell.state for cell in done.cells] == ["done"] * 4 and not done.waiting
    assert len(list((tmp_path / "study").rglob("results.json"))) == 4
    status, output = moce("launch", "slurm", "minutes=5", "study", study)
    assert status == 0 and "4 of 4 cells done" in output and "queued" not in output


def test_a_run_is_not_queued_twice(cluster: Cluster, data: TinyData, tmp_path: Path) -> None:
    words = ("nodes=2", "minutes=5", *experts(data, tmp_path / "run", LONG))
    job = submit(cluster, *words)
    status, output = moce("launch", "slurm", *words)
    assert status == 1 and f"has work in the queue: job {job.number} (" in output, output
    assert f"scancel {job.number}." in output


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (["partition=none"], "Batch job submission failed: Invalid partition"),
        (["account=none"], "Batch job submission failed: Invalid account"),
        (["nodes=9"], "optim.batch_size: 16 is not divisible by 9 processes"),
        (["nodes=8"], "Batch job submission failed: Node count"),
        (["nodes=1", "min_nodes=2"], "min_nodes: 2 is more than nodes 1"),
        (["extra.nonsense=1"], "sbatch refused the job: unrecognized option '--nonsense=1'"),
        (["node=1"], "Did you mean nodes?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(cluster: Cluster, data: TinyData, tmp_path: Path, profile: list[str], told: str) -> None:
    status, output = moce("launch", "slurm", *profile, "pretrain", *tiny_settings(data.shards, tmp_path / "run"))
    assert status == 1 and told in output and "Traceback" not in output, output
    assert not cluster.run("squeue", "--noheader")


def test_an_unknown_verb_is_refused(cluster: Cluster) -> None:
    status, output = moce("launch", "slurm", "nodes=2", "train")
    assert status == 1 and "'train' is not a verb of moce. Did you mean pretrain?" in output
