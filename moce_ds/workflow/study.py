"""`moce study CONFIG`: a grid of runs. The cells are steps that need nothing of one another."""

import logging
from collections.abc import Sequence

from rich.table import Table

from moce_ds.artefacts.study_folder import StudyRecord
from moce_ds.config import settings as configuration
from moce_ds.console import say
from moce_ds.errors import ConfigError
from moce_ds.host.place import Place
from moce_ds.workflow.engine import Failure, Progress, duration, run_steps, states_table
from moce_ds.workflow.step import Step, Workflow, perform
from moce_ds.workflow.study_cell import study_workflow
from moce_ds.workflow.study_grid import Cell, StudySettings, cells_of, check_places, check_settings

_logger = logging.getLogger(__name__)


def run_study(study: StudySettings, only: str | None = None) -> int:
    """Run all cells that are not done, one after the other, or `only` one; returns the exit status.

    Several of these at once, also on several machines with one file system, share the cells. A cell that fails does not
    stop the others; it is listed at the end. A signal is passed on to the cell that runs, which stops at a step.

    Raises:
        ConfigError: before anything is run: a fault in the settings of any cell, or a folder that holds another run.
    """
    cells = checked_cells(study)
    workflow = study_workflow(study, cells)
    chosen = workflow.steps if only is None else [workflow.named(only)]
    if Place.here().world_size == 1:
        _refuse_other_machines(chosen)
    check_places(study, cells)
    keep_record(study, cells)
    if Place.here().world_size > 1:
        return _share(chosen, only)
    pending = [cell for cell in chosen if not cell.is_done()]
    outcome = run_steps(pending, _CellProgress(workflow, len(pending)), keep_going=True)
    if outcome.stopped:  # by a signal, or run.max_hours of a cell
        _logger.info(f"Stopped as asked, {workflow.summary(chosen)}. Rerun the same command to resume.")
        return outcome.status
    say(f"{workflow.summary(chosen)} in {study.out}. Look at: moce report {study.out}")
    for failure in outcome.failures:
        _list_failure(failure)
    return outcome.status


def list_study(study: StudySettings) -> Table:
    """The cells and how far they are. Raises ConfigError for a fault in the settings of any."""
    return states_table(study_workflow(study, checked_cells(study)), f"{study.pretrain} -> {study.out}")


def checked_cells(study: StudySettings) -> list[Cell]:
    """The cells, whose settings are checked. Raises ConfigError, which lists every fault."""
    cells = cells_of(study)
    check_settings(cells)
    return cells


def keep_record(study: StudySettings, cells: Sequence[Cell]) -> None:
    """Write what the cells' processes and the report read. Raises ArtefactError."""
    StudyRecord(configuration.to_tree(study), [cell.name for cell in cells]).write(study.out)


def _refuse_other_machines(cells: Sequence[Step]) -> None:
    wide = next((cell for cell in cells if cell.nodes > 1), None)
    if wide is not None:
        raise ConfigError(
            f"nodes: cell {wide.name} takes {wide.nodes} machines. Queue the study with moce launch slurm, "
            "or start the cell with --cell in each of its processes (torchrun)."
        )


def _share(chosen: Sequence[Step], only: str | None) -> int:
    """Run a cell as one of the processes that torchrun or a job has started; the first one evaluates."""
    if only is None:
        raise ConfigError("This is one of several processes: choose the cell that they run, with --cell NAME.")
    (cell,), here = chosen, Place.here().world_size
    if here != cell.processes * cell.nodes:
        raise ConfigError(f"{cell.name} is a cell of {cell.processes * cell.nodes} processes, and {here} were started.")
    perform(cell)
    return 0


class _CellProgress(Progress):
    """Estimates the time that the other cells take."""

    def __init__(self, workflow: Workflow, pending: int) -> None:
        super().__init__(workflow)
        self._pending = pending
        self._took: list[float] = []

    def skipped(self, step: Step) -> None:
        self._pending -= 1  # another process was faster
        super().skipped(step)

    def waiting(self, step: Step) -> None:
        self._pending -= 1
        super().waiting(step)

    def started(self, step: Step) -> None:
        self._pending -= 1
        super().started(step)

    def done(self, step: Step, seconds: float) -> None:
        self._took.append(seconds)
        left = self._pending * sum(self._took) / len(self._took)
        estimate = f", about {duration(left)} left" if self._pending else ""
        _logger.info(f"{self.workflow.place(step)} done in {duration(seconds)}{estimate}")

    def failed(self, step: Step, seconds: float) -> None:
        _logger.warning(f"{self.workflow.place(step)} failed after {duration(seconds)}")


def _list_failure(failure: Failure) -> None:
    cell, message = failure.step, failure.message.replace("\n", "\n    ")
    log = cell.launch and cell.launch.log
    _logger.error(f"cell {cell.name} failed (log: {log}; to rerun it: --cell {cell.name})\n    {message}")
