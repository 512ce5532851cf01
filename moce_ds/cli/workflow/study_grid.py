"""The plan of a study: its settings, the cells of its grid, and the checks before any cell runs."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from moce_ds.common.config.command_line import read_settings
from moce_ds.common.config.settings import KeysOf, Positive, option, settings, word
from moce_ds.common.config.values import arguments
from moce_ds.common.errors import ConfigError, MoceError
from moce_ds.inspection.study_folder import CELLS, LAUNCH_KEYS, RUN, CellRecord
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import PretrainSettings

TaskName = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
"""The name of a task in the settings; it also names a folder and is a word of commands."""

Single = bool | int | float | str | None
Value = Single | list[Single]

POINT = KeysOf(PretrainSettings, own=LAUNCH_KEYS)
GRID = KeysOf(PretrainSettings, own=LAUNCH_KEYS, several=True)


@settings
class StudySettings:
    """The settings of `moce study`."""

    out: Path = option(help="the study's folder")
    # Python code may also use the former name.
    pretrain: Annotated[Path, Field(validation_alias=AliasChoices("pretrain", "base"))] = option(
        help="YAML file of `moce pretrain` that every cell starts from", formerly="base"
    )
    set: list[str] = option([], "key=value words of `moce pretrain` for every cell")
    grid: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], GRID] = option(
        {}, "for each key of `moce pretrain`, or processes, or nodes, the values that are crossed with all others"
    )
    cells: Annotated[list[Annotated[dict[str, Value], POINT]], Field(min_length=1)] = option(
        [{}], "keys that change together, one mapping a point; each point is crossed with the grid"
    )
    processes: Positive = option(1, "processes of a cell on each machine, unless the grid sets them")
    nodes: Positive = option(1, "machines of a cell, unless the grid sets them")
    tasks: dict[TaskName, Path] = option({}, "name and folder of tasks to probe; a folder holds train/ and test/")
    heldout: Path | None = option(None, "held-out images, for the reconstruction error of cells with experts")
    x: str | None = option(None, "key on the report's horizontal axis; null: the one with the most values")

    @property
    def evaluations(self) -> dict[str, str]:
        """The data that cells are evaluated on. A cell that was evaluated on other data is evaluated again."""
        heldout = {"held out": str(self.heldout)} if self.heldout else {}
        return {name: str(folder) for name, folder in self.tasks.items()} | heldout


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: short keys and values, unique and valid as a file name: `num=4,seed=1`.
        at: full keys and values.
        words: the arguments of `moce pretrain`.
        processes, nodes: the number of processes on each machine, and of machines.
        folder: holds the run and its measurements.
    """

    name: str
    at: dict[str, Value]
    words: list[str]
    processes: int
    nodes: int
    folder: Path

    @property
    def world_size(self) -> int:
        """The total number of processes."""
        return self.processes * self.nodes

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return self.folder / RUN

    @property
    def log(self) -> Path:
        """The file with the output of all its starts."""
        return self.folder / "log.txt"

    @property
    def lock(self) -> Path:
        """The lock of the process that works on it."""
        return self.folder / ".lock"

    def config(self) -> PretrainSettings:
        """The settings of its run. Raises ConfigError."""
        return read_settings(PretrainSettings, self.words, origin="the study")

    def record(self) -> CellRecord | None:
        """The record of the cell; None before its first start. Raises ArtefactError."""
        return CellRecord.read(self.folder)


def cells_of(study: StudySettings) -> list[Cell]:
    """The cells in the order in which they are run: the last key of the grid changes fastest.

    Raises:
        ConfigError: two cells have one name, a key belongs to the study, or processes or nodes is not positive.
    """
    crossed = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    points = [point | other for point in study.cells for other in crossed]
    short = _short_keys(dict.fromkeys(key for point in points for key in point))
    cells = [_cell(study, point, short) for point in points]
    twice = [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]
    if twice:
        raise ConfigError(f"The study has several cells called {', '.join(twice)}: name each point of the grid once.")
    return cells


def _cell(study: StudySettings, at: dict[str, Value], short: dict[str, str]) -> Cell:
    name = ",".join(f"{short[key]}={_file_safe(value)}" for key, value in at.items()) or "only"
    folder = study.out / CELLS / name
    launch = {"processes": study.processes, "nodes": study.nodes} | {k: v for k, v in at.items() if k in LAUNCH_KEYS}
    for key, value in launch.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{key}: got {value!r} in cell {name}; expected a number from 1 on.")
    if "run.out" in at:
        raise ConfigError(
            f"run.out: cell {name} cannot choose it; every run of a study lies in a folder of {study.out}."
        )
    own = [word(key, value) for key, value in at.items() if key not in LAUNCH_KEYS]
    words = [*arguments([study.pretrain]), *study.set, *own, word("run.out", folder / RUN)]
    return Cell(name, at, words, folder=folder, **launch)  # type: ignore[arg-type]


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The last part of every key, or the whole key if two keys end alike."""
    keys = list(keys)
    counts = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return {key: last if counts[last := key.rsplit(".", 1)[-1]] == 1 else key for key in keys}


def _file_safe(value: Value) -> str:
    parts = value if isinstance(value, list) else [value]
    texts = (json.dumps(part) if isinstance(part, bool | None) else str(part) for part in parts)
    return "-".join(re.sub(r"[^\w.+-]+", "-", text).strip("-") for text in texts)


def check_settings(cells: Sequence[Cell]) -> None:
    """Check the settings of all cells, and their batch arithmetic. Raises ConfigError, which lists every fault."""

    def check(cell: Cell) -> None:
        config = cell.config()
        batch_arithmetic(config.optim, cell.world_size, config.ep_size)

    _collect(cells, check)


def check_places(study: StudySettings, cells: Sequence[Cell]) -> None:
    """Check that all inputs of the cells exist, and that none of their folders holds another run.

    Raises:
        ConfigError: lists every fault, and the settings in which an existing run differs.
    """
    from moce_ds.training.run_checks import RequestedRun  # imports torch

    inputs = {f"tasks.{name}": [folder / "train", folder / "test"] for name, folder in study.tasks.items()}
    inputs |= {"heldout": [study.heldout]} if study.heldout else {}
    check_there(inputs)

    def check(cell: Cell) -> None:
        config, record = cell.config(), cell.record()
        read = {"data.shards": config.data.shards, "run.init_from": config.run.init_from}
        read |= {"experts.clusters": config.experts.clusters} if config.model_kind.routes_by_cluster else {}
        check_there({key: [path] for key, path in read.items() if path})
        RequestedRun(config).check_folder()
        if record and cell.run.exists() and (record.processes, record.nodes) != (cell.processes, cell.nodes):
            raise ConfigError(
                f"{cell.folder} was measured with {record.processes} processes on {record.nodes} machines, not "
                f"{cell.processes} on {cell.nodes}: its speed would be a mixture. Use another `out`."
            )

    _collect(cells, check)


def check_there(places: dict[str, list[Path]]) -> None:
    """Raise ConfigError, which lists all missing paths, if a path in the settings does not exist."""
    missing = [f"{key}: {path} not found" for key, paths in places.items() for path in paths if not path.exists()]
    if missing:
        raise ConfigError("\n".join(missing))


def _collect(cells: Sequence[Cell], check: Any) -> None:
    """Run `check` on all cells and raise one error that lists each fault once, with its cells."""
    faults: dict[str, list[str]] = {}
    for cell in cells:
        try:
            check(cell)
        except MoceError as error:
            faults.setdefault(str(error), []).append(cell.name)
    if faults:
        texts = []
        for fault, names in faults.items():
            whose = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more cells"
            texts.append(f"{whose}:\n  " + fault.replace("\n", "\n  "))
        raise ConfigError("Nothing was run. " + "\n".join(texts))
