"""Several runs of `moce pretrain` one after the other in one world, since starting processes is what costs time."""

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import MoceError
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.loader import Batch
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.training.engine import Engine
from moce_ds.training.pretrain import PretrainTask, pretrain
from moce_ds.training.settings import PretrainSettings
from moce_ds.training.step_agreement import Agree


def send_myself(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


INTERRUPT = partial(send_myself, signal.SIGINT)


@dataclass(frozen=True)
class NotFinite:
    """A loss that is not a number in one rank, at some steps (from 0); with `expert`, the gradient of one expert
    instead, while the loss is as it should be."""

    steps: tuple[int, ...]
    rank: int = 1
    expert: bool = False


@dataclass(frozen=True)
class Job:
    """One call of `pretrain`, and what befalls it.

    Attributes:
        words: of the command.
        stop_after: once that step is on record, one rank, `rank`, does `act`: by default the last gets a SIGINT.
        before: what rank 0 does first, such as damaging a file.
        not_finite: a fault in the arithmetic.
    """

    words: list[str]
    stop_after: int | None = None
    act: Callable[[], None] = INTERRUPT
    rank: int = -1
    before: Callable[[], object] | None = None
    not_finite: NotFinite | None = None


@dataclass(frozen=True)
class Told:
    """What a call of `pretrain` returned (steps) and printed; or the error that it ended with, "Class: message"."""

    steps: int
    text: str
    error: str = ""


def run_jobs(jobs: dict[str, Job]) -> dict[str, Told]:
    """Pre-train one job after the other in this rank."""
    with started() as runtime:
        return {name: run_job(job, runtime) for name, job in jobs.items()}


def run_job(job: Job, runtime: Runtime) -> Told:
    """One job in this rank."""
    config = read_settings(PretrainSettings, job.words)
    if job.before is not None and runtime.is_main:
        job.before()
    runtime.barrier()
    acts = job.stop_after if runtime.rank == job.rank % runtime.world_size else None
    fault = faulty(job.not_finite) if job.not_finite else nullcontext()
    with redirect_stderr(io.StringIO()) as text, interrupted(config.run.out, acts, job.act), fault:
        try:
            return Told(pretrain(config, runtime).taken, text.getvalue())
        except MoceError as error:
            return Told(-1, text.getvalue(), f"{type(error).__name__}: {error}")


@contextmanager
def faulty(fault: NotFinite) -> Iterator[None]:
    """Let the arithmetic go wrong as `fault` says."""
    hooks = []
    right = PretrainTask.losses

    def wrong(
        self: PretrainTask, engine: Engine, batch: Batch, step: int, part: int, agree: Agree
    ) -> dict[str, Tensor]:
        while hooks:
            hooks.pop().remove()
        losses = right(self, engine, batch, step, part, agree)
        if step in fault.steps and dist.get_rank() == fault.rank:
            if not fault.expert:
                return {name: loss * float("nan") for name, loss in losses.items()}
            named = engine.module.named_parameters()
            expert = next(parameter for name, parameter in named if ".experts." in name)
            hooks.append(expert.register_hook(lambda gradient: gradient * float("nan")))
        return losses

    with patch.object(PretrainTask, "losses", wrong):
        yield


@contextmanager
def interrupted(run: Path, after_step: int | None, act: Callable[[], None] = INTERRUPT) -> Iterator[None]:
    """Do `act` (a SIGINT to this process) when metrics.jsonl has `after_step` lines; nothing for None."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            if (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= (after_step or 0):
                act()
                return

    watcher = threading.Thread(target=watch)
    if after_step is not None:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if watcher.is_alive():
            watcher.join()
