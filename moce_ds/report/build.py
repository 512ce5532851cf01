"""`moce report`: one self-contained HTML page about runs, folders of runs, or a study (a grid of runs)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_ds.checkpoint.run_folder import CONFIG, RunFolder
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.files import check_output
from moce_ds.evaluation.results_file import RESULTS, ResultsFile
from moce_ds.inspection.study_folder import StudyFolder
from moce_ds.report.comparison import compared_runs
from moce_ds.report.expert_chapter import expert_chapter
from moce_ds.report.figures import check_figures, write_figures
from moce_ds.report.page import PAGE_MARK, Chapter, write_page
from moce_ds.report.results_chapter import results_chapter
from moce_ds.report.run_chapter import run_chapter
from moce_ds.report.study_chapter import STUDY_TABLE, TABLE_MARK, study_chapters, study_summary, write_csv

_TITLED = 3  # names of folders in the title


@dataclass(frozen=True)
class RunGroup:
    """The runs of a report by their names on the page, and the records of `results.json`, with ambiguous names marked.

    The runs of one folder are sorted, dense ones first; several folders keep the order in which they were given.
    """

    title: str
    named: dict[str, RunFolder]
    results: list[dict[str, Any]]

    @property
    def runs(self) -> list[RunFolder]:
        """The runs."""
        return list(self.named.values())


def build_report(*folders: Path, out: Path | None = None, figures: Path | None = None) -> Path:
    """Write the page about runs, or about a study; return its path.

    Args:
        folders: run folders (with `config.yaml`) and folders of run folders; or the folder of one study (with
            `study.json`): then `study.csv` is written beside the page.
        out: the HTML file; by default `report.html` in the folder, if there is only one.
        figures: a folder for each plot as SVG and its numbers as CSV.

    Raises:
        ConfigError: several folders without `out`, or one of several is a study.
        ArtefactError: a folder is none of these, a file in it is damaged, or an output cannot be written.
    """
    if out is None:
        if len(folders) > 1:
            raise ConfigError("A page about several folders belongs to none of them: name its file with --out.")
        out = folders[0] / "report.html"
    check_output(out, "a report", PAGE_MARK)
    if figures:
        check_figures(figures)
    title, summary, chapters = _study_page(folders, out) if _is_study(folders) else _runs_page(folders)
    chapters = [chapter for chapter in chapters if chapter.sections]
    write_page(out, title, summary, chapters)
    if figures:
        write_figures(figures, chapters)
    return out


Page = tuple[str, str, list[Chapter]]
"""Title, summary and chapters."""


def _is_study(folders: Sequence[Path]) -> bool:
    """Whether the page is about a study. Raises ConfigError if it would be about more than that."""
    studies = [folder for folder in folders if StudyFolder.recognises(folder)]
    if studies and len(folders) > 1:
        raise ConfigError(f"{studies[0]} is a study, whose page compares its cells: name it alone, or name its runs.")
    return bool(studies)


def _study_page(folders: Sequence[Path], out: Path) -> Page:
    table = out.with_name(STUDY_TABLE)
    check_output(table, "the table of a study", TABLE_MARK)
    study = StudyFolder.open(folders[0])
    chapters, summary = study_chapters(study), study_summary(study)
    write_csv(study, table)
    return study.name, summary, chapters


def _runs_page(folders: Sequence[Path]) -> Page:
    group = read_runs(*folders)
    sharing = sum(run.clusters is not None for run in group.runs)
    about_runs = [run_chapter(run, name, max(1, sharing)) for name, run in group.named.items()]
    about_all = [*results_chapter(group.results), *expert_chapter(folders), *compared_runs(group.named)]
    return group.title, _summary(group), [*about_all, *about_runs]


def read_runs(*folders: Path) -> RunGroup:
    """Read run folders and folders of run folders; a run that is named twice is read once.

    Raises:
        ArtefactError, ConfigError: a folder is neither, or a file in it is damaged.
    """
    found = {run.path.resolve(): run for folder in folders for run in _runs_of(folder)}
    named = dict(zip(distinct_names(list(found)), found.values(), strict=True))
    title = ", ".join(name for name in distinct_names([folder.resolve() for folder in folders])[:_TITLED])
    title += f" and {len(folders) - _TITLED} more" if len(folders) > _TITLED else ""
    return RunGroup(title, named, _results(folders))


def _runs_of(folder: Path) -> list[RunFolder]:
    if RunFolder.recognises(folder):
        return [RunFolder.open(folder)]
    inside = (RunFolder.open(config.parent) for config in folder.glob(f"[!.]*/{CONFIG}"))
    runs = [run for run in inside if not run.is_tuning]
    if not runs:
        raise ArtefactError(
            f"{folder} is not a run folder: expected {CONFIG} of `moce pretrain` in it or in its sub-folders."
        )
    return sorted(runs, key=lambda run: (run.model_kind.has_experts, _natural(run.name)))


def _results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of all folders; those of several files name the folder with the model."""
    files = {folder.resolve(): ResultsFile.open(folder / RESULTS).records for folder in folders}
    files = {folder: records for folder, records in files.items() if records}
    if len(files) < 2:
        return [record for records in files.values() for record in records]
    return [
        {**record, "model": f"{name}: {record.get('model') or 'expert'}"}
        for name, records in zip(distinct_names(list(files)), files.values(), strict=True)
        for record in records
    ]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of distinct paths, with as many of the parts before them as distinguish all paths."""
    longest = max((len(path.parts) for path in paths), default=0)
    for parts in range(1, longest + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts run-2 before run-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _summary(group: RunGroup) -> str:
    return " · ".join(f"{name}: {_described(run)}" for name, run in group.named.items())


def _described(run: RunFolder) -> str:
    text = run.model_kind.title if run.model_kind.has_experts else "dense MAE"
    if run.steps_done:
        text += f", step {run.steps_done}"
    elif run.metrics.last:
        text += f", {run.metrics.last['step']:,} steps"
    if run.routing:
        blocks = " and ".join(str(layer) for layer in run.routing.layers)
        text += f", {run.routing.n_experts} experts in blocks {blocks}"
    if run.clusters:
        text += f", {run.clusters.num_clusters} clusters of {run.clusters.sizes_M.sum():,} images"
    return text
