"""`moce report`: one self-contained HTML page about a run, a folder of runs, or a study (a grid of runs).

This module writes the chapters about all runs: results on tasks, and the training of the runs side by side. A section
without data is omitted.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_ds.checkpoint.run_folder import CONFIG, RunFolder
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import check_output
from moce_ds.evaluation.results_file import RESULTS, ResultsFile
from moce_ds.inspection.study_folder import StudyFolder
from moce_ds.report import plots
from moce_ds.report.page import PAGE_MARK, Cell, Chapter, Exhibit, Section, Table, write_page
from moce_ds.report.plots import Line, Scale
from moce_ds.report.run_chapter import route_name, run_chapter
from moce_ds.report.study_chapter import STUDY_TABLE, TABLE_MARK, study_chapters, study_summary, write_csv

# Columns of the result table: heading, verb and key of the record.
_MEASURES = (
    ("k-NN top-1", "knn", "top1"),
    ("k-NN per class", "knn", "mean_per_class"),
    ("probe top-1", "probe", "top1"),
    ("probe per class", "probe", "mean_per_class"),
    ("k-NN mAP", "knn", "map11"),
    ("probe mAP", "probe", "map11"),
)


# Curves of all runs: key of the metrics, title, unit, scale, caption.
_CURVES: tuple[tuple[str, str, str, Scale, str], ...] = (
    (
        "reconstruction",
        "Reconstruction error",
        "mean squared error",
        "log",
        "Squared error on masked patches, each patch normalised: lower is better, and about 1 is what guessing a "
        "patch's mean gives. Every run counts its steps from 0.",
    ),
    ("images_per_second", "Throughput", "images a second", "from zero", "Images a second over all processes."),
    (
        "data_wait",
        "Waiting for data",
        "share of time",
        "percent",
        "Share of the time spent waiting for images: near 0 means that loading keeps up.",
    ),
)


@dataclass(frozen=True)
class RunGroup:
    """The runs of a report, dense ones first, and the records of `results.json`, with ambiguous names marked."""

    path: Path
    runs: list[RunFolder]
    results: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name


def build_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page about a run folder, a folder of run folders, or a study; return its path.

    Args:
        folder: a run folder (with `config.yaml`), a folder of run folders, or the folder of a study (with
            `study.json`); about a study, `study.csv` is written beside the page.
        out: the HTML file; `folder/report.html` by default.

    Raises:
        ArtefactError: `folder` is none of these, a file in it is damaged, or the page cannot be written.
    """
    out = out or folder / "report.html"
    check_output(out, "a report", PAGE_MARK)
    if StudyFolder.recognises(folder):
        check_output(out.with_name(STUDY_TABLE), "the table of a study", TABLE_MARK)
        grid = StudyFolder.open(folder)
        write_page(out, grid.name, study_summary(grid), study_chapters(grid))
        write_csv(grid, out.with_name(STUDY_TABLE))
        return out
    group = read_runs(folder)
    chapters = [*_results(group.results), *_training(group.runs), *(run_chapter(run) for run in group.runs)]
    write_page(out, group.name, _summary(group), [chapter for chapter in chapters if chapter.sections])
    return out


def read_runs(folder: Path) -> RunGroup:
    """Read a run folder, or a folder of run folders.

    Raises:
        ArtefactError, ConfigError: `folder` is neither, or a file in it is damaged.
    """
    if RunFolder.recognises(folder):
        runs = [RunFolder.open(folder)]
    else:
        found = (RunFolder.open(config.parent) for config in folder.glob(f"[!.]*/{CONFIG}"))
        runs = [run for run in found if not run.is_tuning]
    if not runs:
        raise ArtefactError(
            f"{folder} is not a run folder: expected {CONFIG} of `moce pretrain` in it or in its sub-folders."
        )
    runs.sort(key=lambda run: (run.model_kind.has_experts, _natural(run.name)))
    return RunGroup(folder, runs, ResultsFile.open(folder / RESULTS).records)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts run-2 before run-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _summary(group: RunGroup) -> str:
    parts = []
    for run in group.runs:
        text = f"{run.name}: {run.model_kind.title if run.model_kind.has_experts else 'dense MAE'}"
        if run.steps_done:
            text += f", step {run.steps_done}"
        elif run.metrics.last:
            text += f", {run.metrics.last['step']:,} steps"
        if run.routing:
            blocks = " and ".join(str(layer) for layer in run.routing.layers)
            text += f", {run.routing.n_experts} experts in blocks {blocks}"
        if run.clusters:
            text += f", {run.clusters.num_clusters} clusters of {run.clusters.sizes_M.sum():,} images"
        parts.append(text)
    return " · ".join(parts)


def _results(records: Sequence[dict[str, Any]]) -> Iterator[Chapter]:
    if not records:
        return
    tables = [table for table in (_accuracies(records), _routes(records)) if table.rows]
    text = "Accuracy of frozen features on test images, on which no choice was made."
    yield Chapter("Results", "results", [Section("", text, tables=tables)])


def _accuracies(records: Sequence[dict[str, Any]]) -> Table:
    scores = {(r["task"], r["model"], r["verb"]): r for r in records if r["verb"] in ("knn", "probe")}
    measures = [m for m in _MEASURES if any(verb == m[1] and m[2] in r for (*_, verb), r in scores.items())]
    rows = []
    for task in dict.fromkeys(task for task, _, _ in scores):
        models = list(dict.fromkeys(model for named, model, _ in scores if named == task))
        cells = {model: [_score(scores, task, model, verb, key) for _, verb, key in measures] for model in models}
        best = [max(column, key=lambda value: value or 0) for column in zip(*cells.values(), strict=True)]
        for model in models:
            images = next(record for (t, m, _), record in scores.items() if (t, m) == (task, model))
            rows.append(
                [Cell(task), Cell(model)]
                + [
                    Cell(
                        "–" if value is None else f"{value:.1%}", len(models) > 1 and value is not None and value == top
                    )
                    for value, top in zip(cells[model], best, strict=True)
                ]
                + [Cell(f"{images['n_train']:,}"), Cell(f"{images['n_test']:,}")]
            )
    return Table(
        ["task", "model", *(heading for heading, _, _ in measures), "train", "test"],
        rows,
        "Test accuracy, best of each task in bold. “Per class” averages over classes instead of images.",
        names=2,
    )


def _score(scores: dict[tuple[str, str, str], Any], task: str, model: str, verb: str, key: str) -> float | None:
    record = scores.get((task, model, verb))
    return None if record is None or key not in record else float(record[key])


def _routes(records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    selected = [record for record in records if record["verb"] == "select"]
    several = {task for task, count in Counter(record["task"] for record in selected).items() if count > 1}
    for record in selected:
        others = [other for other in record.get("routes", []) if other["route"] != record["route"]]
        clusters = sorted(record.get("clusters", {}).items(), key=lambda item: -item[1])[:3]
        rows.append(
            [
                Cell(f"{record['task']} {record.get('model', '')}" if record["task"] in several else record["task"]),
                Cell(route_name(record["route"]), best=True),
                Cell(", ".join(f"{route_name(other['route'])} {other['share']:.0%}" for other in others[:2]) or "–"),
                Cell(", ".join(f"{cluster} ({share:.0%})" for cluster, share in clusters) or "–"),
                Cell(f"{record['share']:.0%}"),
                Cell(f"{record['n_images']:,}" if "n_images" in record else "–"),
            ]
        )
    return Table(
        ["task", "selected route", "next routes", "main clusters", "votes", "images"],
        rows,
        "A route names the expert of each expert layer, in order. Each image of the task votes for the route of the "
        "cluster that it belongs to; “votes” is the winner's share. A model called “expert” above is this route.",
        names=4,
    )


def _training(runs: Sequence[RunFolder]) -> Iterator[Chapter]:
    exhibits = []
    for key, title, unit, scale, caption in _CURVES:
        lines = [Line.of(run.name, run.series(key), plots.colour(i)) for i, run in enumerate(runs)]
        if drawn := [line for line in lines if len(line.values_S)]:
            exhibits.append(Exhibit(plots.curves(drawn, title, unit, scale), caption))
    if exhibits:
        yield Chapter("Training", "training", [Section("", exhibits=exhibits)])
