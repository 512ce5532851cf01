"""Read what training and transfer left on disk: runs, and a study of several runs with its results.

Axes: S logged steps.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.clustering.clusters import Clusters
from moce_ds.config.families import Family, family_of_tree, translate_tree
from moce_ds.config.settings import read_yaml
from moce_ds.config.values import recorded_path
from moce_ds.errors import ArtefactError
from moce_ds.evaluation.results_file import disambiguated, read_results
from moce_ds.report.routing import Routing
from moce_ds.storage.metrics_file import read_records

PRETRAIN = "moce pretrain"
CLUSTERS = "clusters"
"""Folder inside a run folder with the clusters that it was trained on."""


@dataclass(frozen=True)
class Run:
    """One run folder. `metrics` holds one record per logged step, in order of steps."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reconstruction: Path | None = None
    routing: Routing | None = None
    clusters: Clusters | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def arch(self) -> str:
        return str(self.config.get("model", {}).get("arch", "mae"))

    @property
    def family(self) -> Family:
        """The kind of model."""
        return family_of_tree(self.config)

    @property
    def shards(self) -> Path | None:
        """Path of the shard set that the run was trained on, as its settings name it."""
        named = self.config.get("data", {}).get("shards")
        return recorded_path(str(named)) if named else None

    def series(self, *keys: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps, float64 [S], and the values under nested `keys`, float64 [S] or [S, ...].

        Steps without such a value are left out, and so are those at which it is NaN or infinite.
        """
        found = [(record["step"], value) for record in self.metrics if (value := _dig(record, keys)) is not None]
        steps_S = np.array([step for step, _ in found], np.float64)
        values_S = np.array([value for _, value in found], np.float64)
        finite_S = np.isfinite(values_S).reshape(len(found), -1).all(axis=1) if found else np.ones(0, bool)
        return steps_S[finite_S], values_S[finite_S]


@dataclass(frozen=True)
class Study:
    """Runs that belong together, dense ones first, and the records of `results.json`, models of one name told apart."""

    path: Path
    runs: list[Run]
    results: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_study(folder: Path) -> Study:
    """Read a run folder, or a folder of run folders.

    Raises:
        ArtefactError, ConfigError: `folder` is neither, or a file in it is damaged.
    """
    if (folder / "config.yaml").is_file():
        paths = [folder]
    else:
        paths = [config.parent for config in folder.glob("[!.]*/config.yaml") if not is_tuning(config.parent)]
    if not paths:
        raise ArtefactError(
            f"{folder} is no run folder: expected config.yaml in it or in its sub-folders, as `{PRETRAIN}` writes it."
        )
    runs = sorted((read_run(path) for path in paths), key=lambda run: (run.family.has_experts, _natural(run.name)))
    return Study(folder, runs, disambiguated(read_results(folder / "results.json")))


def is_tuning(path: Path) -> bool:
    """Whether a run folder is of a tuning verb, and not of pre-training. Raises ConfigError."""
    config = read_yaml(path / "config.yaml")
    return isinstance(config.get("data"), dict) and "encoder" in config["data"]


def read_run(path: Path) -> Run:
    """Read one run folder; parts that are not there are empty or None.

    Raises:
        ArtefactError, ConfigError: for damaged ones.
    """
    config = translate_tree(read_yaml(path / "config.yaml"))
    if not all(isinstance(config.get(group), dict) for group in ("model", "data")):
        raise ArtefactError(f"{path / 'config.yaml'} holds no settings; expected the file that `{PRETRAIN}` wrote.")
    pictures = sorted((path / "reconstructions").glob("step-*.png"))
    routing, clusters = path / "routing.json", path / CLUSTERS
    return Run(
        path=path,
        config=config,
        metrics=read_metrics(path / "metrics.jsonl"),
        reconstruction=pictures[-1] if pictures else None,
        routing=Routing.read(routing) if routing.is_file() else None,
        clusters=Clusters.load(clusters) if clusters.is_dir() else None,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl` by step, one a step.

    An attempt (start of the run) takes back what earlier ones recorded from its own first record on, also where an
    earlier one wrote on after it had begun; without attempts, the later line counts.

    Raises:
        ArtefactError: a line is not what was written.
    """
    by_step: dict[int, dict[str, Any]] = {}
    newest = 0
    for record in read_records(path):
        attempt = record.get("attempt", newest)
        if attempt > newest:
            newest = attempt
            by_step = {step: kept for step, kept in by_step.items() if step < record["step"]}
        if attempt == newest:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _dig(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts run-2 before run-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
