"""Tuning, read from top to bottom: `tune` sets up, `_train` runs the steps. The task says what is trained on what.

Axes: G items of a micro-batch over all processes, B those of this one.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from moce_ds.checkpoint.deepspeed_state import latest_valid_checkpoint, load_checkpoint
from moce_ds.checkpoint.format import STATE
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_layout import RESULT
from moce_ds.checkpoint.tuning_result import read_result, result_text
from moce_ds.config import settings as configuration
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.agreement import next_batch_checked
from moce_ds.distributed.randomness import FORWARD, hashed
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import ConfigError
from moce_ds.storage.checksums import FileRecord
from moce_ds.training.engine import set_lr, wrap
from moce_ds.training.metric_logger import measures
from moce_ds.training.schedule import Schedule, schedule_of
from moce_ds.training.settings import BatchArithmetic, shared_batch
from moce_ds.training.setup import check_run, check_same_settings, keep_settings, refuse_other
from moce_ds.training.steward import Steward, steward_of
from moce_ds.tuning.feed import feed
from moce_ds.tuning.settings import TuneSettings
from moce_ds.tuning.state import TuneState
from moce_ds.tuning.task import Measures, Task


@dataclass(frozen=True)
class Tuning:
    """All that the steps need. `first_step` and `first_skipped`: those before this attempt."""

    task: Task
    config: TuneSettings
    runtime: Runtime
    attempt: RunLease
    batches: BatchArithmetic
    schedule: Schedule
    engine: DeepSpeedEngine
    state: TuneState
    first_step: int
    first_skipped: int

    @property
    def validate_every(self) -> int:
        """Steps between validations."""
        return max(1, round(self.config.optim.validate_every * self.task.count / self.batches.global_batch))


def tune(task: Task, config: TuneSettings, runtime: Runtime) -> Measures | None:
    """Run, or resume, tuning until its last step or until asked to stop; a collective.

    Returns the final measures, or None where the run was stopped: the same command goes on.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on every process alike.
    """
    batches = shared_batch(config.optim, runtime.world_size)
    out = config.run.out
    with runtime.raise_on_all_ranks():
        check_run(config)
        refuse_other(out, [("The task", "task_fingerprint", task.fingerprint)], "choose another folder for another run")
        check_same_settings(config)
    if runtime.max([float((out / RESULT).exists())])[0]:
        runtime.say(f"{out} is complete.")
        return dict(read_result(out)["measures"])
    if batches.global_batch > task.count:
        raise ConfigError(
            f"optim.batch_size: {batches.global_batch} images in a step, of {task.count} to learn from: expected "
            f"{task.count} at most."
        )
    tuning = _open(task, config, runtime, batches)
    schedule = tuning.schedule
    runtime.say(
        f"{schedule.steps} steps of {batches.global_batch} images = {runtime.world_size} processes x "
        f"{batches.accumulation} parts x {batches.micro}; peak learning rate {schedule.peak_lr:.2e} "
        f"= {config.optim.base_lr:.1e} x {batches.global_batch} / 256"
    )
    step = _train(tuning)
    if step < schedule.steps:
        runtime.say(f"Stopped after step {step} as asked; the same command goes on from there.")
        return None
    return _finish(tuning)


def _open(task: Task, config: TuneSettings, runtime: Runtime, batches: BatchArithmetic) -> Tuning:
    """Become the owner of the run folder, and bring model, engine and averages to where the run goes on."""
    attempt = RunLease.claim(config.run.out, runtime)
    resume_from = latest_valid_checkpoint(config.run.out, runtime)
    keep_settings(config, attempt, runtime)
    task.model.to(runtime.device).train()
    state = TuneState(task.model, config.optim.ema, runtime)
    engine = wrap(task.model, task.parameter_groups(), config, batches)
    if resume_from is not None:
        load_checkpoint(engine, resume_from, runtime)
        with runtime.raise_on_all_ranks():
            state.load(resume_from.load(STATE), resume_from.entry("best"), str(resume_from.folder))
        runtime.say(f"Resuming {config.run.out} after step {resume_from.step}.")
    return Tuning(
        task=task,
        config=config,
        runtime=runtime,
        attempt=attempt,
        batches=batches,
        schedule=schedule_of(config.optim, task.count),
        engine=engine,
        state=state,
        first_step=resume_from.step if resume_from else 0,
        first_skipped=resume_from.entry("skipped") if resume_from else 0,
    )


def _train(tuning: Tuning) -> int:
    """The steps of this attempt; writes metrics and checkpoints. Returns the steps taken in all."""
    config, schedule, runtime, state = tuning.config, tuning.schedule, tuning.runtime, tuning.state
    engine, images = tuning.engine, tuning.batches.global_batch
    with steward_of(
        engine,
        config.run,
        tuning.attempt,
        runtime,
        first_step=tuning.first_step,
        skipped=tuning.first_skipped,
        steps=schedule.steps,
        images=images,
    ) as steward:
        stream = _stream(tuning)
        while steward.goes_on:
            runtime.set_status(f"step {steward.step + 1}")
            set_lr(engine, schedule.lr(steward.step))
            mine, waited = _step(tuning, stream, steward)
            (loss,) = steward.after_step([mine], waited)
            step = steward.step
            state.update(step - steward.skips.total, engine.was_step_applied())
            if step == schedule.steps:
                steward.skips.check_end(step, state.model)
            due = tuning.task.criterion is not None and (step % tuning.validate_every == 0 or step == schedule.steps)
            found = _validate(tuning, step) if due else {}
            if step % config.run.log_every == 0 or not steward.goes_on or due:
                lr, norm = schedule.lr(step - 1), float(engine.get_global_grad_norm())
                epoch = step * images / tuning.task.count
                record = measures(tuning.attempt, step, epoch, loss, lr, norm, steward.meter, runtime)
                record["skipped"] = steward.skips.total
                steward.teller.metrics(record | ({"validation": found} if found else {}))
            if steward.save_due:
                steward.save(_manifest(tuning, step, steward.skips.total), state.tensors())
    return steward.step


def _stream(tuning: Tuning) -> Iterator[Any]:
    """This process's part of every micro-batch from where this attempt begins."""
    batches, parts = tuning.batches, tuning.batches.accumulation
    sampler = ShuffledSampler(tuning.task.count, batches.micro_global, tuning.config.run.seed)
    indices = range(tuning.first_step * parts, tuning.schedule.steps * parts)
    return feed(tuning.task, sampler, indices, tuning.config.data.workers, tuning.runtime)


def _step(tuning: Tuning, stream: Iterator[Any], steward: Steward) -> tuple[float, float]:
    """One optimizer step. Returns this process's part of the mean loss, and the seconds waited for data."""
    task, engine, runtime = tuning.task, tuning.engine, tuning.runtime
    losses, waited = [], 0.0
    for part in range(tuning.batches.accumulation):
        began = time.perf_counter()
        batch = next_batch_checked(runtime, stream, 0, steward.step)
        waited += time.perf_counter() - began
        seed = hashed(FORWARD, tuning.config.run.seed, steward.step, part, runtime.rank)
        torch.manual_seed(int(seed[()] >> np.uint64(1)))  # of dropped paths: the same after resuming
        loss = task.loss(engine, batch)
        engine.backward(loss)
        steward.saver.wait_for_staging()
        engine.step()
        losses.append(loss.detach())
    total = float(torch.stack(losses).double().sum())  # the step's one wait for the device
    return total / (tuning.batches.accumulation * runtime.world_size), waited


@torch.no_grad()
def _validate(tuning: Tuning, step: int) -> Measures:
    """Validate, and keep the weights if they are the best so far."""
    task, state = tuning.task, tuning.state
    assert task.criterion is not None
    model = state.model.eval()
    found = task.validate(model, tuning.runtime)
    tuning.engine.module.train()  # the same as `model` where there is no average
    state.keep_best(step, found, task.criterion)
    told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    tuning.runtime.say(f"step {step}: validation: {told}")
    return found


def _manifest(tuning: Tuning, step: int, skipped: int) -> dict[str, Any]:
    """What the checkpoint of a step says of itself, but for its files."""
    return {
        "step": step,
        "skipped": skipped,
        "attempt": tuning.attempt.number,
        "config": configuration.to_tree(tuning.config),
        "task_fingerprint": tuning.task.fingerprint,
        "images_read": step * tuning.batches.global_batch,
        "best": tuning.state.best,
        "routing": None,
    }


@torch.no_grad()
def _finish(tuning: Tuning) -> Measures:
    """The final measures, with the best weights where a validation has chosen; written last of all."""
    state, steps = tuning.state, tuning.schedule.steps
    state.use_best()
    found = tuning.task.finish(state.model.eval(), tuning.runtime)
    best = state.best or {"step": steps, "measures": {}}
    record = {"measures": found, "step": best["step"], "steps": steps, "validation": best["measures"]}
    out = tuning.config.run.out
    with tuning.runtime.raise_on_all_ranks():
        if tuning.runtime.is_main:
            with tuning.attempt.file(out / RESULT, steps) as draft:
                draft.write_text(result_text(out, record), encoding="utf-8")
            tuning.attempt.note(RESULT, FileRecord.of(out / RESULT), steps)  # now its absence is a fault
    return found
