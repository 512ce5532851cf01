"""Read what `moce study` left on disk: its cells, and their measures over seeds.

A cell is one run. Cells that differ in nothing but the seed make a point; points along the key `x` that agree in
everything else make a series.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moce_ds.errors import MoceError
from moce_ds.evaluation.results_file import results_findings
from moce_ds.storage.checksums import Findings, document_findings, read_checked

STUDY, CELLS, CELL = "study.json", "cells", "cell.json"
"""The study's record, the folder of its cells, and the record in the folder of each."""

SEED, BATCH = "run.seed", "optim.batch_size"
LAUNCH_KEYS = ("processes", "nodes")
"""Keys of a grid which say how a run is started; all others are its settings."""


@dataclass(frozen=True)
class StudyRecord:
    """`study.json`: the settings of the study, and the names of its cells in order."""

    settings: dict[str, Any]
    cells: list[str]


@dataclass(frozen=True)
class CellRecord:
    """`cell.json`: one cell, as far as it has come.

    Attributes:
        at: keys of the grid and the cell's values.
        settings: all settings of its run.
        evaluations: what it is evaluated on.
        seconds: how long the start that ended it took.
        measures: numbers in SI units (bytes, images a second; accuracies 0 to 1), once it is done.
        told: the last lines of its log, where it failed.
    """

    name: str
    at: dict[str, Any]
    processes: int
    nodes: int
    settings: dict[str, Any]
    evaluations: dict[str, str]
    state: Literal["begun", "done", "failed"] = "begun"
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    told: str = ""


@dataclass(frozen=True)
class Point:
    """Cells that differ in nothing but the seed, all done."""

    cells: list[CellRecord]

    def at(self, key: str) -> Any:
        """The value of a key of the grid, None where the point has none."""
        return self.cells[0].at.get(key)

    @property
    def world_size(self) -> int:
        return self.cells[0].processes * self.cells[0].nodes

    @property
    def batch_size(self) -> int:
        """Images of a step over all processes."""
        return int(self.cells[0].settings["optim"]["batch_size"])

    def values(self, measure: str) -> list[float]:
        """A measure of every seed that has it."""
        return [cell.measures[measure] for cell in self.cells if measure in cell.measures]

    def mean_and_deviation(self, measure: str) -> tuple[float, float] | None:
        """Mean and sample standard deviation over seeds (0 for a single one); None where it was not measured."""
        values = self.values(measure)
        if not values:
            return None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class StudyFolder:
    """A study: its cells that were begun, in order, and the names of those that were not."""

    path: Path
    settings: dict[str, Any]
    cells: list[CellRecord]
    waiting: list[str]

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def keys(self) -> list[str]:
        """All keys of the grid, in order."""
        return list(dict.fromkeys(key for cell in self.cells for key in cell.at))

    @property
    def measures(self) -> list[str]:
        """The names of everything that was measured, in order."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.measures))

    @property
    def points(self) -> list[Point]:
        """The points that have a finished cell, in order."""
        grouped: dict[str, list[CellRecord]] = {}
        for cell in self.cells:
            if cell.state == "done":
                where = str([(key, value) for key, value in cell.at.items() if key != SEED])
                grouped.setdefault(where, []).append(cell)
        return [Point(cells) for cells in grouped.values()]

    @property
    def x(self) -> str | None:
        """The key on the horizontal axis: the one that the study names, else the one with the most values."""
        if named := self.settings.get("x"):
            return str(named)
        numbers = {key: len({str(cell.at.get(key)) for cell in self.cells}) for key in self.keys if key != SEED}
        return max(numbers, key=lambda key: numbers[key], default=None)


def read_study_folder(folder: Path) -> StudyFolder:
    """Read a study as far as it has come. Raises ArtefactError for damaged records."""
    record = read_checked(folder / STUDY, StudyRecord, "a study's record", "moce study")
    paths = {name: folder / CELLS / name / CELL for name in record.cells}
    cells = [
        read_checked(path, CellRecord, "a cell's record", "moce study") for path in paths.values() if path.exists()
    ]
    waiting = [name for name, path in paths.items() if not path.exists()]
    return StudyFolder(folder, record.settings, cells, waiting)


def study_findings(folder: Path, verify: Callable[[Path], Findings]) -> Findings:
    """What is wrong with the records of a study, its cells' results and, by `verify`, their runs. ArtefactError."""
    names = read_checked(folder / STUDY, StudyRecord, "a study's record", "moce study").cells
    found = document_findings(folder / STUDY, STUDY)
    for name in names:
        cell = f"{CELLS}/{name}"
        for verified in (_record_findings, lambda place: _part(place / "run", verify), _results_findings):
            try:
                found += verified(folder / cell).below(cell)
            except MoceError as error:
                found += Findings([str(error)])
    return found


def _record_findings(cell: Path) -> Findings:
    if not (cell / CELL).exists():
        return Findings([f"{CELL}: is missing, and the cell's run is there"] if (cell / "run").exists() else [])
    record = read_checked(cell / CELL, CellRecord, "a cell's record", "moce study")
    run_lost = record.state == "done" and not (cell / "run" / "config.yaml").exists()
    return document_findings(cell / CELL, CELL) + Findings(["run/config.yaml: is missing"] if run_lost else [])


def _results_findings(cell: Path) -> Findings:
    if (cell / "results.json").exists():
        return results_findings(cell / "results.json")
    record = read_checked(cell / CELL, CellRecord, "a cell's record", "moce study") if (cell / CELL).exists() else None
    measured = record is not None and record.state == "done" and record.evaluations
    return Findings(["results.json: is missing"] if measured else [])


def _part(run: Path, verify: Callable[[Path], Findings]) -> Findings:
    return verify(run).below("run") if (run / "config.yaml").exists() else Findings()


def series(points: Sequence[Point], x: Callable[[Point], Any], keys: Iterable[str]) -> dict[str, list[Point]]:
    """Points parted by `keys`, each series named `key=value, ...` (empty where there is but one).

    Keys that follow from `x`, the value on the horizontal axis, part nothing: such as experts.ep_size, where it grows
    with experts.num.
    """

    def follows(key: str) -> bool:
        seen: dict[str, Any] = {}
        return all(seen.setdefault(str(x(point)), point.at(key)) == point.at(key) for point in points)

    parting = [key for key in keys if not follows(key)]
    found: dict[str, list[Point]] = {}
    for point in points:
        name = ", ".join(f"{key.rsplit('.', 1)[-1]}={point.at(key)}" for key in parting)
        found.setdefault(name, []).append(point)
    return found
