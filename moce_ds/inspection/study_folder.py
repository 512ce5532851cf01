"""The folder of a study: its record, a folder for each cell, and the measures of the cells over seeds.

    study/
      study.json        settings of the study and names of its cells
      cells/NAME/       cell.json, the cell's run in run/, results.json, log.txt

A cell is one run. Cells that differ only in the seed form a point; points that differ only in the key `x` form a
series.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moce_ds.checkpoint.run_folder import CONFIG, RunFolder
from moce_ds.common.errors import MoceError
from moce_ds.common.storage.artefact import Rows, is_marked, some_of
from moce_ds.common.storage.checksums import Findings, document_findings, read_checked, write_checked
from moce_ds.common.storage.files import writes_to
from moce_ds.evaluation.results_file import RESULTS, ResultsFile

STUDY, CELLS, CELL = "study.json", "cells", "cell.json"
"""The study's record, the folder of its cells, and the record in the folder of each."""

RUN = "run"
"""The run in the folder of a cell."""

SEED, BATCH = "run.seed", "optim.batch_size"
LAUNCH_KEYS = ("processes", "nodes")
"""Keys of a grid that set how a run is started; all others are settings of the run."""

_MESSAGE = "told"  # key of the message in the record of a cell


@dataclass(frozen=True)
class StudyRecord:
    """`study.json`: the settings of the study, and the names of its cells in order."""

    settings: dict[str, Any]
    cells: list[str]

    @classmethod
    def read(cls, study: Path) -> "StudyRecord":
        """The record in a study's folder. Raises ArtefactError."""
        return read_checked(study / STUDY, cls, "a study's record", "moce study")

    def write(self, study: Path) -> None:
        """Replace the record in a study's folder. Raises ArtefactError."""
        with writes_to(study):
            write_checked(study / STUDY, asdict(self))


@dataclass(frozen=True)
class CellRecord:
    """`cell.json`: one cell and its state.

    Attributes:
        at: keys of the grid and the cell's values.
        settings: all settings of its run.
        evaluations: the data that it is evaluated on.
        seconds: duration of the last start.
        measures: numbers in SI units (bytes, images a second; accuracies 0 to 1), once it is done.
        message: the last lines of its log, if it failed; under another key in the file.
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
    message: Annotated[str, Field(validation_alias=_MESSAGE)] = ""

    @classmethod
    def read(cls, cell: Path) -> "CellRecord | None":
        """The record in a cell's folder; None if the cell has not started. Raises ArtefactError."""
        path = cell / CELL
        return read_checked(path, cls, "a cell's record", "moce study") if path.exists() else None

    def write(self, cell: Path) -> None:
        """Replace the record in a cell's folder. Raises ArtefactError."""
        content = asdict(self)
        content[_MESSAGE] = content.pop("message")
        with writes_to(cell):
            write_checked(cell / CELL, content)

    @property
    def made_from(self) -> dict[str, Any]:
        """What determines the cell's measures: settings and processes of its run, and the data of its evaluations."""
        names = ("settings", "processes", "nodes", "evaluations")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Point:
    """Cells that differ only in the seed, all done."""

    cells: list[CellRecord]

    def at(self, key: str) -> Any:
        """The value of a key of the grid; None if the point has none."""
        return self.cells[0].at.get(key)

    @property
    def world_size(self) -> int:
        """Processes of a cell, over all its nodes."""
        return self.cells[0].processes * self.cells[0].nodes

    @property
    def batch_size(self) -> int:
        """Images per step over all processes."""
        return int(self.cells[0].settings["optim"]["batch_size"])

    def values(self, measure: str) -> list[float]:
        """The values of a measure, one for each seed that has it."""
        return [cell.measures[measure] for cell in self.cells if measure in cell.measures]

    def mean_and_deviation(self, measure: str) -> tuple[float, float] | None:
        """Mean and sample standard deviation over seeds (0 for a single one); None if it was not measured."""
        values = self.values(measure)
        if not values:
            return None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class StudyFolder:
    """A study on disk. The records of its cells are read on first use."""

    kind: ClassVar[str] = "study"
    marks: ClassVar[tuple[str, ...]] = (STUDY,)
    path: Path
    record: StudyRecord

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is the folder of a study."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path, /) -> "StudyFolder":
        """Read the record of a study. Raises ArtefactError if it is damaged."""
        return cls(path, StudyRecord.read(path))

    @cached_property
    def cells(self) -> list[CellRecord]:
        """The started cells, in order. Raises ArtefactError for damaged records."""
        records = (CellRecord.read(self.path / CELLS / name) for name in self.record.cells)
        return [record for record in records if record is not None]

    @property
    def waiting(self) -> list[str]:
        """The names of the cells that have not started."""
        return [name for name in self.record.cells if not (self.path / CELLS / name / CELL).exists()]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.absolute().name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the study."""
        return self.record.settings

    @property
    def keys(self) -> list[str]:
        """All keys of the grid, in order."""
        return list(dict.fromkeys(key for cell in self.cells for key in cell.at))

    @property
    def measures(self) -> list[str]:
        """The names of all measures, in order."""
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
        """The key on the horizontal axis: the one that the study names, or the one with the most values."""
        if named := self.settings.get("x"):
            return str(named)
        numbers = {key: len({str(cell.at.get(key)) for cell in self.cells}) for key in self.keys if key != SEED}
        return max(numbers, key=lambda key: numbers[key], default=None)

    @property
    def made_from(self) -> dict[str, Any]:
        """The settings of the study, and for each started cell what determines its measures."""
        return {"settings": self.settings, "cells": {cell.name: cell.made_from for cell in self.cells}}

    def describe(self) -> Rows:
        """The grid, the states of the cells, the measures, and why cells failed."""
        states = Counter(cell.state for cell in self.cells)
        counts = [*(f"{count} {state}" for state, count in states.items()), f"{len(self.waiting)} waiting"]
        return {
            "grid": ", ".join(self.keys),
            "cells": ", ".join(counts),
            "measured": some_of(self.measures),
            **{f"failed: {cell.name}": cell.message for cell in self.cells if cell.state == "failed"},
        }

    def verify(self) -> Findings:
        """Faults of the records of the study, its cells' runs and their results; reads all files."""
        found = document_findings(self.path / STUDY, STUDY)
        for name in self.record.cells:
            cell = f"{CELLS}/{name}"
            for verified in (_verified_record, _verified_run, _verified_results):
                try:
                    found += verified(self.path / cell).below(cell)
                except MoceError as error:
                    found += Findings([str(error)])
        return found


def _verified_record(cell: Path) -> Findings:
    record = CellRecord.read(cell)
    if record is None:
        return Findings([f"{CELL}: is missing, but the cell's run exists"] if (cell / RUN).exists() else [])
    run_lost = record.state == "done" and not (cell / RUN / CONFIG).exists()
    return document_findings(cell / CELL, CELL) + Findings([f"{RUN}/{CONFIG}: is missing"] if run_lost else [])


def _verified_run(cell: Path) -> Findings:
    run = cell / RUN
    return RunFolder.open(run).verify().below(RUN) if RunFolder.recognises(run) else Findings()


def _verified_results(cell: Path) -> Findings:
    if (cell / RESULTS).exists():
        return ResultsFile.open(cell).verify()
    record = CellRecord.read(cell)
    measured = record is not None and record.state == "done" and record.evaluations
    return Findings([f"{RESULTS}: is missing"] if measured else [])


def series(points: Sequence[Point], x: Callable[[Point], Any], keys: Iterable[str]) -> dict[str, list[Point]]:
    """Points grouped by `keys`; each series is named `key=value, ...` (empty if there is only one).

    Keys that are a function of `x`, the value on the horizontal axis, are ignored: such as experts.ep_size, if it grows
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
