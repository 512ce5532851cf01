"""A cell of a study as a step: pre-train, evaluate, measure.

    python -m moce_ds.workflow.study_cell STUDY_FOLDER CELL

`moce study` starts this for every cell, in a process of its own whose output is the cell's log.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moce_ds.artefacts.study_folder import CELL, STUDY, CellRecord, StudyRecord
from moce_ds.cli.verbs import run_verb
from moce_ds.config.settings import from_tree, to_tree
from moce_ds.console import run_main
from moce_ds.errors import ArtefactError
from moce_ds.evaluation.results_file import RESULTS, read_results
from moce_ds.host.place import Place
from moce_ds.launch.local import run_processes
from moce_ds.launch.slurm_profile import SlurmProfile
from moce_ds.planning.work import Work
from moce_ds.storage.made_from import MadeFrom
from moce_ds.storage.metrics_file import METRICS, read_metrics
from moce_ds.training.settings import PretrainSettings
from moce_ds.workflow.step import Launch, Step, StepRecord, Workflow, perform
from moce_ds.workflow.study_grid import Cell, StudySettings, cells_of

_HELD_OUT = "held out"


def main() -> int:
    """Run the cell that the arguments name; returns 0. Raises as `perform`."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    record = StudyRecord.read(folder)
    study = from_tree(StudySettings, record.settings, str(folder / STUDY))
    perform(study_workflow(study, cells_of(study)).named(name))
    return 0


def study_workflow(study: StudySettings, cells: list[Cell]) -> Workflow:
    """The cells as steps, none of which needs another."""
    return Workflow("study", "cell", study.out, [cell_step(study, cell) for cell in cells])


def cell_step(study: StudySettings, cell: Cell) -> Step:
    """A cell as a step in a process of its own. It is done for what it was evaluated on: its run checks the rest."""

    def work() -> dict[str, Any]:
        config = cell.config()
        _pretrain(cell)
        _evaluate(study, cell, config)
        return measures(cell, config)

    def profile(common: SlurmProfile) -> SlurmProfile:
        gpus = cell.processes if common.gpus_per_node else 0
        return replace(common, nodes=cell.nodes, min_nodes=None, tasks_per_node=cell.processes, gpus_per_node=gpus)

    return Step(
        cell.name,
        CellFile(cell),
        cell.lock,
        lambda: MadeFrom({"evaluations": study.evaluations}),
        work,
        share=lambda: run_verb(["pretrain", *cell.words]),
        processes=cell.processes,
        nodes=cell.nodes,
        launch=Launch([sys.executable, "-m", "moce_ds.workflow.study_cell", str(study.out), cell.name], cell.log),
        profile=profile,
    )


@dataclass(frozen=True)
class CellFile:
    """The record of a cell, `cell.json`, which the report reads: besides its state it says what the cell is."""

    cell: Cell

    @property
    def path(self) -> Path:
        """As `RecordFile`."""
        return self.cell.folder / CELL

    def read(self) -> StepRecord | None:
        """As `RecordFile`."""
        found = self.cell.record()
        if found is None:
            return None
        return StepRecord(
            {"evaluations": found.evaluations},
            found.state,
            seconds=found.seconds,
            message=found.told,
            measures=dict(found.measures),
        )

    def write(self, record: StepRecord) -> None:
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


def measures(cell: Cell, config: PretrainSettings) -> dict[str, float]:
    """What a finished cell is compared by, in SI units; docs/studies.md says how each is measured.

    Raises:
        ArtefactError: the run recorded nothing.
    """
    records = read_metrics(cell.run / METRICS)
    if not records:
        raise ArtefactError(f"{cell.run / METRICS} holds no record: delete {cell.folder} and run the cell again.")
    last, warm = records[-max(1, len(records) // 10) :], records[len(records) // 5 :]
    work = Work.of(config)
    count = work.parameters
    found: dict[str, float] = {
        **{key: statistics.fmean(r[key] for r in last if r[key] is not None) for key in ("reconstruction", "loss")},
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
    """Train the cell's run: in processes of its own where this one is alone, else as the first of them.

    Raises:
        SystemExit: the run failed, or was stopped.
    """
    if Place.here().world_size > 1:
        run_verb(["pretrain", *cell.words])
    elif status := run_processes([sys.executable, "-m", "moce_ds", "pretrain", *cell.words], cell.processes):
        raise SystemExit(status)


def _evaluate(study: StudySettings, cell: Cell, config: PretrainSettings) -> None:
    """A linear probe of each task's expert (or of the dense encoder), and the error on held-out images."""
    dense, results = not config.family.has_experts, ("--results", cell.folder / RESULTS)
    for task, folder in study.tasks.items():
        encoder = cell.run if dense else cell.folder / "experts" / task
        if not encoder.exists():
            run_verb(["export", cell.run, encoder, "--data", folder / "train"])
        split = ("--train", folder / "train", "--test", folder / "test")
        run_verb(["probe", encoder, *split, "--task", task, "--model", cell.name, *results])
    if study.heldout and not dense:
        run_verb(["evaluate", cell.run, "--data", study.heldout, "--task", _HELD_OUT, *results])


if __name__ == "__main__":
    sys.exit(run_main(main))
