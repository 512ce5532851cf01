"""One trainer for every task; its records reach the disk before a checkpoint names the last of them."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import ALONE
from torch import Tensor, nn

from moce_ds.checkpoint.deepspeed_state import latest_valid_checkpoint
from moce_ds.checkpoint.format import Checkpoint, step_folder
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.errors import ArtefactError
from moce_ds.storage.metrics_file import METRICS, read_metrics
from moce_ds.training.engine import Engine, start_engine
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.schedule import Schedule
from moce_ds.training.settings import BatchArithmetic, EngineSettings, OptimSettings
from moce_ds.training.task import Task
from moce_ds.training.trainer import Progress, Trainer


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
    checkpoints: Any = SimpleNamespace(start=start)
    task: Any = SimpleNamespace(manifest=lambda _: {}, state=dict)
    engine: Any = None
    schedule, run = Schedule(0.1, 0.0, 2, 0, 0), RunSettings(out=tmp_path)
    trainer = Trainer(engine, task, checkpoints, lease, run, schedule, BatchArithmetic(16, 1, 1), {}, ALONE)
    with MetricLogger(lease, 0, 2, 16, ALONE) as logger:
        logger.metrics({"step": 1, "loss": 0.5, "images_per_second": 1.0, "data_wait": 0.0, "lr": 0.1})
        trainer.save(logger)
    [(mark, before)] = begun
    assert json.loads(before[-1].splitlines()[-1])["check"] == mark


def test_without_tensorboard_a_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its files are a mirror, and its thread's error no business of the terminal."""
    lease = RunLease.claim(tmp_path, ALONE)
    with MetricLogger(lease, 0, 40, 16, ALONE) as logger:
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
        MetricLogger(lease, 0, 40, 16, ALONE)
    assert "Traceback" not in "".join(capfd.readouterr())


class Line(Task):
    """The smallest task: a line through points, with a loss of its own beside the one that is differentiated."""

    count = 16

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)

    def batches(self, first_step: int) -> Iterator[Tensor]:
        for step in range(first_step, 4):
            yield torch.linspace(-1, 1, 8)[:, None] + 0.1 * step

    def losses(self, engine: Engine, batch: Tensor, step: int, part: int) -> dict[str, Tensor]:
        fit = (engine(batch) - 2 * batch).square().mean()
        size = self.model.weight.square().sum()
        return {"loss": fit + 0.1 * size, "fit": fit, "size": size}

    def sums(self) -> dict[str, float]:
        return {"points": 8.0}

    def record(self, step: int, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"points": int(sums["points"])}

    def manifest(self, step: int) -> dict[str, Any]:
        return {"routing": None}


def fit(run: Path, runtime: Runtime, steps: int) -> Progress:
    """Fit a line for so many steps of four."""
    task, settings, optim = (
        Line(),
        RunSettings(out=run, log_every=1),
        OptimSettings(batch_size=8, epochs=2, base_lr=3.2),
    )
    batches, schedule = BatchArithmetic(8, 1, 1), Schedule(0.1, 0.1, steps, 0, 0)
    lease = RunLease.claim(run, runtime)
    resume_from = latest_valid_checkpoint(run, runtime)
    groups = [{"params": list(task.model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    engine = start_engine(task.model, groups, optim, EngineSettings(precision="fp32"), batches)
    checkpoints = CheckpointManager(engine, settings, lease, runtime)
    trainer = Trainer(engine, task, checkpoints, lease, settings, schedule, batches, {"made": "here"}, runtime)
    if resume_from is not None:
        trainer.restore(resume_from)
    return trainer.fit()


def test_any_task_is_trained_logged_under_its_own_names_and_resumed(tmp_path: Path) -> None:
    with started() as runtime:
        assert fit(tmp_path / "whole", runtime, steps=4) == (4, 4)
        fit(tmp_path / "halves", runtime, steps=2)
        assert fit(tmp_path / "halves", runtime, steps=4) == (4, 4)
    whole, halves = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    for first, second in zip(whole, halves, strict=True):
        assert first["loss"] == pytest.approx(first["fit"] + 0.1 * first["size"])
        assert first["points"] == 8 and first["skipped"] == 0
        assert all(first[name] == second[name] for name in ("step", "loss", "fit", "size", "grad_norm"))
    assert whole[-1]["fit"] < whole[0]["fit"]
    manifest = Checkpoint.open(step_folder(tmp_path / "halves", 4)).manifest
    assert (manifest["made"], manifest["images_read"], manifest["attempt"]) == ("here", 32, 2)
