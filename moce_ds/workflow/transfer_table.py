"""The tables of `moce transfer`: tasks by models, one for each method, mean and spread over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

_METHODS = {"knn": "k-NN", "probe": "linear probe", "finetune": "fine-tuning"}
_METRICS = {"top1": "top-1", "mean_per_class": "per class", "map11": "mAP"}
"""Short, so that eleven tasks and five models go into 100 columns."""
_NONE = "-"

Cells = dict[tuple[str, str], list[float]]
"""Percent for each seed, by task and model."""


def campaign_tables(records: Sequence[dict[str, Any]], models: Sequence[str]) -> list[Table]:
    """A table for each method: a row for each task, in the order of `records`, and their mean, a column for each model.

    Percent; ± is the sample standard deviation over seeds, where there are several. What was not measured is "-".
    """
    tasks = {record["task"]: _METRICS[record["metric"]] for record in records}
    tables = []
    for verb, method in _METHODS.items():
        cells: Cells = {}
        for record in records:
            if record["verb"] == verb:
                cells.setdefault((record["task"], record["model"]), []).append(100 * record[record["metric"]])
        if cells:
            tables.append(_table(method, tasks, models, cells))
    return tables


def _table(method: str, tasks: dict[str, str], models: Sequence[str], cells: Cells) -> Table:
    seeds = max(map(len, cells.values()))
    spread = f", mean ± deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"{method}: percent on test images{spread}", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    texts = {place: _figure(values) for place, values in cells.items()}
    for model in models:
        width = max((len(text) for (_, name), text in texts.items() if name == model), default=len(_NONE))
        # A long name is folded, a figure is not.
        table.add_column(model, justify="right", overflow="fold", min_width=width)
    for task, metric in tasks.items():
        table.add_row(task, metric, *(texts.get((task, model), _NONE) for model in models))
    table.add_section()
    table.add_row("mean", "", *(_mean([cells.get((task, model), []) for task in tasks]) for model in models))
    return table


def _figure(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _mean(by_task: Sequence[Sequence[float]]) -> str:
    """Over tasks; of some of them alone it would not compare."""
    return f"{statistics.fmean(map(statistics.fmean, by_task)):.1f}" if all(by_task) else _NONE
