"""Results of evaluations as plain data, for a `results.json` (`results_file.py`), and as tables for the terminal."""

import hashlib
import json
from typing import Any, Protocol

from rich.table import Table

from moce_ds.results_file import told_apart
from moce_ds.transfer.metrics import MultiLabelScore, Score


class Identified(Protocol):
    """An encoder or a checkpoint: a SHA-256 stands for its content."""

    @property
    def identity(self) -> str: ...


def known_by(model: Identified, *decisive: Any) -> dict[str, str]:
    """What tells a record from another of the same names: checksums of the model, and of all that decides its numbers
    (the model, and `decisive`: plain data)."""
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
    """Task by model: selected route, k-NN and linear-probe accuracy (top-1)."""
    table = Table(title="Accuracy on each task's test images (top-1)", title_justify="left")
    for column in ("task", "model", "route", "share", "k-NN", "linear probe"):
        table.add_column(column, justify="left" if column in ("task", "model", "route") else "right")
    records = told_apart(records)
    found = {(r["task"], r.get("model"), r["verb"]): r for r in records}
    for task in dict.fromkeys(r["task"] for r in records):
        vote = found.get((task, None, "select"))
        for model in dict.fromkeys(r["model"] for r in records if r["task"] == task and r["verb"] != "select"):
            routed = vote if vote and model != "dense" else None
            table.add_row(
                task,
                model,
                "-".join(map(str, routed["route"])) if routed else "",
                f"{routed['share']:.1%}" if routed else "",
                *(
                    f"{found[task, model, v]['top1']:.1%}" if (task, model, v) in found else ""
                    for v in ("knn", "probe")
                ),
            )
    return table
