"""Results of evaluations as plain data for a `results.json` (`results_file.py`), and as tables for the terminal."""

import hashlib
import json
from typing import Any, Protocol

from rich.table import Table

from moce_ds.evaluation.metrics import MultiLabelScore, Score
from moce_ds.evaluation.results_file import disambiguated

_COLUMNS = ("knn", "probe")


class Identified(Protocol):
    """An encoder or a checkpoint; a SHA-256 identifies its content."""

    @property
    def identity(self) -> str:
        """What identifies it: a checksum of its content."""


def known_by(model: Identified, *decisive: Any) -> dict[str, str]:
    """Checksums that distinguish a record from others of the same names: of the model, and of everything that
    determines its numbers (the model, and `decisive`: plain data)."""
    made_from = hashlib.sha256(json.dumps([model.identity, *decisive]).encode()).hexdigest()
    return {"model_sha256": model.identity, "made_from": made_from}


def accuracy_record(verb: str, task: str, model: str, score: Score | MultiLabelScore) -> dict[str, Any]:
    """A k-NN, probe or fine-tuning result as plain data."""
    return {
        "verb": verb,
        "task": task,
        "model": model,
        **score.figures,
        "n_train": score.n_train,
        "n_test": score.n_test,
        "settings": dict(score.settings),
    }


def accuracy_table(records: list[dict[str, Any]]) -> Table:
    """Table of task by model: selected route, k-NN and linear-probe accuracy (top-1)."""
    table = Table(title="Accuracy on each task's test images (top-1)", title_justify="left")
    for column in ("task", "model", "route", "share", "k-NN", "linear probe"):
        table.add_column(column, justify="left" if column in ("task", "model", "route") else "right")
    measured = [
        (record, named["model"])
        for record, named in zip(records, disambiguated(records), strict=True)
        if record["verb"] in _COLUMNS
    ]
    by_verb = {(record["task"], shown, record["verb"]): record for record, shown in measured}
    newest = {(record["task"], record["model"]): shown for record, shown in measured}
    rows = {(record["task"], shown): record["model"] for record, shown in measured}
    tasks = list(dict.fromkeys(task for task, _ in rows))
    for (task, shown), model in sorted(rows.items(), key=lambda row: tasks.index(row[0][0])):
        route = _selected(records, task, model, newest=newest[task, model] == shown)
        scores = [by_verb.get((task, shown, verb)) for verb in _COLUMNS]
        table.add_row(
            task,
            shown,
            "-".join(map(str, route["route"])) if route else "",
            f"{route['share']:.1%}" if route else "",
            *(f"{score['top1']:.1%}" if score else "" for score in scores),
        )
    return table


def _selected(records: list[dict[str, Any]], task: str, model: str, newest: bool) -> dict[str, Any] | None:
    """The selection that a model was exported for, by its recorded name; the last one belongs to the `newest`."""
    if model == "dense":
        return None
    votes = [r for r in records if r["verb"] == "select" and r["task"] == task and r.get("model") in (None, model)]
    return votes[-1] if votes and (newest or len(votes) == 1) else None
