"""A real study of tiny runs: killed and finished by the same command, with a cell that fails; and stopped by Ctrl-C."""

import csv
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from launching import SECONDS, launched, run_to_end, send, wait_for_step, wait_until
from tiny_run import STEPS, TinyData, tiny_settings, write_images

from moce_ds.checkpoint.format import steps_of
from moce_ds.cli.workflow.study_grid import Cell, StudySettings, cells_of
from moce_ds.common.config.settings import load
from moce_ds.common.errors import STOPPED
from moce_ds.common.storage.locks import is_held
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.inspection.study_folder import CellRecord
from tests.examples.moce_command import run_here

STUDY = (sys.executable, "-m", "moce_ds", "study")


def write_study(
    path: Path, data: TinyData, cells: Sequence[dict[str, object]], *words: str, **given: object
) -> list[Cell]:
    """Write a study file of MoCE runs in two processes; returns its cells."""
    base, *fixed = tiny_settings(data.shards, path, *words, clusters=data.clusters)
    fixed = [word for word in fixed if not word.startswith(("run.out", "experts.num"))]
    tree = {"out": str(path.with_suffix("")), "pretrain": base, "set": fixed, "cells": cells, "processes": 2, **given}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return cells_of(load(StudySettings, path))


def record_of(cell: Cell) -> CellRecord:
    record = cell.record()
    assert record is not None
    return record


def processes_of(study: subprocess.Popen[str]) -> list[int]:
    """A study's process, that of its cell, and those of the cell's run."""
    found = [study.pid]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found += map(int, children.read_text().split() if children.exists() else ())
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a task's training and test images."""
    folder = tmp_path_factory.mktemp("task")
    for part, count in (("train", 60), ("test", 30)):
        write_shards(write_images(folder / "images" / part, count), folder / part, ShardSettings(workers=1))
    return folder


def test_a_killed_study_is_finished_by_the_same_command(tiny_data: TinyData, task: Path, tmp_path: Path) -> None:
    # A shared expert cannot be exported: the second cell fails after its run, which is one of a single expert.
    points = [
        {"experts.num": 4, "experts.ep_size": 2},
        {"experts.num": 1, "experts.shared_expert": True, "experts.combine": "prob"},
        {"experts.num": 2, "experts.ep_size": 2},
    ]
    path, out = tmp_path / "study.yaml", tmp_path / "study"
    four, failing, two = write_study(path, tiny_data, points, tasks={"some": str(task)})
    with launched(*STUDY, path) as study:
        wait_for_step(four.run, 1)
        send(signal.SIGKILL, *processes_of(study))
        wait_until(lambda: not is_held(four.lock))
    assert record_of(four).state == "begun" and failing.record() is None

    status, output = run_to_end(*STUDY, path)
    assert status == 1 and "Traceback" not in output, output
    for number, cell, how in ((1, four, "done in"), (2, failing, "failed after"), (3, two, "done in")):
        assert re.search(rf"cell {number} of 3 {cell.name} {how} \d+ s", output), output
    assert "2 of 3 cells done" in output
    assert f"ERROR: cell {failing.name} failed (log: {failing.log}" in output and "experts.k=1 and no shared" in output
    assert record_of(failing).state == "failed" and "no shared expert" in record_of(failing).message
    assert [len(read_metrics(cell.run / "metrics.jsonl")) for cell in (four, failing, two)] == [STEPS] * 3
    check_measures(record_of(four), record_of(two))

    kept = (four.folder / "cell.json").stat().st_mtime_ns
    said = run_here("study", path, "--cell", four.name)
    assert said.status == 0 and said.out.startswith("1 of 1 cell done"), said
    assert (four.folder / "cell.json").stat().st_mtime_ns == kept, "what is done is not run again"
    assert run_here("report", out).status == 0 and "2 of 3 cells done." in (out / "report.html").read_text()
    with open(out / "study.csv", newline="") as file:
        assert [line["state"] for line in csv.DictReader(file)] == ["done", "failed", "done"]


def check_measures(four: CellRecord, two: CellRecord) -> None:
    mlp = 2 * 32 * 128 + 128 + 32
    for record, experts in ((four, 4), (two, 2)):
        found = record.measures
        assert found["stored_parameters"] - found["active_parameters"] == 2 * (experts - 1) * mlp
        assert found["exchange_bytes"] > 0 < found["images_per_second"]
        assert 0 <= found["probe some"] <= 1
        # Torch and DeepSpeed alone take more than 100 MB; a wrong unit would be a factor of 1024 off.
        assert 1e8 < found["peak_memory"] < 2e10


def test_ctrl_c_stops_the_running_cell_at_a_step(tiny_data: TinyData, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    first, second = write_study(
        path, tiny_data, [{"experts.num": 2}, {"experts.num": 4}], "optim.epochs=500", processes=1
    )
    with launched(*STUDY, path) as study:
        wait_for_step(first.run, 2)
        study.send_signal(signal.SIGINT)
        output, _ = study.communicate(timeout=SECONDS)
    assert study.returncode == STOPPED, output
    assert "cell 1 of 2 num=2 stopped\nStopped as asked, 0 of 2 cells done. Rerun the same command to resume" in output
    assert record_of(first).state == "begun" and second.record() is None
    (stopped,) = steps_of(first.run)
    assert f"Stopped after step {stopped} as asked" in first.log.read_text()
