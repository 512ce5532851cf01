"""The table of `moce transfer`: models and methods by tasks, mean and spread over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moce_ds.transfer.metrics import SPOKEN

_METHODS = {"knn": "k-NN", "probe": "linear probe", "finetune": "fine-tuning"}


def campaign_table(records: Sequence[dict[str, Any]]) -> Table:
    """A row for each model and method, a column for each task, in the order of `records`, and the mean over tasks.

    Percent; ± is the sample standard deviation over seeds, where there are several.
    """
    by_cell: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        value = 100 * record[record["metric"]]
        by_cell.setdefault((record["verb"], record["model"], record["task"]), []).append(value)
    tasks = {record["task"]: SPOKEN[record["metric"]] for record in records}
    rows = dict.fromkeys((verb, model) for verb in _METHODS for v, model, _ in by_cell if v == verb)
    seeds = max(map(len, by_cell.values()), default=0)
    spread = f", mean ± deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"Percent on test images{spread}", title_justify="left")
    table.add_column("method")
    table.add_column("model")
    for task, metric in tasks.items():
        table.add_column(f"{task}\n{metric}", justify="right")
    table.add_column("mean", justify="right")
    for verb, model in rows:
        cells = [by_cell[verb, model, task] for task in tasks]
        mean = statistics.fmean(map(statistics.fmean, cells))
        table.add_row(_METHODS[verb], model, *map(_spoken, cells), f"{mean:.1f}")
    return table


def _spoken(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"
