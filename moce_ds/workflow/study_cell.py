"""One cell of a study: pre-train, evaluate, measure.

    python -m moce_ds.workflow.study_cell STUDY_FOLDER CELL

`moce study` starts this for every cell, in a process of its own whose output is the cell's log.
"""

import dataclasses
import logging
import statistics
import sys
import time
from pathlib import Path

from moce_ds.artefacts.study_folder import CELL, STUDY, CellRecord, StudyRecord
from moce_ds.cli.verbs import run_verb
from moce_ds.config import settings as configuration
from moce_ds.console import run_main
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.evaluation.results_file import read_results
from moce_ds.host.place import Place
from moce_ds.launch.local import run_processes
from moce_ds.planning.work import all_rows_bytes, count_parameters
from moce_ds.storage.checksums import read_checked, write_checked
from moce_ds.storage.files import writes_to
from moce_ds.storage.locks import held
from moce_ds.storage.metrics_file import read_metrics
from moce_ds.training.settings import PretrainSettings
from moce_ds.workflow.study_grid import Cell, StudySettings, cells_of

_logger = logging.getLogger(__name__)

_HELD_OUT = "held out"


def main() -> int:
    """Run the cell that the arguments name; returns the exit status. Raises MoceError as `run_cell`."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    record = read_checked(folder / STUDY, StudyRecord, "a study's record", "moce study")
    study = configuration.from_tree(StudySettings, record.settings, str(folder / STUDY))
    return run_cell(study, next(cell for cell in cells_of(study) if cell.name == name))


def run_cell(study: StudySettings, cell: Cell) -> int:
    """Run a cell to its end, or on to it; returns 0, or what its run ended with (STOPPED: as asked).

    In one of several processes that torchrun or a job has started, this process is one of the run's, and the first one
    evaluates. Else the run's processes are started here.

    Raises:
        MoceError: as the stages.
    """
    if Place.here().rank:
        return _pretrain(cell)
    began = time.monotonic()
    with held(cell.lock):
        if is_done(study, cell):
            _logger.info(f"{cell.name} was done meanwhile by another process.")
            return 0
        config = cell.config()
        write_record(cell, record := _begun(study, cell, config))
        if status := _pretrain(cell):
            return status
        _evaluate(study, cell, config)
        done = dataclasses.replace(
            record, state="done", measures=measures(cell, config), seconds=round(time.monotonic() - began, 1)
        )
        write_record(cell, done)
    return 0


def is_done(study: StudySettings, cell: Cell) -> bool:
    """Whether the cell has been run to its end, and evaluated on all that the study names. Raises ArtefactError."""
    record = cell.record()
    return record is not None and record.state == "done" and record.evaluations == study.evaluations


def write_record(cell: Cell, record: CellRecord) -> None:
    """Replace `cell.json`. Raises ArtefactError."""
    with writes_to(cell.folder):
        write_checked(cell.folder / CELL, dataclasses.asdict(record))


def measures(cell: Cell, config: PretrainSettings) -> dict[str, float]:
    """What a finished cell is compared by, in SI units; docs/studies.md says how each is measured.

    Raises:
        ArtefactError: the run recorded nothing.
    """
    records = read_metrics(cell.run / "metrics.jsonl")
    if not records:
        raise ArtefactError(
            f"{cell.run / 'metrics.jsonl'} holds no record: delete {cell.folder} and run the cell again."
        )
    last, warm = records[-max(1, len(records) // 10) :], records[len(records) // 5 :]
    count = count_parameters(config)
    found: dict[str, float] = {
        **{key: statistics.fmean(r[key] for r in last if r[key] is not None) for key in ("reconstruction", "loss")},
        "images_per_second": statistics.median(record["images_per_second"] for record in warm),
        "peak_memory": max(record["peak_memory"] for record in records),
        "active_parameters": count.active,
        "stored_parameters": count.total,
    }
    if "moved" in last[-1]:
        found["exchange_bytes"] = statistics.fmean(r["moved"] for r in warm) * all_rows_bytes(config)
    for record in read_results(cell.folder / "results.json"):
        if record["verb"] == "probe":
            found[f"probe {record['task']}"] = record["map11" if "map11" in record else "top1"]
        elif record["verb"] == "evaluate":
            found |= {f"{_HELD_OUT}, selected route": record["selected"], f"{_HELD_OUT}, own routes": record["own"]}
    return found


def _begun(study: StudySettings, cell: Cell, config: PretrainSettings) -> CellRecord:
    tree = configuration.to_tree(config)
    return CellRecord(cell.name, cell.at, cell.processes, cell.nodes, tree, study.evaluations)


def _pretrain(cell: Cell) -> int:
    here = Place.here().world_size
    if here == 1:
        return run_processes([sys.executable, "-m", "moce_ds", "pretrain", *cell.words], cell.processes)
    if here != cell.world_size:
        raise ConfigError(f"{cell.name} is a cell of {cell.world_size} processes, and was started in {here}.")
    run_verb(["pretrain", *cell.words])
    return 0


def _evaluate(study: StudySettings, cell: Cell, config: PretrainSettings) -> None:
    """A linear probe of each task's expert (or of the dense encoder), and the error on held-out images."""
    dense, results = config.model.arch == "mae", ("--results", cell.folder / "results.json")
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
