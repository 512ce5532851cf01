"""The trainer's records reach the disk before a checkpoint names the last of them; TensorBoard is only a mirror."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.metrics_file import METRICS
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.schedule import BatchArithmetic, Schedule
from moce_ds.training.trainer import Trainer
from tests.examples.alone import ALONE


def test_the_records_are_on_the_disk_before_a_checkpoint_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, synced, begun = tmp_path / METRICS, [], []

    def fsync(descriptor: int) -> None:
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            synced.append(file.read_text())

    def start(manifest: dict[str, Any], state: object) -> None:
        begun.append((manifest["metrics"], list(synced)))

    lease = RunLease.claim(tmp_path, ALONE)
    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints: Any = SimpleNamespace(start=start, lease=lease, runtime=ALONE)
    task: Any = SimpleNamespace(manifest=lambda _: {}, state=dict)
    engine: Any = None
    schedule, run = Schedule(0.1, 0.0, 2, 0, 0), RunSettings(out=tmp_path)
    trainer = Trainer(engine, task, checkpoints, schedule, BatchArithmetic(16, 1, 1), run)
    with MetricLogger(lease, run, 0, 2, 16, ALONE) as logger:
        logger.metrics({"step": 1, "loss": 0.5, "images_per_second": 1.0, "data_wait": 0.0, "lr": 0.1})
        trainer.save(logger)
    [(mark, before)] = begun
    assert json.loads(before[-1].splitlines()[-1])["check"] == mark


def test_without_tensorboard_a_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its files are a mirror, and its thread's error no business of the terminal."""
    lease = RunLease.claim(tmp_path, ALONE)
    with MetricLogger(lease, RunSettings(out=tmp_path), 0, 40, 16, ALONE) as logger:
        (tmp_path / "tensorboard").rename(tmp_path / "moved")
        (tmp_path / "tensorboard").touch()
        for step in range(1, 41):  # more than the queue of its thread holds
            logger.metrics({"step": step, "loss": 0.5, "images_per_second": 1.0, "data_wait": 0.0, "lr": 0.1})
    assert len((tmp_path / METRICS).read_text().splitlines()) == 40
    said = "".join(capfd.readouterr())
    assert said.count("WARNING: ") == 1 and "Traceback" not in said
    assert f"WARNING: {tmp_path / 'tensorboard'}: nothing more is written for TensorBoard: " in said


def test_tensorboard_that_cannot_begin_is_told_as_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lease = RunLease.claim(tmp_path, ALONE)
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ArtefactError, match=f"{tmp_path} cannot be written"):
        MetricLogger(lease, RunSettings(out=tmp_path), 0, 40, 16, ALONE)
    assert "Traceback" not in "".join(capfd.readouterr())
