"""Run the steps of a workflow: skip what is done, share with other processes, resume, continue after failures.

Several processes may run one workflow at the same time, also on several machines with one file system: a step that
another process runs is left to it, and waited for when nothing else can run. A step runs when the steps that it needs
are done. A step that fails holds back the steps that need it, and no others.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import click
from rich.table import Table

from moce_ds.errors import LOST_PEER, STOPPED, MoceError
from moce_ds.launch.local import run_processes
from moce_ds.launch.logged import log_tail, run_logged
from moce_ds.storage.locks import held, is_held
from moce_ds.text import in_line
from moce_ds.workflow.step import Launch, Step, StepRecord, Workflow, now, perform

_logger = logging.getLogger(__name__)


class Progress:
    """Logs the progress of a workflow, a line for each change of a step."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow

    def skipped(self, step: Step) -> None:
        """The step was done before."""
        _logger.info(f"{self.workflow.place(step)} is done")

    def waiting(self, step: Step) -> None:
        """Another process runs the step."""
        _logger.info(f"{self.workflow.place(step)} waits for the process that runs it")

    def started(self, step: Step) -> None:
        """The step begins."""
        _logger.info(
            f"{self.workflow.place(step)}{f' in {step.processes} processes' if step.processes > 1 else ''} ..."
        )

    def done(self, step: Step, seconds: float) -> None:
        """The step is done; waiting and running took so many seconds."""
        record = step.record()
        _logger.info(f"{self.workflow.place(step)} done in {duration(record.seconds if record else seconds)}")

    def stopped(self, step: Step) -> None:
        """The step has stopped where it can resume."""
        _logger.info(f"{self.workflow.place(step)} stopped")

    def failed(self, step: Step, seconds: float) -> None:
        """The step has failed; its message follows at the end."""


@dataclass(frozen=True)
class Failure:
    """A step that failed.

    Attributes:
        message: why; for a step with a log, the end of it.
        status: the exit status of what it ran.
        error: what it raised in this process; None where it ran in others.
        shown: whether its processes have printed the message.
    """

    step: Step
    message: str
    status: int
    error: MoceError | None = None
    shown: bool = False


@dataclass
class Outcome:
    """How running some steps ended.

    Attributes:
        stopped: steps that stopped before their end, by a signal or by a limit of their own.
    """

    failures: list[Failure] = field(default_factory=list)
    stopped: list[Step] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Exit status: STOPPED, LOST_PEER where the same command may well succeed, another one of a failure, or 0."""
        if self.stopped:
            return STOPPED
        found = {failure.status for failure in self.failures}
        return found.pop() if len(found) == 1 else int(bool(found))


class StepError(MoceError):
    """A step failed, with the exit status of what it ran."""

    def __init__(self, noun: str, failure: Failure) -> None:
        step = failure.step
        super().__init__(
            f"{noun.capitalize()} {step.name} failed: {failure.message}\n"
            f"Its state is in {step.records.path}. Rerun the same command to resume."
        )
        self.status = failure.status


def run_steps(steps: Sequence[Step], progress: Progress, keep_going: bool = False) -> Outcome:
    """Run steps that are not done, each when those of `steps` that it needs are done.

    A signal stops the step that runs at the next place where it can resume, and the steps after it are not begun.

    Args:
        keep_going: whether a step that fails leaves those to be run that do not need it.
    """
    waiting, outcome = list(steps), Outcome()
    while (keep_going or not outcome.failures) and (step := _next(waiting, outcome)):
        waiting.remove(step)
        try:
            _run(step, progress, outcome)
        except (KeyboardInterrupt, click.Abort):  # click makes the one into the other
            progress.stopped(step)
            outcome.stopped.append(step)
            break
    return outcome


def _next(waiting: Sequence[Step], outcome: Outcome) -> Step | None:
    """The first step that is not held back and that no other process runs, else the first that is not held back."""
    unfinished = {step.name for step in (*waiting, *outcome.stopped, *(failure.step for failure in outcome.failures))}
    ready = [step for step in waiting if not unfinished.intersection(step.needs)]
    return next((step for step in ready if not is_held(step.lock)), ready[0] if ready else None)


def _run(step: Step, progress: Progress, outcome: Outcome) -> None:
    """Run one step, or wait for the process that does, and add how it ended to `outcome`."""
    if is_held(step.lock):
        progress.waiting(step)
    elif step.is_done():
        progress.skipped(step)
        return
    else:
        progress.started(step)
    began = time.monotonic()
    failure, status = _carry_out(step)
    seconds = time.monotonic() - began
    if status == 0:
        progress.done(step, seconds)
    elif status == STOPPED:
        progress.stopped(step)
        outcome.stopped.append(step)
    else:
        progress.failed(step, seconds)
        outcome.failures.append(failure or _explained(step, status, seconds))


def _carry_out(step: Step) -> tuple[Failure | None, int]:
    """Run a step here or in processes of its own; its status, and how it failed where it failed here."""
    if step.launch is None:
        try:
            perform(step)
        except MoceError as error:
            return Failure(step, str(error), error.status, error), error.status
        return None, 0
    while True:
        with held(step.lock):
            if step.is_done():  # another process was faster
                return None, 0
        status = _start(step.launch, step.processes)  # the first of these processes holds the lock
        if status in (0, STOPPED) or not is_held(step.lock):  # else those of another start were faster: wait for them
            return None, status


def _start(launch: Launch, processes: int) -> int:
    """Exit status of the processes of a step, negative for a signal that killed the one with a log."""
    if launch.log is not None:
        return run_logged(launch.command, launch.log)
    return run_processes(launch.command, processes)


def _explained(step: Step, status: int, seconds: float) -> Failure:
    """Why the processes of a step failed. Its record is written here unless its first process has done so."""
    log, record = step.launch and step.launch.log, step.record()
    lost = LOST_PEER if status < 0 else status
    if log is None and record is not None and record.state == "failed":
        return Failure(step, record.message, lost, shown=True)
    message = log_tail(log) if log else f"its processes ended with status {status}. Their messages are above."
    record = record or StepRecord(step.made_from().parts)
    step.records.write(replace(record, state="failed", at=now(), seconds=round(seconds, 1), message=message))
    return Failure(step, message, lost)


def states_table(workflow: Workflow, title: str) -> Table:
    """The steps and how far they are. Raises ArtefactError for a damaged record."""
    table = Table(title=in_line(title), title_justify="left")
    for heading, justify in ((workflow.noun, "left"), ("processes", "right"), ("state", "left"), ("since", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("seconds", justify="right")
    for step in workflow.steps:
        record = step.record()
        seconds = f"{record.seconds:.0f}" if record and record.seconds else ""
        table.add_row(step.name, str(step.processes * step.nodes), step.state(), record.at if record else "", seconds)
    return table


def duration(seconds: float) -> str:
    """Seconds or minutes, in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
