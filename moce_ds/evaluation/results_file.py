"""`results.json`: a list of records of measurements, and their table for the terminal. Any number of commands
may add records at the same time.

A record is identified by what was measured (`verb`, `task`, `model`, `seed`) and by `made_from`, a SHA-256 of
everything that determines the number: the content of the model and of the images, and the settings. A new measurement
replaces the record with the same identity, and one of an earlier version, which has no `made_from`. A record of another
model with the same name is added beside it. `content_sha256` is the checksum of the record itself.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rich.table import Table

from moce_ds.common.host.program import warn
from moce_ds.common.storage.artefact import Rows, is_marked, some_of
from moce_ds.common.storage.checksums import (
    CHECKSUM,
    Findings,
    check_document,
    has_checksum,
    with_checksum,
    written_before,
)
from moce_ds.common.storage.files import check_writable, read_json, valid_record, write_json, writes_to
from moce_ds.common.storage.locks import locked
from moce_ds.common.text import counted, in_line, route_label

RESULTS = "results.json"
"""The default name of the file."""

WRITTEN_BY = "moce knn, moce probe or moce select"
_WHAT = "a list of results"
_OF_ENCODERS = ("knn", "probe", "finetune")
_COLUMNS = ("knn", "probe")  # of the table
_SHOWN = 8  # digits of a checksum in the name of an ambiguous model


@dataclass(frozen=True)
class _Record:
    """The entries of every record."""

    verb: str
    task: str


@dataclass(frozen=True)
class _Accuracy(_Record):
    model: str
    top1: float
    mean_per_class: float
    n_train: int
    n_test: int


@dataclass(frozen=True)
class _Precision(_Record):
    """Of a task with several labels per image."""

    model: str
    map11: float
    n_train: int
    n_test: int


@dataclass(frozen=True)
class _Selection(_Record):
    route: list[int]
    share: float
    n_images: int


@dataclass(frozen=True)
class _Reconstruction(_Record):
    """Mean squared errors; `dense` is None without a dense twin."""

    model: str
    selected: float
    own: float
    n_images: int
    dense: float | None = None


_KINDS: dict[str, type[_Record]] = {
    "knn": _Accuracy,
    "probe": _Accuracy,
    "select": _Selection,
    "evaluate": _Reconstruction,
}


@dataclass(frozen=True)
class ResultsFile:
    """A results file as an artefact; `add_record` writes it."""

    kind: ClassVar[str] = "results"
    marks: ClassVar[tuple[str, ...]] = (RESULTS,)
    path: Path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is a results file, or a folder that holds one."""
        return is_marked(path, cls.marks) or (path.name == RESULTS and path.exists())

    @classmethod
    def open(cls, path: Path, /) -> "ResultsFile":
        """The file, or the one in a folder; it is read on use."""
        return cls(path / RESULTS if path.is_dir() else path)

    @property
    def records(self) -> list[dict[str, Any]]:
        """As `read_results`, with a mark on the names of models that are ambiguous. Raises ArtefactError."""
        return disambiguated(read_results(self.path))

    @property
    def made_from(self) -> dict[str, Any]:
        """For each measurement a SHA-256 of all that determines it; None in a record of an earlier version."""
        return {_shown_name(record): record.get("made_from") for record in self.records}

    def describe(self) -> Rows:
        """The measurements. Raises ArtefactError."""
        return {_shown_name(record): _shown_value(record) for record in self.records}

    def verify(self) -> Findings:
        """The parts that cannot be verified. Raises ArtefactError if a record differs from what was written."""
        older = sum(not has_checksum(record) for record in _stored(self.path))
        name = f"{self.path.name}, {counted(older, 'record')} of it"
        return Findings(unverified=[written_before(name)] if older else [])


def _shown_name(record: dict[str, Any]) -> str:
    seed = "" if record.get("seed") is None else f"seed {record['seed']}"
    return in_line(" ".join(filter(None, (record["verb"], record["task"], record.get("model"), seed))))


def _shown_value(record: dict[str, Any]) -> str:
    if "top1" in record:
        return f"top-1 {record['top1']:.4f}"
    if record["verb"] == "select":
        return f"route {route_label(record['route'])}, {record['share']:.1%} of {record['n_images']} images"
    return some_of([f"{key} {value:.5g}" for key, value in record.items() if isinstance(value, float)])


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file, without their checksums; none if the file does not exist.

    Raises:
        ArtefactError: it is damaged, or holds something else.
    """
    return [{key: value for key, value in record.items() if key != CHECKSUM} for record in _stored(path)]


def check_results(path: Path | None) -> None:
    """Raise ArtefactError if a results file cannot take a record, before anything is measured."""
    if path is not None:
        check_writable(path)
        read_results(path)


def add_record(path: Path | None, record: dict[str, Any]) -> None:
    """Add a record to a results file, in place of an earlier one of the same measurement. Does nothing if `path` is
    None.

    Raises:
        ArtefactError: the file is not a results file, cannot be written, or is not released by another process.
    """
    if path is None:
        return
    busy = f"{path} has been held by another process for a minute: check that process, then rerun the same command."
    with locked(path.with_name(f".{path.name}.lock"), busy):
        stored = _stored(path)
        others = [one for one in stored if not _gives_way(one, record)]
        if any(_is_older(one, record) for one in stored):
            named = in_line(" ".join(filter(None, (record["verb"], record["task"], record.get("model")))))
            warn(f"{path}: the new record of {named} replaces one that does not identify its model and images.")
        with writes_to(path):
            write_json(path, [*others, with_checksum(record)])


class Identified(Protocol):
    """An encoder or a checkpoint; a SHA-256 identifies its content."""

    @property
    def identity(self) -> str:
        """A checksum of its content."""


def known_by(model: Identified, *decisive: Any) -> dict[str, str]:
    """Checksums that distinguish a record from others with the same names: of the model, and of all that determines
    its numbers (the model, and the plain data `decisive`)."""
    made_from = hashlib.sha256(json.dumps([model.identity, *decisive]).encode()).hexdigest()
    return {"model_sha256": model.identity, "made_from": made_from}


def disambiguated(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, in order. If one name stands for several models on one task, a mark is added: `expert (1a2b3c4d)`.

    One name may still stand for a different model on each task, such as the expert selected for it. The digits are
    those of the model's checksum, or of `made_from` if the model is the same.
    """
    models: dict[Any, set[Any]] = defaultdict(set)
    for record in records:
        models[_subject(record)].add(record.get("model_sha256"))
    for known in models.values():
        known.discard(None)  # an earlier version, which may have measured the same model
    named = [_named(record, "model_sha256", len(models[_subject(record)]) > 1) for record in records]
    alike: dict[Any, set[Any]] = defaultdict(set)
    for record in named:
        alike[_place(record)].add(record.get("made_from"))
    return [_named(record, "made_from", len(alike[_place(record)]) > 1) for record in named]


def _named(record: dict[str, Any], by: str, ambiguous: bool) -> dict[str, Any]:
    if not ambiguous:
        return record
    mark = str(record[by])[:_SHOWN] if record.get(by) else "earlier version"
    return {**record, "model": f"{record.get('model') or ''} ({mark})".strip()}


def _subject(record: dict[str, Any]) -> tuple[Any, ...]:
    """A key whose records must be of one model. Checksums of encoders and of checkpoints are not comparable."""
    measures = "encoder" if record["verb"] in _OF_ENCODERS else record["verb"]
    return measures, record["task"], record.get("model")


def _place(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["verb"], record["task"], record.get("model"), record.get("seed")


def _gives_way(stored: dict[str, Any], record: dict[str, Any]) -> bool:
    same = stored.get("made_from") == record.get("made_from")
    return (_place(stored) == _place(record) and same) or _is_older(stored, record)


def _is_older(stored: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether an earlier version wrote `stored`, so that `record` replaces it."""
    return _place(stored) == _place(record) and not stored.get("made_from") and bool(record.get("made_from"))


def _stored(path: Path) -> list[dict[str, Any]]:
    """The validated records of the file."""
    if not path.exists():
        return []
    records = read_json(path, _WHAT, WRITTEN_BY)
    valid_record(list[dict[str, Any]], records, str(path), _WHAT, WRITTEN_BY)
    for number, record in enumerate(records):
        _check(record, path, number)
    return list(records)


def _check(record: dict[str, Any], path: Path, number: int) -> None:
    kind = _KINDS.get(str(record.get("verb")), _Record)
    kind = _Precision if kind is _Accuracy and "map11" in record else kind
    valid_record(kind, record, f"{path}, record {number},", "it", WRITTEN_BY)
    check_document(path, record, f"record {number}", WRITTEN_BY)


def psnr_gain(error: float, dense: float) -> float:
    """PSNR of a reconstruction above that of the dense MAE, in dB, from their mean squared errors.

    The peak of a PSNR, 10 log10(peak^2 / error), is the same for both and cancels out. -inf to inf for errors of 0.
    """
    if error == dense:
        return 0.0
    return 10 * math.log10(dense / error) if error > 0 and dense > 0 else math.copysign(math.inf, dense - error)


def accuracy_table(records: list[dict[str, Any]]) -> Table:
    """Table of task by model: selected route, k-NN and linear-probe accuracy (top-1, or mAP of several labels)."""
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
            route_label(route["route"]) if route else "",
            f"{route['share']:.1%}" if route else "",
            *(_percent(score) if score else "" for score in scores),
        )
    return table


def _percent(record: dict[str, Any]) -> str:
    return f"{record['map11']:.1%} mAP" if "map11" in record else f"{record['top1']:.1%}"


def _selected(records: list[dict[str, Any]], task: str, model: str, newest: bool) -> dict[str, Any] | None:
    """The selection that a model was exported for, by its recorded name; the last one belongs to the `newest`."""
    if model == "dense":
        return None
    votes = [r for r in records if r["verb"] == "select" and r["task"] == task and r.get("model") in (None, model)]
    return votes[-1] if votes and (newest or len(votes) == 1) else None
