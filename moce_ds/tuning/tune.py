"""Tuning on a labelled task, read from top to bottom: `tune` opens everything, and `Trainer.fit` trains."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import load_checkpoint
from moce_ds.checkpoint.format import STATE
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.run_folder import RESULT, read_result, result_text
from moce_ds.checkpoint.shared_read import SharedReader, checkpoint_steps, resume
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.checksums import FileRecord
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.randomness import FORWARD, hashed
from moce_ds.distributed.runtime import Runtime
from moce_ds.training.engine import Engine, SkippedSteps, start_engine
from moce_ds.training.run_checks import RequestedRun
from moce_ds.training.schedule import BatchArithmetic, Schedule, batch_arithmetic, describe, make_schedule
from moce_ds.training.step_agreement import Agree
from moce_ds.training.trainer import Trainer
from moce_ds.training.training_task import TrainingTask
from moce_ds.tuning.labelled_task import LabelledTask, Measures, feed
from moce_ds.tuning.settings import TuneOptimSettings, TuneSettings
from moce_ds.tuning.state import TuneState


def tune(labelled: LabelledTask, config: TuneSettings, runtime: Runtime) -> Measures | None:
    """Run, or resume, tuning until its last step or until asked to stop; a collective.

    Returns the final measures, or None if the run was stopped; the same command resumes it.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on all processes.
    """
    run, batches = config.run, batch_arithmetic(config.optim, runtime.world_size)
    requested = RequestedRun(config)
    with runtime.raise_on_all_ranks():
        found = [("The task", "task_fingerprint", labelled.fingerprint)]
        requested.check_resumable(found, "choose another folder for another run")
    if runtime.max([float((run.out / RESULT).exists())])[0]:
        runtime.say(f"{run.out} is complete.")
        return dict(read_result(run.out)["measures"])
    if batches.global_batch > labelled.count:
        raise ConfigError(
            f"optim.batch_size: {batches.global_batch} images in a step exceed the {labelled.count} training images: "
            f"expected {labelled.count} at most."
        )
    schedule = make_schedule(config.optim, labelled.count)
    with RunLease.claimed(run.out, runtime) as lease:
        labelled.model.to(runtime.device).train()
        task = TuneTask(labelled, config.optim, config.data.workers, run.seed, schedule, batches, runtime)
        engine = start_engine(labelled.model, labelled.parameter_groups(), config.optim, config.engine, batches)
        resumed = None
        if steps := checkpoint_steps(run.out, runtime):
            resumed, _ = resume(run.out, steps, lambda reader: task.load(engine, reader), runtime)
        requested.write_settings(lease, runtime)
        made_from = {"config": to_tree(config), "task_fingerprint": labelled.fingerprint}
        checkpoints = CheckpointManager(engine, run, lease, runtime, made_from)
        trainer = Trainer(engine, task, checkpoints, schedule, batches, run)
        if resumed is not None:
            trainer.restore(resumed)
        runtime.say(describe(schedule, batches, config.optim.base_lr))
        return task.finish(lease) if trainer.fit().complete else None


class TuneTask(TrainingTask):
    """A labelled task for the trainer, with a running average of the weights, and validation.

    Args:
        labelled: model, data and measures; the model is on its device, and DeepSpeed has not wrapped it yet.
        optim: the decay of the average, and how often a validation is due.
        workers: processes that prepare images.
        seed: random seed of the order of items, and of dropped paths.
    """

    def __init__(
        self,
        labelled: LabelledTask,
        optim: TuneOptimSettings,
        workers: int,
        seed: int,
        schedule: Schedule,
        batches: BatchArithmetic,
        runtime: Runtime,
    ) -> None:
        self.count = labelled.count
        self._labelled, self._workers, self._seed = labelled, workers, seed
        self._schedule, self._batches, self._runtime = schedule, batches, runtime
        self._state = TuneState(labelled.model, optim.ema, runtime)
        self._validate_every = max(1, round(optim.validate_every * labelled.count / batches.global_batch))

    def load(self, engine: Engine, reader: SharedReader) -> None:
        """Load a checkpoint into the engine, the average, the best weights and the statistics; a collective.

        Raises:
            DamagedError: a file is damaged.
            ArtefactError: the checkpoint does not fit the model.
        """
        load_checkpoint(engine, reader)
        tensors, checkpoint = reader.load(STATE), reader.checkpoint
        with self._runtime.raise_on_all_ranks():
            self._state.load(tensors, checkpoint.entry("best"), str(checkpoint.folder))

    def batches(self, first_step: int) -> Iterator[Any]:
        """Micro-batches that worker processes prepare, on the host."""
        parts = self._batches.accumulation
        sampler = ShuffledSampler(RandomOrder(self.count, self._seed), self._batches.micro_global)
        indices = range(first_step * parts, self._schedule.steps * parts)
        return feed(self._labelled, sampler, indices, self._workers, self._runtime)

    def losses(self, engine: Engine, batch: Any, step: int, part: int, agree: Agree) -> dict[str, Tensor]:
        """The loss of the labelled task, under the name "loss"."""
        seed = hashed(FORWARD, self._seed, step, part, self._runtime.rank)
        torch.manual_seed(int(seed[()] >> np.uint64(1)))  # for dropped paths: the same after resuming
        return {"loss": self._labelled.loss(engine, batch)}

    def needs_weights(self, step: int) -> bool:
        """Always: the running average follows every update, unless it was skipped."""
        return True

    def after_step(self, step: int, skips: SkippedSteps) -> None:
        """Update the running average. Raises DivergedError if a run ends with useless weights."""
        self._state.update(step - skips.total, applied=not skips.in_a_row)
        if step == self._schedule.steps:
            skips.check_end(step, self._state.model)

    @torch.no_grad()
    def validate_if_due(self, step: int) -> Measures:
        """Validate at regular steps and at the end, and keep the weights if they are the best so far."""
        criterion = self._labelled.criterion
        if criterion is None or (step % self._validate_every and step != self._schedule.steps):
            return {}
        found = self._labelled.validate(self._state.model.eval(), self._runtime)
        self._labelled.model.train()  # without an average this is also the evaluated model
        self._state.keep_best(step, found, criterion)
        listed = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        self._runtime.say(f"step {step}: validation: {listed}")
        return found

    def manifest(self, step: int) -> dict[str, Any]:
        """The record of the best weights."""
        return {"best": self._state.best, "routing": None}

    def state(self) -> Mapping[str, Tensor]:
        """Average, best weights and statistics."""
        return self._state.tensors()

    @torch.no_grad()
    def finish(self, lease: RunLease) -> Measures:
        """The final measures, of the best weights if there was a validation; writes them last.

        Raises:
            DataError, ArtefactError, SupersededError, DivergedError: on all processes.
        """
        steps = self._schedule.steps
        self._state.use_best()
        found = self._labelled.finish(self._state.model.eval(), self._runtime)
        best = self._state.best or {"step": steps, "measures": {}}
        record = {"measures": found, "step": best["step"], "steps": steps, "validation": best["measures"]}
        with self._runtime.raise_on_all_ranks():
            if self._runtime.is_main:
                with lease.file(lease.run / RESULT, steps) as draft:
                    draft.write_text(result_text(lease.run, record), encoding="utf-8")
                lease.note(RESULT, FileRecord.of(lease.run / RESULT), steps)  # now its absence is a fault
        return found
