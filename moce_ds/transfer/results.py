"""Results of evaluations: records in a `results.json`, and tables for the terminal."""

from pathlib import Path
from typing import Any

from rich.table import Table

from moce_ds.files import read_json, write_json
from moce_ds.transfer.metrics import MultiLabelScore, Score


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


def add_record(path: Path | None, record: dict[str, Any]) -> None:
    """Add a record to a results file, replacing one of the same verb, task, model and seed; None: nowhere."""
    if path is None:
        return
    records = read_json(path, "a list of results", "moce knn, probe or select") if path.exists() else []

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["verb"], one["task"], one.get("model"), one.get("seed")

    write_json(path, [one for one in records if key(one) != key(record)] + [record])


def accuracy_table(records: list[dict[str, Any]]) -> Table:
    """Task by model: selected route, k-NN and linear-probe accuracy (top-1)."""
    table = Table(title="Accuracy on each task's test images (top-1)", title_justify="left")
    for column in ("task", "model", "route", "share", "k-NN", "linear probe"):
        table.add_column(column, justify="left" if column in ("task", "model", "route") else "right")
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
