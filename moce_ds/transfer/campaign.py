"""`moce transfer`: every model on every task by every method and seed; what is done is not done again.

OUT/results.json holds a record of each measurement, written as soon as it is made; OUT/experts the exported experts;
OUT/finetune the runs of fine-tuning.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moce_ds.config import to_tree
from moce_ds.errors import ConfigError
from moce_ds.files import read_json
from moce_ds.models.encode import open_encoder
from moce_ds.models.vit import Encoder
from moce_ds.transfer.finetuning import finetuned
from moce_ds.transfer.frozen import measure_frozen
from moce_ds.transfer.metrics import SPOKEN
from moce_ds.transfer.results import accuracy_record, add_record
from moce_ds.transfer.subjects import Subject, encoder_for
from moce_ds.transfer.task_data import Splits, opened_task
from moce_ds.transfer.tasks import Task

METHODS = ("knn", "probe", "finetune")
RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number to be had: a model on a task by a method, with a seed (None: the method has nothing random)."""

    subject: Subject
    task: Task
    encoder: Path
    method: str
    seed: int | None

    @property
    def key(self) -> dict[str, Any]:
        """What its record is known by."""
        return {"verb": self.method, "task": self.task.name, "model": self.subject.name, "seed": self.seed}

    def settings(self) -> Any:
        """The method's settings for this task, with the seed."""
        config = getattr(self.task.config, self.method)
        return dataclasses.replace(config, seed=self.seed) if self.method == "probe" else config

    def made_from(self, encoder: Encoder, splits: Splits) -> str:
        """SHA-256 of everything that decides the number."""
        images = [part and part.fingerprint for part in (splits.train, splits.val, splits.test)]
        parts = [encoder.fingerprint, to_tree(self.settings()), self.task.config.metric, images, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run_campaign(
    subjects: Sequence[Subject], tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Measure what is missing; returns the records of this campaign, in the order of tasks and models.

    Raises:
        ConfigError: a method is not known.
        MoceError: as select, export and the methods; what was measured before is kept.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ConfigError(f"--methods: {', '.join(unknown)} is not known; expected some of {', '.join(METHODS)}.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    # First the experts of all tasks: what cannot be exported is refused before anything is measured.
    encoders: dict[tuple[str, str], Path] = {}
    for task in tasks:
        for subject in subjects:
            encoder, votes = encoder_for(subject, task, out / "experts", device)
            encoders[task.name, subject.name] = encoder
            if votes is not None:
                route = "-".join(map(str, votes["route"]))
                print(f"{task.name}: {subject.name} gives route {route}, {votes['share']:.1%} of the votes", flush=True)
                add_record(out / RESULTS, {**votes, "model": subject.name})
    waiting = [
        Measurement(subject, task, encoders[task.name, subject.name], method, seed)
        for task in tasks
        for subject in subjects
        for method in methods
        for seed in (seeds if method != "knn" else [None])
    ]
    return list(_measured(waiting, out, device))


def _measured(waiting: Sequence[Measurement], out: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(waiting, 1):
        task = one.task
        with opened_task(task.train, task.val, task.test) as splits:
            encoder = open_encoder(one.encoder, device)
            made_from = one.made_from(encoder, splits)
            record, was_done = _recorded(out, one, made_from), True
            if record is None:
                record, was_done = _measure(one, encoder, splits, out, made_from, device), False
                add_record(out / RESULTS, record)
        seed = "" if one.seed is None else f" seed {one.seed}"
        told = f"{SPOKEN[task.config.metric]} {record[task.config.metric]:.4f}{' (was done)' if was_done else ''}"
        print(f"[{number}/{len(waiting)}] {task.name} {one.subject.name} {one.method}{seed}: {told}", flush=True)
        yield record


def _measure(
    one: Measurement, encoder: Encoder, splits: Splits, out: Path, made_from: str, device: torch.device
) -> dict[str, Any]:
    metric = one.task.config.metric
    if one.method == "finetune":
        record = finetuned(one.encoder, one.task, one.seed or 0, out / "finetune" / made_from[:16])
    else:
        score = measure_frozen(encoder, splits, one.settings(), device, metric)
        record = accuracy_record(one.method, one.task.name, one.subject.name, score)
    if metric not in record:
        found = ", ".join(key for key in SPOKEN if key in record)
        raise ConfigError(f"Task {one.task.name}: metric: got {metric}; its labels allow {found}.")
    return {**record, **one.key, "metric": metric, "run": str(one.subject.run), "made_from": made_from}


def _recorded(out: Path, one: Measurement, made_from: str) -> dict[str, Any] | None:
    if not (out / RESULTS).exists():
        return None
    records: list[dict[str, Any]] = read_json(out / RESULTS, "a list of results", "moce transfer")
    expected = one.key | {"made_from": made_from}
    return next((r for r in records if all(r.get(key) == value for key, value in expected.items())), None)
