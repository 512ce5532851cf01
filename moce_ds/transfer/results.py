"""Results of evaluations: records in a `results.json`, and tables for the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moce_ds.files import check_writable, read_json, valid_record, write_json, writes_to
from moce_ds.transfer.metrics import MultiLabelScore, Score

_WRITTEN_BY = "moce knn, probe or select"


@dataclass(frozen=True)
class _Record:
    """What every record has."""

    verb: str
    task: str


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; none where it is not there yet.

    Raises:
        ArtefactError: it is damaged, or holds something else.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = read_json(path, "a list of results", _WRITTEN_BY)
    valid_record(list[_Record], records, str(path), "a list of results", _WRITTEN_BY)
    return records


def check_results(path: Path | None) -> None:
    """Refuse, before anything is measured, a results file that no record can be added to. Raises ArtefactError."""
    if path is not None:
        check_writable(path)
        read_results(path)


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
    """Add a record to a results file, replacing one of the same verb, task, model and seed; None: nowhere.

    Raises:
        ArtefactError: the file holds something else, or cannot be written.
    """
    if path is None:
        return
    records = read_results(path)

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["verb"], one["task"], one.get("model"), one.get("seed")

    with writes_to(path):
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
