"""The report's chapters about a study: every measure against the horizontal axis, scaling, tables, and a CSV file.

Axes: P points of a series.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moce_ds.common.storage.files import atomic_file, writes_to
from moce_ds.common.text import counted
from moce_ds.inspection.study_folder import BATCH, LAUNCH_KEYS, SEED, Point, StudyFolder, series
from moce_ds.report.figure import colour
from moce_ds.report.page import Cell, Chapter, Exhibit, Section, Table
from moce_ds.report.plots import Series, error_bars

THROUGHPUT, MEMORY = "images_per_second", "peak_memory"


@dataclass(frozen=True)
class Measure:
    """How to show a measure: divided by `per` to convert it to `unit`, with a number of decimals."""

    title: str
    unit: str
    per: float
    decimals: int
    from_zero: bool
    caption: str

    def text(self, value: float, deviation: float | None = None) -> str:
        """A number, or mean ± standard deviation."""
        shown = f"{value / self.per:,.{self.decimals}f}"
        return shown if deviation is None else f"{shown} ± {deviation / self.per:,.{self.decimals}f}"


_LAST = "mean over the last tenth of the records"
_MEASURES = {
    "reconstruction": Measure(
        "Reconstruction error", "mean squared error", 1, 4, False, f"On hidden patches while training, {_LAST}."
    ),
    "loss": Measure("Loss", "", 1, 4, False, f"Reconstruction and the gates' losses, weighted, {_LAST}."),
    THROUGHPUT: Measure(
        "Throughput", "images a second", 1, 0, True, "Images a second of all processes, median after warm-up."
    ),
    MEMORY: Measure(
        "Peak memory", "GiB", 2**30, 2, True,
        "Maximum over processes: tensors on a GPU; on a CPU all memory of the process, including libraries.",
    ),
    "active_parameters": Measure(
        "Active parameters", "million", 1e6, 2, True, "On the path of one image: the deployed encoder and the decoder."
    ),
    "stored_parameters": Measure("Stored parameters", "million", 1e6, 2, True, "Of all experts together."),
    "exchange_bytes": Measure(
        "Exchange", "MiB a step", 2**20, 2, True,
        "Bytes that processes exchange in a step, in all expert layers, there and back, forward and backward.",
    ),
}  # fmt: skip


def measure_of(name: str) -> Measure:
    """How a measure is shown. The name may contain a task or held-out images, or be unknown (of another version)."""
    if name.startswith("probe "):
        task = name.removeprefix("probe ")
        return Measure(f"Probe, {task}", "top-1, %", 0.01, 1, False, "Test accuracy of a linear classifier.")
    if name.startswith("held out"):
        return Measure(
            f"Error {name}",
            "mean squared error",
            1,
            4,
            False,
            "On hidden patches of images that were not in training.",
        )
    return _MEASURES.get(name, Measure(name, "", 1, 4, False, ""))


def study_chapters(study: StudyFolder) -> list[Chapter]:
    """The chapters about a study in its present state."""
    points = study.points
    return [*_curves(study, points), *_scaling(study, points), *_table(study, points), *_unfinished(study)]


def study_summary(study: StudyFolder) -> str:
    """The progress of the study, and the keys that it varies."""
    done = sum(cell.state == "done" for cell in study.cells)
    varied = {key: list({str(cell.at.get(key)): None for cell in study.cells}) for key in study.keys}
    grid = " · ".join(f"{key}: {', '.join(values)}" for key, values in varied.items())
    return f"{done} of {counted(len(study.cells) + len(study.waiting), 'cell')} done. {grid}"


STUDY_TABLE = "study.csv"
TABLE_MARK = b"cell,state,"
"""The beginning of every such file."""


def write_csv(study: StudyFolder, path: Path) -> None:
    """One line per cell: name, state, keys, processes, machines, seconds, and all measures in SI units."""
    columns = ["cell", "state", *(key for key in study.keys if key not in LAUNCH_KEYS), *LAUNCH_KEYS, "seconds"]
    with (
        writes_to(path),
        atomic_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,  # names may not be UTF-8
    ):
        lines = csv.DictWriter(file, [*columns, *study.measures], restval="", extrasaction="ignore")
        lines.writeheader()
        for cell in study.cells:
            lines.writerow({**cell.at, **cell.measures, **vars(cell), "cell": cell.name})


def _curves(study: StudyFolder, points: Sequence[Point]) -> Iterator[Chapter]:
    """Every measure against `x`; the dependence of speed on the number of processes has its own chapter."""
    x = study.x
    if x is None or x in LAUNCH_KEYS or not points:
        return
    lines = series(points, lambda point: point.at(x), [key for key in study.keys if key not in (SEED, x)])
    exhibits = []
    for name in study.measures:
        measure = measure_of(name)
        drawn = [
            _line(title, group, name, i, lambda point: point.at(x)) for i, (title, group) in enumerate(lines.items())
        ]
        drawn = [line for line in drawn if line.at_P]
        exhibits.append(Exhibit(error_bars(drawn, measure.title, x, measure.unit, measure.from_zero), measure.caption))
    text = f"Points are means over seeds ({_seeds(points)}), error bars the sample standard deviation."
    yield Chapter(f"Against {x}", "curves", [Section("", text, exhibits=exhibits)])


def _line(title: str, points: Sequence[Point], name: str, index: int, x: Callable[[Point], Any]) -> Series:
    """One series of a measure in its unit; points without it are left out."""
    found = [(x(point), both) for point in points if (both := point.mean_and_deviation(name)) is not None]
    per = measure_of(name).per
    mean_P, deviation_P = (np.array([both[part] / per for _, both in found], np.float64) for part in (0, 1))
    return Series(title, [value for value, _ in found], mean_P, deviation_P, colour(index))


def _seeds(points: Sequence[Point]) -> str:
    counts = sorted({len(point.cells) for point in points})
    return f"{counts[0]} each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} each"


@dataclass(frozen=True)
class Scaling:
    """Points with increasing numbers of processes and the same work in total (strong) or per process (weak)."""

    name: str
    points: list[Point]

    @property
    def ideal_P(self) -> list[float]:
        """Throughput in proportion to the processes, extrapolated from the first point."""
        base = self.points[0]
        return [self.throughput_P[0][0] * point.world_size / base.world_size for point in self.points]

    @property
    def throughput_P(self) -> list[tuple[float, float]]:
        """Mean and standard deviation over seeds, images a second."""
        return [point.mean_and_deviation(THROUGHPUT) or (0.0, 0.0) for point in self.points]


def scalings(study: StudyFolder, points: Sequence[Point]) -> list[Scaling]:
    """Strong and weak scaling of points that differ only in the number of processes."""
    keys = [key for key in study.keys if key not in (SEED, BATCH, *LAUNCH_KEYS)]
    work: dict[str, Callable[[Point], Any]] = {
        "strong": lambda point: point.batch_size,
        "weak": lambda point: point.batch_size / point.world_size,
    }
    found = []
    for kind, share in work.items():
        for name, group in series(points, lambda point: point.world_size, keys).items():
            alike: dict[Any, list[Point]] = {}
            for point in sorted(group, key=lambda point: point.world_size):
                alike.setdefault(share(point), []).append(point)
            for images, row in alike.items():
                if len({point.world_size for point in row}) > 1:
                    what = f"{kind}, {images:g} images" + (" each" if kind == "weak" else "")
                    found.append(Scaling(f"{what}, {name}" if name else what, row))
    return found


def _scaling(study: StudyFolder, points: Sequence[Point]) -> Iterator[Chapter]:
    found = scalings(study, points)
    if not found:
        return
    rate, ideal, efficiency, memory, rows = [], [], [], [], []
    for index, one in enumerate(found):
        at_P, shade = [point.world_size for point in one.points], colour(index)
        mean_P, deviation_P = (np.array([both[part] for both in one.throughput_P]) for part in (0, 1))
        ideal_P = np.array(one.ideal_P)
        rate.append(Series(one.name, at_P, mean_P, deviation_P, shade))
        ideal.append(Series(f"ideal {one.name.split(',')[0]}", at_P, ideal_P, np.zeros_like(ideal_P), shade))
        efficiency.append(Series(one.name, at_P, 100 * mean_P / ideal_P, 100 * deviation_P / ideal_P, shade))
        memory.append(_line(one.name, one.points, MEMORY, index, lambda point: point.world_size))
        rows += [_scaling_row(one, place) for place in range(len(one.points))]
    exhibits = [
        Exhibit(
            error_bars(rate, "Throughput", "processes", "images a second", from_zero=True, ideal=ideal),
            "Images a second over all processes; dashed: in proportion to the number of processes.",
        ),
        Exhibit(
            error_bars(efficiency, "Efficiency", "processes", "% of ideal", from_zero=True),
            "Throughput over the ideal. Error bars are those of the throughput; the first point counts as exact.",
        ),
        Exhibit(error_bars(memory, "Peak memory", "processes", "GiB", from_zero=True), measure_of(MEMORY).caption),
    ]
    table = Table(
        ["scaling", "processes", "batch", "seeds", "images/s", "ideal", "efficiency"],
        rows,
        "Strong scaling keeps the images per step, weak scaling the images per step and process.",
    )
    text = "Processes that share the cores of one machine cannot scale beyond them."
    yield Chapter("Scaling", "scaling", [Section("", text, [table], exhibits)])


def _scaling_row(scaling: Scaling, place: int) -> list[Cell]:
    point, (mean, deviation), ideal = scaling.points[place], scaling.throughput_P[place], scaling.ideal_P[place]
    rate = measure_of(THROUGHPUT)
    shown = [scaling.name, str(point.world_size), f"{point.batch_size:,}", str(len(point.cells))]
    several = deviation if len(point.cells) > 1 else None
    return [Cell(text) for text in [*shown, rate.text(mean, several), rate.text(ideal), f"{mean / ideal:.0%}"]]


def _table(study: StudyFolder, points: Sequence[Point]) -> Iterator[Chapter]:
    if not points:
        return
    keys, names = [key for key in study.keys if key != SEED], study.measures
    units = [measure_of(name) for name in names]
    rows = []
    for point in points:
        cells = [Cell(str(point.at(key))) for key in keys] + [Cell(str(len(point.cells)))]
        for name, measure in zip(names, units, strict=True):
            both = point.mean_and_deviation(name)
            several = len(point.values(name)) > 1
            cells.append(Cell("–" if both is None else measure.text(both[0], both[1] if several else None)))
        rows.append(cells)
    header = [*keys, "seeds", *(f"{m.title}{', ' + m.unit if m.unit else ''}" for m in units)]
    caption = "Mean ± sample standard deviation over seeds. study.csv beside this page lists every cell."
    yield Chapter("All numbers", "numbers", [Section("", tables=[Table(header, rows, caption, names=len(keys))])])


def _unfinished(study: StudyFolder) -> Iterator[Chapter]:
    rows = [
        [Cell(cell.name), Cell(cell.state), Cell(cell.message.strip().rsplit("\n", 1)[-1])]
        for cell in study.cells
        if cell.state != "done"
    ]
    rows += [[Cell(name), Cell("waiting"), Cell("")] for name in study.waiting]
    if rows:
        table = Table(
            ["cell", "state", "last line of its log"], rows, "Rerun the command of the study to continue with these.", 3
        )
        yield Chapter("Not finished", "unfinished", [Section("", tables=[table])])
