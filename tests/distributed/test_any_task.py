"""One trainer for every task: the smallest one is trained, logged under the names of its own losses, and resumed."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from torch import Tensor, nn

from moce_ds.checkpoint.deepspeed_state import load_checkpoint
from moce_ds.checkpoint.format import Checkpoint, step_folder
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.checkpoint.shared_read import checkpoint_steps, resume
from moce_ds.common.errors import DataError
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.training.engine import Engine, start_engine
from moce_ds.training.schedule import BatchArithmetic, Schedule
from moce_ds.training.settings import EngineSettings, OptimSettings
from moce_ds.training.step_agreement import Agree
from moce_ds.training.trainer import Progress, Trainer
from moce_ds.training.training_task import TrainingTask


class Line(TrainingTask):
    """The smallest task: a line through points, with a loss of its own beside the one that is differentiated."""

    count = 16

    def __init__(self, parts: int = 1, unreadable: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)
        self.parts, self.unreadable = parts, unreadable

    def batches(self, first_step: int) -> Iterator[Tensor]:
        for index in range(first_step * self.parts, 4 * self.parts):
            if index == self.unreadable:
                raise DataError(f"batch {index} cannot be read")
            yield torch.linspace(-1, 1, 8)[:, None] + 0.1 * (index // self.parts)

    def losses(self, engine: Engine, batch: Tensor, step: int, part: int, agree: Agree) -> dict[str, Tensor]:
        fit = (engine(batch) - 2 * batch).square().mean()
        size = self.model.weight.square().sum()
        return {"loss": fit + 0.1 * size, "fit": fit, "size": size}

    def sums(self) -> dict[str, float]:
        return {"points": 8.0}

    def record(self, step: int, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"points": int(sums["points"])}

    def manifest(self, step: int) -> dict[str, Any]:
        return {"routing": None}


def fit(run: Path, runtime: Runtime, steps: int, task: Line | None = None, log_every: int = 1) -> Progress:
    """Fit a line for so many steps of four."""
    task = task or Line()
    settings = RunSettings(out=run, log_every=log_every)
    batches, schedule = BatchArithmetic(8, task.parts, runtime.world_size), Schedule(0.1, 0.1, steps, 0, 0)
    optim = OptimSettings(batch_size=batches.global_batch, epochs=2, base_lr=3.2)
    lease = RunLease.claim(run, runtime)
    groups = [{"params": list(task.model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    engine = start_engine(task.model, groups, optim, EngineSettings(precision="fp32"), batches)
    checkpoints = CheckpointManager(engine, settings, lease, runtime, {"made": "here"})
    trainer = Trainer(engine, task, checkpoints, schedule, batches, settings)
    if steps_before := checkpoint_steps(run, runtime):
        trainer.restore(resume(run, steps_before, partial(load_checkpoint, engine), runtime)[0])
    return trainer.fit()


def fit_all(folder: Path) -> list[Progress]:
    """All runs, in one process."""
    with started() as runtime:
        return [fit(folder / name, runtime, steps) for name, steps in (("whole", 4), ("halves", 2), ("halves", 4))]


def test_any_task_is_trained_logged_under_its_own_names_and_resumed(tmp_path: Path) -> None:
    assert run_distributed(fit_all, 1, tmp_path)[0] == [(4, 4), (2, 2), (4, 4)]
    whole, halves = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    for first, second in zip(whole, halves, strict=True):
        assert first["loss"] == pytest.approx(first["fit"] + 0.1 * first["size"])
        assert first["points"] == 8 and first["skipped"] == 0
        assert all(first[name] == second[name] for name in ("step", "loss", "fit", "size", "grad_norm"))
    assert whole[-1]["fit"] < whole[0]["fit"]
    manifest = Checkpoint.open(step_folder(tmp_path / "halves", 4)).manifest
    assert (manifest["made"], manifest["images_read"], manifest["attempt"]) == ("here", 32, 2)


def fit_with_an_unreadable_batch(folder: Path) -> list[str]:
    """The errors that this rank sees if rank 1 alone cannot read a batch: the first or second one of step 2 or 4."""
    seen = []
    with started() as runtime:
        for unreadable in (2, 3, 7):
            task = Line(parts=2, unreadable=unreadable if runtime.rank == 1 else None)
            try:
                fit(folder / str(unreadable), runtime, 4, task, log_every=100)
            except DataError as error:
                seen.append(str(error))
    return seen


def test_a_batch_that_one_rank_cannot_read_ends_all_before_its_step_is_recorded(tmp_path: Path) -> None:
    seen = run_distributed(fit_with_an_unreadable_batch, 2, tmp_path)
    assert seen == [[f"batch {index} cannot be read" for index in (2, 3, 7)]] * 2
    assert not list(tmp_path.glob("*/checkpoints/step-*"))
    assert [(run.parent.name, run.read_text()) for run in sorted(tmp_path.glob("*/metrics.jsonl"))] == [
        ("2", ""),
        ("3", ""),
        ("7", ""),
    ]
