"""Run the stages of a workflow: skip what is done, share with other processes, resume, continue after failures.

Several processes may run one workflow at the same time, also on several machines with one file system. A process waits
for a stage that another one runs when nothing else can run. A stage runs when the stages that it needs are done. A
failed stage blocks only the stages that need it.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import click
from rich.table import Table

from moce_ds.cli.launch.local import log_tail, run_logged, run_processes
from moce_ds.cli.workflow.stage import Launch, Stage, StageRecord, Workflow, now, perform
from moce_ds.common.errors import LOST_PEER, STOPPED, MoceError
from moce_ds.common.storage.locks import held, is_held
from moce_ds.common.text import in_line

_logger = logging.getLogger(__name__)


class Progress:
    """Logs the progress of a workflow: one line for each change of a stage."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow

    def skipped(self, stage: Stage) -> None:
        """The stage was done before."""
        _logger.info(f"{self.workflow.place(stage)} is done")

    def waiting(self, stage: Stage) -> None:
        """Another process runs the stage."""
        _logger.info(f"{self.workflow.place(stage)} waits for the process that runs it")

    def started(self, stage: Stage) -> None:
        """The stage begins."""
        _logger.info(
            f"{self.workflow.place(stage)}{f' in {stage.processes} processes' if stage.processes > 1 else ''} ..."
        )

    def done(self, stage: Stage, seconds: float) -> None:
        """The stage is done; `seconds` includes the time spent waiting."""
        record = stage.record()
        _logger.info(f"{self.workflow.place(stage)} done in {duration(record.seconds if record else seconds)}")

    def stopped(self, stage: Stage) -> None:
        """The stage has stopped and can resume."""
        _logger.info(f"{self.workflow.place(stage)} stopped")

    def failed(self, stage: Stage, seconds: float) -> None:
        """The stage has failed; its message follows at the end."""


@dataclass(frozen=True)
class Failure:
    """A stage that failed.

    Attributes:
        message: the cause; for a stage with a log, the end of the log.
        status: the exit status of its commands.
        error: the exception, if the stage ran in this process; else None.
        shown: whether its processes have already printed the message.
    """

    stage: Stage
    message: str
    status: int
    error: MoceError | None = None
    shown: bool = False


@dataclass
class Outcome:
    """The result of running some stages.

    Attributes:
        stopped: stages that stopped early, because of a signal or of their own time limit.
    """

    failures: list[Failure] = field(default_factory=list)
    stopped: list[Stage] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status: STOPPED, LOST_PEER if a rerun may succeed, the status of another failure, or 0."""
        if self.stopped:
            return STOPPED
        found = {failure.status for failure in self.failures}
        return found.pop() if len(found) == 1 else int(bool(found))


class StageError(MoceError):
    """A stage failed; has the exit status of its commands."""

    def __init__(self, noun: str, failure: Failure) -> None:
        stage = failure.stage
        super().__init__(
            f"{noun.capitalize()} {stage.name} failed: {failure.message}\n"
            f"Its state is in {stage.records.path}. Rerun the same command to resume."
        )
        self.status = failure.status


def run_stages(stages: Sequence[Stage], progress: Progress, keep_going: bool = False) -> Outcome:
    """Run the stages that are not done, each after those of `stages` that it needs.

    A signal stops the running stage at the next point where it can resume; no later stage starts.

    Args:
        keep_going: after a failure, continue with stages that do not depend on the failed one.
    """
    waiting, outcome = list(stages), Outcome()
    while (keep_going or not outcome.failures) and (stage := _next(waiting, outcome)):
        waiting.remove(stage)
        try:
            _run(stage, progress, outcome)
        except (KeyboardInterrupt, click.Abort):  # click converts the first into the second
            progress.stopped(stage)
            outcome.stopped.append(stage)
            break
    return outcome


def _next(waiting: Sequence[Stage], outcome: Outcome) -> Stage | None:
    """The first stage that is not blocked and that no other process runs, else the first that is not blocked."""
    unfinished = {
        stage.name for stage in (*waiting, *outcome.stopped, *(failure.stage for failure in outcome.failures))
    }
    ready = [stage for stage in waiting if not unfinished.intersection(stage.needs)]
    return next((stage for stage in ready if not is_held(stage.lock)), ready[0] if ready else None)


def _run(stage: Stage, progress: Progress, outcome: Outcome) -> None:
    """Run one stage, or wait for the process that runs it, and add the result to `outcome`."""
    if is_held(stage.lock):
        progress.waiting(stage)
    elif stage.is_done():
        progress.skipped(stage)
        return
    else:
        progress.started(stage)
    began = time.monotonic()
    failure, status = _carry_out(stage)
    seconds = time.monotonic() - began
    if status == 0:
        progress.done(stage, seconds)
    elif status == STOPPED:
        progress.stopped(stage)
        outcome.stopped.append(stage)
    else:
        progress.failed(stage, seconds)
        outcome.failures.append(failure or _explained(stage, status, seconds))


def _carry_out(stage: Stage) -> tuple[Failure | None, int]:
    """Run a stage in this process or in new ones; returns the failure, if it ran in this process, and the status."""
    if stage.launch is None:
        try:
            perform(stage)
        except MoceError as error:
            return Failure(stage, str(error), error.status, error), error.status
        return None, 0
    while True:
        with held(stage.lock):
            if stage.is_done():  # by another process
                return None, 0
        status = _start(stage.launch, stage.processes)  # the first process holds the lock
        if status in (0, STOPPED) or not is_held(stage.lock):  # else another start holds the lock: wait for it
            return None, status


def _start(launch: Launch, processes: int) -> int:
    """Exit status of the processes of a stage; negative if a signal killed a process with a log."""
    if launch.log is not None:
        return run_logged(launch.command, launch.log)
    return run_processes(launch.command, processes)


def _explained(stage: Stage, status: int, seconds: float) -> Failure:
    """Why the processes of a stage failed. Writes the stage's record unless its first process has written it."""
    log, record = stage.launch and stage.launch.log, stage.record()
    lost = LOST_PEER if status < 0 else status
    if log is None and record is not None and record.state == "failed":
        return Failure(stage, record.message, lost, shown=True)
    message = log_tail(log) if log else f"its processes ended with status {status}. Their messages are above."
    record = record or StageRecord(stage.made_from().parts)
    stage.records.write(replace(record, state="failed", at=now(), seconds=round(seconds, 1), message=message))
    return Failure(stage, message, lost)


def states_table(workflow: Workflow, title: str) -> Table:
    """A table of the stages and their states. Raises ArtefactError for a damaged record."""
    table = Table(title=in_line(title), title_justify="left")
    for heading, justify in ((workflow.noun, "left"), ("processes", "right"), ("state", "left"), ("since", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("seconds", justify="right")
    for stage in workflow.stages:
        record = stage.record()
        seconds = f"{record.seconds:.0f}" if record and record.seconds else ""
        table.add_row(
            stage.name, str(stage.processes * stage.nodes), stage.state(), record.at if record else "", seconds
        )
    return table


def duration(seconds: float) -> str:
    """A duration as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
