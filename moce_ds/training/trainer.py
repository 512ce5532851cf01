"""The one training loop, for every task: `Trainer.fit` takes the steps, `Trainer.train_step` is one of them."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.errors import MoceError
from moce_ds.distributed.runtime import StopRequest
from moce_ds.training.engine import Engine, SkippedSteps, applied, set_lr
from moce_ds.training.metric_logger import Meter, MetricLogger, measures
from moce_ds.training.schedule import BatchArithmetic, Schedule
from moce_ds.training.step_agreement import StepAgreement, StepTotals
from moce_ds.training.training_task import TrainingTask


class Progress(NamedTuple):
    """Steps taken in all, and steps of the whole run."""

    taken: int
    steps: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.taken == self.steps


class Trainer:
    """Takes the steps of one start of a run.

    Args:
        engine: the model under DeepSpeed.
        task: batches, losses and hooks.
        checkpoints: writes checkpoints of the engine into the run folder of its lease.
        schedule: learning rate and number of steps.
        batches: how a global batch is divided.
        run: what is written when.

    Attributes:
        step: steps taken in all.
        skips: those of them without an update.
    """

    def __init__(
        self,
        engine: Engine,
        task: TrainingTask,
        checkpoints: CheckpointManager,
        schedule: Schedule,
        batches: BatchArithmetic,
        run: RunSettings,
    ) -> None:
        self.engine, self.task, self.checkpoints = engine, task, checkpoints
        self.schedule, self.batches, self.run = schedule, batches, run
        self.lease, self.runtime = checkpoints.lease, checkpoints.runtime
        self.step = 0
        self.skips = SkippedSteps(run, self.runtime)
        self._stopping = False
        self._meter = Meter()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue after a checkpoint, whose tensors are loaded. Raises ArtefactError if an entry is missing."""
        self.task.restore(checkpoint)
        self.step, self.skips.total = checkpoint.step, checkpoint.entry("skipped")
        self.runtime.say(f"Resuming {self.run.out} after step {self.step}.")

    def fit(self) -> Progress:
        """Take the steps that are left, or stop with a checkpoint where a process is asked to; a collective.

        Writes metrics, pictures and checkpoints.

        Raises:
            ArtefactError, DataError, SupersededError, DivergedError: on every process alike.
        """
        task, steps, hours = self.task, self.schedule.steps, self.run.max_hours
        with (
            StopRequest(hours * 3600 if hours else None) as stop,
            self.checkpoints,
            MetricLogger(self.lease, self.run, self.step, steps, self.batches.global_batch, self.runtime) as logger,
        ):
            self._meter, self._logger = Meter(), logger
            self._agreement = StepAgreement(self.runtime, lambda: self._flags(stop))
            batches = task.batches(self.step)
            while not self.last:
                self.runtime.set_status(f"step {self.step + 1}")
                set_lr(self.engine, self.schedule.lr(self.step))
                self.train_step(batches)
                self.step += 1
                task.after_update(self.step)
                if self._completes_now:
                    self._complete_step(logger)
            self.checkpoints.finish()
        if self.step < steps:
            self.runtime.say(f"Stopped after step {self.step} as asked. Rerun the same command to resume.")
        return Progress(self.step, steps)

    def train_step(self, batches: Iterator[Any]) -> None:
        """Give the device one update to compute, and reach the agreement of this step (see `StepAgreement`)."""
        parts: list[dict[str, Tensor]] = []
        self._agreement.begin(self.step + 1)
        first, waited = None, 0.0
        for part in range(self.batches.accumulation):
            self.task.prepare(self.step, part)
            began = time.perf_counter()
            batch = self._read(batches, first)
            first, waited = batch if part == 0 else first, waited + time.perf_counter() - began
            losses = self.task.losses(self.engine, batch, self.step, part, self._agree)
            self._agree()
            self.engine.backward(losses["loss"])
            if part == self.batches.accumulation - 1:  # the update, which changes what a checkpoint copies
                self.checkpoints.wait_for_staging()
            self.engine.step()
            parts.append({name: loss.detach() for name, loss in losses.items()})
        self._meter.step(self.batches.global_batch, waited)
        shares = self.batches.accumulation * self.runtime.world_size
        update = applied(self.engine), self.engine.get_global_grad_norm()
        self._agreement.submit(StepTotals(self.step + 1, parts, shares, self.task.sums(), *update))

    def _read(self, batches: Iterator[Any], first: Any) -> Any:
        """The next micro-batch of this process; `first` is the first one of this step, None for that itself.

        If it cannot be read, every rank raises: at once for the first one, since no rank begins a collective of the
        model before the agreement. A later one is replaced by the first, so that no rank waits for this one, and the
        next agreement raises: the step is neither recorded nor saved.
        """
        if not self._agreement.failed:
            try:
                return next(batches)
            except (MoceError, OSError, MemoryError, RuntimeError) as error:
                self._agreement.fail(error)
        if first is None:
            self._agree()
        return first

    def _agree(self, digest: int = 0) -> None:
        """Reach the agreement, if this step still has to, and act on it; a collective.

        Raises SupersededError, ArtefactError, DataError, DivergedError on every process alike.
        """
        agreed = self._agreement.reach(digest)
        if agreed is None:
            return
        if agreed.flags["superseded"]:
            raise self.lease.error(self.step)
        if agreed.flags["written"] == self.runtime.world_size or (agreed.totals and not agreed.totals.applied):
            self.checkpoints.finish()
        if agreed.flags["stopping"] and not self._stopping:
            self._stopping = True
            if agreed.step < self.schedule.steps:
                self.runtime.say(
                    f"Stopping after step {agreed.step}: writing a checkpoint. A second Ctrl-C stops without one."
                )
        if agreed.totals is not None:
            self.skips.count(agreed.totals.step, agreed.totals.applied)
            self._logger.step()
            self._completed = agreed

    def _flags(self, stop: StopRequest) -> dict[str, bool]:
        """What this process asks of all, or has done, at the moment."""
        superseded = self.runtime.is_main and self.lease.superseded
        return {"stopping": stop.wanted, "superseded": superseded, "written": self.checkpoints.written}

    @property
    def last(self) -> bool:
        """Whether no other step is to be taken."""
        return self.step >= self.schedule.steps or self._stopping

    @property
    def _completes_now(self) -> bool:
        """Whether something needs the step just taken, complete, before the next one begins."""
        every = (self.run.log_every, self.run.checkpoint_every)
        return self.last or any(self.step % n == 0 for n in every) or self.task.needs_weights(self.step)

    def _complete_step(self, logger: MetricLogger) -> None:
        """Wait for the step just taken; then validate, record and save what is due. A collective."""
        self._agree()
        self.task.after_step(self.step, self.skips)
        validation = self.task.validate_if_due(self.step)
        if self.step % self.run.log_every == 0 or self.last or validation:
            logger.metrics(self._record(validation))
        self.task.after_record(self.step, logger, last=self.last)
        if self._save_due:
            self.save(logger)

    def save(self, logger: MetricLogger) -> None:
        """Start the checkpoint of this step; its manifest also names the last line of metrics.jsonl. A collective."""
        logger.keep(self.step)
        manifest = {
            "step": self.step,
            "skipped": self.skips.total,
            "attempt": self.lease.number,
            "images_read": self.step * self.batches.global_batch,
            **self.task.manifest(self.step),
            "metrics": logger.mark,
        }
        self.checkpoints.start(manifest, self.task.state())

    @property
    def _save_due(self) -> bool:
        """Whether a checkpoint of this step is to be written; none of steps without an update, but the last."""
        return self.last or (self.step % self.run.checkpoint_every == 0 and not self.skips.in_a_row)

    def _record(self, validation: Mapping[str, float]) -> dict[str, Any]:
        """One line of metrics.jsonl for the step just taken, which is complete; a collective."""
        assert self._completed.totals is not None and self._completed.totals.step == self.step
        sums = self._completed.sums
        epoch = self.step * self.batches.global_batch / self.task.count
        lr, norm = self.schedule.lr(self.step - 1), self._completed.totals.norm
        means = {name: sums[name] for name in self._completed.totals.losses}
        record = measures(self.lease, self.step, epoch, means.pop("loss"), lr, norm, self._meter, self.runtime)
        record |= means | self.task.record(self.step, sums) | {"skipped": self.skips.total}
        return record | ({"validation": validation} if validation else {})
