"""The report's chapter about the training of all its runs: their curves, last records, and differing settings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.text import without_home
from moce_ds.report import plots
from moce_ds.report.page import Cell, Chapter, Exhibit, Section, Table
from moce_ds.report.plots import Line, Scale

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
_OWN = ("run.out", "run.init_from", "experts.clusters", "data.cache")
"""Settings that name files of one run or machine."""
_OF_EXPERTS = ("experts", "token_moe", "sdr")
_MOST_SETTINGS = 40

Runs = Mapping[str, RunFolder]
"""The runs by their names on the page."""


def compared_runs(runs: Runs) -> list[Chapter]:
    """The chapter about training; none if no run has records or can be compared."""
    exhibits = []
    for key, title, unit, scale, caption in _CURVES:
        lines = [Line(name, run.series(key), i) for i, (name, run) in enumerate(runs.items())]
        if drawn := [line for line in lines if len(line.values_S)]:
            exhibits.append(Exhibit(plots.curves(drawn, title, unit, scale), caption))
    curves = [Section("", exhibits=exhibits)] if exhibits else []
    sections = [*curves, *_side_by_side(runs)]
    return [Chapter("Training", "training", sections)] if sections else []


def _side_by_side(runs: Runs) -> Iterator[Section]:
    if len(runs) < 2:
        return
    measured = {
        "steps": [_steps(run) for run in runs.values()],
        "reconstruction error": [_last_tenth(run, "reconstruction", 4) for run in runs.values()],
        "images a second": [_last_tenth(run, "images_per_second", 0) for run in runs.values()],
    }
    differing = differing_settings([_effective(run) for run in runs.values()])
    rows = [
        [Cell(label), *(Cell(text) for text in texts)]
        for label, texts in [*measured.items(), *list(differing.items())[:_MOST_SETTINGS]]
    ]
    caption = (
        "Error (lower is better) and throughput are means over the last tenth of the records. Below them, the settings "
        "in which the runs differ, without the names of their own files."
    )
    if (more := len(differing) - _MOST_SETTINGS) > 0:
        caption += f" {more} more settings differ."
    yield Section("Runs side by side", tables=[Table(["measure or setting", *runs], rows, caption)])


def _steps(run: RunFolder) -> str:
    last = f"{run.metrics.last['step']:,}" if run.metrics.last else "–"
    return run.steps_done or last


def _last_tenth(run: RunFolder, key: str, decimals: int) -> str:
    values_P = run.series(key).mean_P
    return f"{np.mean(values_P[-max(1, len(values_P) // 10) :]):,.{decimals}f}" if len(values_P) else "–"


def _effective(run: RunFolder) -> dict[str, Any]:
    """The settings of a run, without those of experts if its model has none."""
    return {group: keys for group, keys in run.config.items() if run.model_kind.has_experts or group not in _OF_EXPERTS}


def differing_settings(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Settings that differ between runs, each with its value in every run; "–" where a run has none."""
    flat = [dict(_flattened(config)) for config in configs]
    keys = [key for key in dict.fromkeys(key for settings in flat for key in settings) if key not in _OWN]
    values = {key: [settings.get(key, "–") for settings in flat] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def _flattened(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", without_home(str(value))
