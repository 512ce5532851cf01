"""Several runs of `moce pretrain` one after the other in one world, since starting processes is what costs time."""

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from moce_ds.analysis.run_folder import read_metrics
from moce_ds.cli import read_settings
from moce_ds.runtime import started
from moce_ds.training.loop import pretrain
from moce_ds.training.settings import PretrainSettings


@dataclass(frozen=True)
class Job:
    """One call of `pretrain`; with `stop_after`, the last rank alone gets a SIGINT once that step is on record."""

    words: list[str]
    stop_after: int | None = None


@dataclass(frozen=True)
class Told:
    """What a call of `pretrain` returned (steps) and printed."""

    steps: int
    text: str


def run_jobs(jobs: dict[str, Job]) -> dict[str, Told]:
    """Pre-train one job after the other in this rank."""
    told = {}
    with started() as runtime:
        for name, job in jobs.items():
            config = read_settings(PretrainSettings, job.words)
            stops = job.stop_after is not None and runtime.rank == runtime.world_size - 1
            with redirect_stderr(io.StringIO()) as text, interrupted(config.run.out, job.stop_after if stops else None):
                steps = pretrain(config, runtime)
            told[name] = Told(steps, text.getvalue())
    return told


@contextmanager
def interrupted(run: Path, after_step: int | None) -> Iterator[None]:
    """Send this process a SIGINT when metrics.jsonl has `after_step` lines; leave it alone for None."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            if (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= (after_step or 0):
                os.kill(os.getpid(), signal.SIGINT)
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
