"""The runs of a report: one run folder, or a folder of several with their results."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_ds.checkpoint.run_folder import CONFIG, RunFolder
from moce_ds.errors import ArtefactError
from moce_ds.evaluation.results_file import RESULTS, ResultsFile


@dataclass(frozen=True)
class RunGroup:
    """Runs that belong together, dense ones first, and the records of `results.json`, ambiguous names marked."""

    path: Path
    runs: list[RunFolder]
    results: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name


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
            f"{folder} is no run folder: expected {CONFIG} in it or in its sub-folders, as `moce pretrain` writes it."
        )
    runs.sort(key=lambda run: (run.family.has_experts, _natural(run.name)))
    return RunGroup(folder, runs, ResultsFile.open(folder / RESULTS).records)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts run-2 before run-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
