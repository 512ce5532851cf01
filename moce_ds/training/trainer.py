"""The one training loop, for every task: `Trainer.fit` takes the steps, `Trainer.train_step` is one of them."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import load_checkpoint
from moce_ds.checkpoint.format import Checkpoint
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.distributed.runtime import Runtime, StopRequest
from moce_ds.errors import MoceError
from moce_ds.training.engine import Engine, SkippedSteps, set_lr
from moce_ds.training.metric_logger import Meter, MetricLogger, measures
from moce_ds.training.schedule import BatchArithmetic, Schedule
from moce_ds.training.task import TrainingTask

Batch = TypeVar("Batch")


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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint; a collective. Raises ArtefactError if it does not fit the model."""
        load_checkpoint(self.engine, checkpoint, self.runtime)
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
            MetricLogger(self.lease, self.step, steps, self.batches.global_batch, self.runtime) as logger,
        ):
            self._meter = Meter()
            batches = task.batches(self.step)
            while not self.last:
                self.runtime.set_status(f"step {self.step + 1}")
                set_lr(self.engine, self.schedule.lr(self.step))
                losses, waited = self.train_step(batches)
                self.step += 1
                sums = self._reduce(losses | task.sums(), stop)
                self.skips.count(self.step, self.engine.was_step_applied())
                self._meter.step(self.batches.global_batch, waited)
                logger.step()
                task.after_step(self.step, self.skips, last=self.last)
                validation = task.validate_if_due(self.step)
                if self.step % self.run.log_every == 0 or self.last or validation:
                    logger.metrics(self._record(losses, sums, validation))
                task.after_record(self.step, logger, last=self.last)
                if self._save_due:
                    self.save(logger)
            self.checkpoints.finish()
        if self.step < steps:
            self.runtime.say(f"Stopped after step {self.step} as asked. Rerun the same command to resume.")
        return Progress(self.step, steps)

    def train_step(self, batches: Iterator[Any]) -> tuple[dict[str, float], float]:
        """Compute and apply one update.

        Returns this process's part of each named loss, which add up to means over processes, and the seconds that it
        waited for its own data.
        """
        parts: list[dict[str, Tensor]] = []
        waited = 0.0
        for part in range(self.batches.accumulation):
            digest = self.task.prepare(self.step, part)
            batch, seconds = next_batch_checked(self.runtime, batches, digest, self.step)
            waited += seconds
            losses = self.task.losses(self.engine, batch, self.step, part)
            self.engine.backward(losses["loss"])
            if part == self.batches.accumulation - 1:  # the update, which changes what a checkpoint copies
                self.checkpoints.wait_for_staging()
            self.engine.step()
            parts.append({name: loss.detach() for name, loss in losses.items()})
        return self._own_share(parts), waited

    @property
    def last(self) -> bool:
        """Whether no other step is to be taken."""
        return self.step >= self.schedule.steps or self._stopping

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

    def _own_share(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """The losses of the micro-batches as this process's part of means: the step's one wait for the device."""
        stacked = torch.stack([torch.stack(list(losses.values())) for losses in parts])
        totals = stacked.double().sum(dim=0).tolist()
        shares = self.batches.accumulation * self.runtime.world_size
        return {name: total / shares for name, total in zip(parts[0], totals, strict=True)}

    def _reduce(self, own: dict[str, float], stop: StopRequest) -> dict[str, float]:
        """Sum the figures of a step over processes, together with what all must act on at the same step.

        Raises SupersededError, ArtefactError on every process alike.
        """
        runtime = self.runtime
        flags = [stop.wanted, runtime.is_main and self.lease.superseded, self.checkpoints.written]
        *sums, stopping, superseded, written = runtime.sum([*own.values(), *map(float, flags)])
        if superseded:
            raise self.lease.error(self.step)
        if written == runtime.world_size or not self.engine.was_step_applied():
            self.checkpoints.finish()
        self._stopping = stopping > 0
        if self._stopping and self.step < self.schedule.steps:
            runtime.say(f"Stopping after step {self.step}: writing a checkpoint. A second Ctrl-C stops without one.")
        return dict(zip(own, sums, strict=True))

    def _record(
        self, losses: Mapping[str, float], sums: Mapping[str, float], validation: Mapping[str, float]
    ) -> dict[str, Any]:
        """One line of metrics.jsonl for the step just taken; a collective."""
        epoch = self.step * self.batches.global_batch / self.task.count
        lr, norm = self.schedule.lr(self.step - 1), float(self.engine.get_global_grad_norm())
        means = {name: sums[name] for name in losses}
        record = measures(self.lease, self.step, epoch, means.pop("loss"), lr, norm, self._meter, self.runtime)
        record |= means | self.task.record(self.step, sums) | {"skipped": self.skips.total}
        return record | ({"validation": validation} if validation else {})


def next_batch_checked(runtime: Runtime, stream: Iterator[Batch], digest: int, step: int) -> tuple[Batch, float]:
    """The next batch, once all ranks have the same plan, and the seconds that this rank waited for it.

    If any rank fails, every rank raises.

    Raises:
        DataError: a rank cannot read its batch.
        MoceError: the ranks have different plans; names the step and the ranks.
    """
    began = time.perf_counter()
    with runtime.raise_on_all_ranks():
        batch = next(stream)
        waited = time.perf_counter() - began
    largest, negative_smallest = runtime.max([float(digest), float(-digest)])
    if largest != -negative_smallest:
        digests = runtime.texts(f"{digest:012x}")
        usual = max(digests, key=digests.count)  # rank 0's if there is no majority; the same on all ranks
        others = [rank for rank, text in enumerate(digests) if text != usual]
        raise MoceError(
            f"Step {step}: the ranks disagree on where images go. Rank(s) {', '.join(map(str, others))} differ "
            f"from the rest ({', '.join(digests)}): do all processes have the same shards, clusters and code?"
        )
    return batch, waited
