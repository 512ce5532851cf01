"""`moce study CONFIG`: a grid of runs. Each cell is an independent stage: pre-train, evaluate, measure.

    python -m moce_ds.cli.workflow.study STUDY_FOLDER CELL

`moce study` starts this command in a new process for every cell; the output goes to the cell's log.
"""

import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from moce_ds.cli.launch.local import run_processes
from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.stages.registry import run_verb
from moce_ds.cli.workflow.runner import Failure, Progress, duration, run_stages, states_table
from moce_ds.cli.workflow.stage import Launch, Stage, StageRecord, Workflow, perform
from moce_ds.cli.workflow.study_grid import Cell, StudySettings, cells_of, check_places, check_settings
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import from_tree, to_tree
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.host.program import run_main, say
from moce_ds.common.host.rank import ProcessRank, lone_process
from moce_ds.common.storage.metrics_file import METRICS, read_metrics
from moce_ds.evaluation.results_file import RESULTS, read_results
from moce_ds.forecast.step_cost import Work
from moce_ds.inspection.study_folder import CELL, STUDY, CellRecord, StudyRecord

_logger = logging.getLogger(__name__)

_HELD_OUT = "held out"


def run_study(study: StudySettings, only: str | None = None) -> int:
    """Run all cells that are not done, one after the other, or `only` one; returns the exit status.

    Several such processes share the cells, also on several machines with one file system. A failed cell does not stop
    the others; it is listed at the end. A signal is passed on to the running cell, which stops after a step.

    Raises:
        ConfigError: before anything is run: a fault in the settings of any cell, or a folder that holds another run.
    """
    cells = checked_cells(study)
    workflow = study_workflow(study, cells)
    chosen = workflow.stages if only is None else [workflow.named(only)]
    if ProcessRank.here().world_size == 1:
        _refuse_other_machines(chosen)
    check_places(study, cells)
    keep_record(study, cells)
    if ProcessRank.here().world_size > 1:
        return _share(chosen, only)
    pending = [cell for cell in chosen if not cell.is_done()]
    outcome = run_stages(pending, _CellProgress(workflow, len(pending)), keep_going=True)
    if outcome.stopped:  # by a signal, or run.max_hours of a cell
        _logger.info(f"Stopped as asked, {workflow.summary(chosen)}. Rerun the same command to resume.")
        return outcome.status
    say(f"{workflow.summary(chosen)} in {study.out}.")
    for failure in outcome.failures:
        _list_failure(failure)
    return outcome.status


def list_study(study: StudySettings) -> Table:
    """A table of the cells and their states. Raises ConfigError for a fault in the settings of any cell."""
    return states_table(study_workflow(study, checked_cells(study)), f"{study.pretrain} -> {study.out}")


def checked_cells(study: StudySettings) -> list[Cell]:
    """The cells, after a check of their settings. Raises ConfigError, which lists every fault."""
    cells = cells_of(study)
    check_settings(cells)
    return cells


def keep_record(study: StudySettings, cells: Sequence[Cell]) -> None:
    """Write the record that the cells' processes and the report read. Raises ArtefactError."""
    StudyRecord(to_tree(study), [cell.name for cell in cells]).write(study.out)


def _refuse_other_machines(cells: Sequence[Stage]) -> None:
    wide = next((cell for cell in cells if cell.nodes > 1), None)
    if wide is not None:
        raise ConfigError(
            f"nodes: cell {wide.name} takes {wide.nodes} machines. Queue the study with moce launch slurm, "
            "or start the cell with --cell in each of its processes (torchrun)."
        )


def _share(chosen: Sequence[Stage], only: str | None) -> int:
    """Run a cell as one of the processes that torchrun or a job has started; the first process evaluates."""
    if only is None:
        raise ConfigError("This is one of several processes: choose the cell that they run, with --cell NAME.")
    (cell,), here = chosen, ProcessRank.here().world_size
    if here != cell.processes * cell.nodes:
        raise ConfigError(f"{cell.name} is a cell of {cell.processes * cell.nodes} processes, and {here} were started.")
    perform(cell)
    return 0


class _CellProgress(Progress):
    """Also estimates the remaining time."""

    def __init__(self, workflow: Workflow, pending: int) -> None:
        super().__init__(workflow)
        self._pending = pending
        self._took: list[float] = []

    def skipped(self, stage: Stage) -> None:
        self._pending -= 1  # done by another process
        super().skipped(stage)

    def waiting(self, stage: Stage) -> None:
        self._pending -= 1
        super().waiting(stage)

    def started(self, stage: Stage) -> None:
        self._pending -= 1
        super().started(stage)

    def done(self, stage: Stage, seconds: float) -> None:
        self._took.append(seconds)
        left = self._pending * sum(self._took) / len(self._took)
        estimate = f", about {duration(left)} left" if self._pending else ""
        _logger.info(f"{self.workflow.place(stage)} done in {duration(seconds)}{estimate}")

    def failed(self, stage: Stage, seconds: float) -> None:
        _logger.warning(f"{self.workflow.place(stage)} failed after {duration(seconds)}")


def _list_failure(failure: Failure) -> None:
    cell, message = failure.stage, failure.message.replace("\n", "\n    ")
    log = cell.launch and cell.launch.log
    _logger.error(f"cell {cell.name} failed (log: {log}; to rerun it: --cell {cell.name})\n    {message}")


def study_workflow(study: StudySettings, cells: list[Cell]) -> Workflow:
    """The cells as independent stages."""
    return Workflow("study", "cell", study.out, [cell_stage(study, cell) for cell in cells])


def cell_stage(study: StudySettings, cell: Cell) -> Stage:
    """A cell as a stage in a new process. Only the evaluations decide whether it is done: its run checks the rest."""

    def work() -> dict[str, Any]:
        config = cell.config()
        _pretrain(cell)
        with lone_process():  # the other processes have only trained
            _evaluate(study, cell, config.model_kind.has_experts)
        return measures(cell, Work.of(config))

    def profile(common: SlurmProfile) -> SlurmProfile:
        gpus = cell.processes if common.gpus_per_node else 0
        return replace(common, nodes=cell.nodes, min_nodes=None, tasks_per_node=cell.processes, gpus_per_node=gpus)

    return Stage(
        cell.name,
        CellFile(cell),
        cell.lock,
        lambda: MadeFrom({"evaluations": study.evaluations}),
        work,
        share=lambda: run_verb(["pretrain", *cell.words]),
        processes=cell.processes,
        nodes=cell.nodes,
        launch=Launch([sys.executable, "-m", "moce_ds.cli.workflow.study", str(study.out), cell.name], cell.log),
        profile=profile,
    )


@dataclass(frozen=True)
class CellFile:
    """The record of a cell, `cell.json`, with its state and its settings. The report reads it."""

    cell: Cell

    @property
    def path(self) -> Path:
        """As `RecordFile`."""
        return self.cell.folder / CELL

    def read(self) -> StageRecord | None:
        """As `RecordFile`."""
        found = self.cell.record()
        if found is None:
            return None
        return StageRecord(
            {"evaluations": found.evaluations},
            found.state,
            seconds=found.seconds,
            message=found.message,
            measures=dict(found.measures),
        )

    def write(self, record: StageRecord) -> None:
        """As `RecordFile`."""
        cell = self.cell
        CellRecord(
            cell.name,
            cell.at,
            cell.processes,
            cell.nodes,
            to_tree(cell.config()),
            record.made_from["evaluations"],
            record.state,
            record.seconds,
            record.measures,
            record.message,
        ).write(cell.folder)


def measures(cell: Cell, work: Work) -> dict[str, float]:
    """The measurements of a finished cell, in SI units; docs/studies.md defines them.

    A loss that was not finite in the whole last tenth of the records is left out.

    Args:
        work: the work of the cell's model.

    Raises:
        ArtefactError: the run recorded nothing.
    """
    records = read_metrics(cell.run / METRICS)
    if not records:
        raise ArtefactError(f"{cell.run / METRICS} holds no record: delete {cell.folder} and run the cell again.")
    last, warm = records[-max(1, len(records) // 10) :], records[len(records) // 5 :]
    count = work.parameters
    finite = {key: [r[key] for r in last if r[key] is not None] for key in ("reconstruction", "loss")}
    found: dict[str, float] = {
        **{key: statistics.fmean(values) for key, values in finite.items() if values},
        "images_per_second": statistics.median(record["images_per_second"] for record in warm),
        "peak_memory": max(record["peak_memory"] for record in records),
        "active_parameters": count.active,
        "stored_parameters": count.total,
    }
    if "moved" in last[-1]:
        found["exchange_bytes"] = statistics.fmean(r["moved"] for r in warm) * work.all_rows_bytes
    for record in read_results(cell.folder / RESULTS):
        if record["verb"] == "probe":
            found[f"probe {record['task']}"] = record["map11" if "map11" in record else "top1"]
        elif record["verb"] == "evaluate":
            found |= {f"{_HELD_OUT}, selected route": record["selected"], f"{_HELD_OUT}, own routes": record["own"]}
    return found


def _pretrain(cell: Cell) -> None:
    """Train the cell's run: in new processes if this one is alone, else as the first of several processes.

    Raises:
        SystemExit: the run failed, or was stopped.
    """
    if ProcessRank.here().world_size > 1:
        run_verb(["pretrain", *cell.words])
    elif status := run_processes([sys.executable, "-m", "moce_ds", "pretrain", *cell.words], cell.processes):
        raise SystemExit(status)


def _evaluate(study: StudySettings, cell: Cell, has_experts: bool) -> None:
    """Probe each task's expert (or the dense encoder), and measure the error on held-out images."""
    results = ("--results", cell.folder / RESULTS)
    for task, folder in study.tasks.items():
        encoder = cell.folder / "experts" / task if has_experts else cell.run
        if not encoder.exists():
            run_verb(["export", cell.run, encoder, "--data", folder / "train"])
        split = ("--train", folder / "train", "--test", folder / "test")
        run_verb(["probe", encoder, *split, "--task", task, "--model", cell.name, *results])
    if study.heldout and has_experts:
        run_verb(["evaluate", cell.run, "--data", study.heldout, "--task", _HELD_OUT, *results])


def main() -> int:
    """Run the cell that the arguments name; returns 0. Raises the errors of `perform`."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    record = StudyRecord.read(folder)
    study = from_tree(StudySettings, record.settings, str(folder / STUDY))
    perform(study_workflow(study, cells_of(study)).named(name))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
