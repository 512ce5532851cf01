"""A grid of runs: `moce study CONFIG`. Cells that are done stay; the same command goes on with the others."""

import dataclasses
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moce_ds.artefacts.study_folder import STUDY, StudyRecord
from moce_ds.config import settings as configuration
from moce_ds.console import say
from moce_ds.errors import LOST_PEER, STOPPED, ConfigError
from moce_ds.host.interrupts import kept_signals, obeyed, wait_for
from moce_ds.host.place import Place
from moce_ds.storage.checksums import write_checked
from moce_ds.storage.files import writes_to
from moce_ds.storage.locks import is_held
from moce_ds.text import counted, in_line
from moce_ds.workflow.study_cell import is_done, run_cell, write_record
from moce_ds.workflow.study_grid import Cell, StudySettings, cells_of, check_places, check_settings

_logger = logging.getLogger(__name__)

_TOLD_LINES = 8


def run_study(study: StudySettings, only: str | None = None) -> int:
    """Run all cells that are not done, one after the other, or `only` one; returns the exit status.

    Several of these at once, also on several machines with one file system, share the cells. A cell that fails does not
    stop the others; it is listed at the end. A signal is passed on to the cell that runs, which stops at a step.

    Raises:
        ConfigError: before anything is run: a fault in the settings of any cell, or a folder that holds another run.
    """
    cells = _checked(study)
    if Place.here().world_size == 1:
        _refuse_other_machines(cells if only is None else [_named(cells, only)])
    check_places(study, cells)
    keep_record(study, cells)
    if only is not None:
        cells = [_named(cells, only)]
    if Place.here().world_size > 1:
        if only is None:
            raise ConfigError("This is one of several processes: choose the cell that they run, with --cell NAME.")
        return run_cell(study, cells[0])
    with kept_signals(obeyed()) as asked:
        failed = _run_all(study, cells, asked)
    done = sum(is_done(study, cell) for cell in cells)
    if done + len(failed) < len(cells):  # by a signal, or run.max_hours of a cell
        _logger.info(
            f"Stopped as asked, {done} of {counted(len(cells), 'cell')} done. Rerun the same command to resume."
        )
        return STOPPED
    say(f"{done} of {counted(len(cells), 'cell')} done in {study.out}. Look at: moce report {study.out}")
    for cell, _ in failed:
        told = _tail(cell.log).replace("\n", "\n    ")
        _logger.error(f"cell {cell.name} failed (log: {cell.log}; to rerun it: --cell {cell.name})\n    {told}")
    if failed and all(status == LOST_PEER for _, status in failed):  # the same command may well succeed
        return LOST_PEER
    return 1 if failed else 0


def states_table(study: StudySettings) -> Table:
    """The cells and how far they are. Raises ConfigError for a fault in the settings of any."""
    table = Table(title=in_line(f"{study.pretrain} -> {study.out}"), title_justify="left")
    for heading, justify in (("cell", "left"), ("processes", "right"), ("state", "left"), ("seconds", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for cell in _checked(study):
        record = cell.record()
        state: str = "waiting" if record is None else record.state
        if state == "done" and not is_done(study, cell):
            state = "to be evaluated"
        if is_held(cell.lock):
            state = "running"
        seconds = f"{record.seconds:.0f}" if record and record.seconds else ""
        table.add_row(cell.name, str(cell.world_size), state, seconds)
    return table


def _checked(study: StudySettings) -> list[Cell]:
    cells = cells_of(study)
    check_settings(cells)
    return cells


def _named(cells: Sequence[Cell], name: str) -> Cell:
    for cell in cells:
        if cell.name == name:
            return cell
    raise ConfigError(f"--cell: the study has no cell {name}; it has {', '.join(cell.name for cell in cells)}.")


def _refuse_other_machines(cells: Sequence[Cell]) -> None:
    wide = next((cell for cell in cells if cell.nodes > 1), None)
    if wide is not None:
        raise ConfigError(
            f"nodes: cell {wide.name} takes {wide.nodes} machines. Queue the study with moce launch slurm, "
            "or start the cell with --cell in each of its processes (torchrun)."
        )


def keep_record(study: StudySettings, cells: Sequence[Cell]) -> None:
    """Leave what the cells' processes and the report read. Raises ArtefactError."""
    record = StudyRecord(configuration.to_tree(study), [cell.name for cell in cells])
    with writes_to(study.out):
        write_checked(study.out / STUDY, dataclasses.asdict(record))


def _run_all(study: StudySettings, cells: Sequence[Cell], asked: list[int]) -> list[tuple[Cell, int]]:
    """Run what is not done, what another process holds last; returns the cells that failed and their status."""
    pending = [cell for cell in cells if not is_done(study, cell)]
    failed: list[tuple[Cell, int]] = []
    took, total = [], len(pending)
    while pending and not asked:
        cell = next((cell for cell in pending if not is_held(cell.lock)), pending[0])
        pending.remove(cell)
        label = f"cell {total - len(pending)} of {total} {cell.name}"
        _logger.info(f"{label} ...")
        began = time.monotonic()
        status = _work(study, cell, asked)
        seconds = time.monotonic() - began
        if status == 0:
            took.append(seconds)
            left = f", about {_duration(len(pending) * sum(took) / len(took))} left" if pending else ""
            _logger.info(f"{label} done in {_duration(seconds)}{left}")
        elif asked or status == STOPPED:
            _logger.info(f"{label} stopped")
        else:
            _logger.warning(f"{label} failed after {_duration(seconds)}")
            _note_failure(cell, status, seconds)
            failed.append((cell, LOST_PEER if status < 0 else status))
    return failed


def _work(study: StudySettings, cell: Cell, asked: Sequence[int]) -> int:
    """Run a cell in a process of its own, whose output is the cell's log; returns how it ended."""
    with writes_to(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
        log = open(cell.log, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    with log:
        command = [sys.executable, "-m", "moce_ds.workflow.study_cell", str(study.out), cell.name]
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
        worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return wait_for(worker, asked)


def _note_failure(cell: Cell, status: int, seconds: float) -> None:
    if status < 0:
        with open(cell.log, "a", encoding="utf-8") as log:
            log.write(f"The cell's process was killed by {signal.Signals(-status).name}.\n")
    if record := cell.record():
        told = _tail(cell.log)
        write_record(cell, dataclasses.replace(record, state="failed", seconds=round(seconds, 1), told=told))


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_TOLD_LINES:])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
