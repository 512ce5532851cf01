"""`moce transfer`: every model on every task by every method and seed; what is done is not done again.

OUT/results.json holds a record of each measurement, written as soon as it is made; OUT/experts the exported experts;
OUT/finetune the runs of fine-tuning.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from moce_ds.config.settings import to_tree
from moce_ds.console import say, warn
from moce_ds.data.task_images import Splits, opened_task
from moce_ds.distributed.runtime import lone_device
from moce_ds.errors import ConfigError
from moce_ds.evaluation.frozen_features import measure_frozen
from moce_ds.evaluation.metrics import DISPLAY_NAMES
from moce_ds.evaluation.results import accuracy_record, known_by
from moce_ds.evaluation.results_file import add_record, check_results, read_results
from moce_ds.models.vit import Encoder
from moce_ds.workflow.transfer_finetune import finetuned
from moce_ds.workflow.transfer_models import Subject, encoder_for
from moce_ds.workflow.transfer_tasks import Task, check_metric

METHODS = ("knn", "probe", "finetune")
RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class Pairing:
    """A model on a task: the images, and the encoder that serves them."""

    subject: Subject
    task: Task
    splits: Splits
    encoder: Path


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number to be had: a method with a seed (None: nothing is random in it)."""

    pairing: Pairing
    method: str
    seed: int | None

    @property
    def key(self) -> dict[str, Any]:
        """What its record is known by."""
        task, model = self.pairing.task.name, self.pairing.subject.name
        return {"verb": self.method, "task": task, "model": model, "seed": self.seed}

    @property
    def settings(self) -> Any:
        """The method's settings for this task, with the seed."""
        config = getattr(self.pairing.task.config, self.method)
        return dataclasses.replace(config, seed=self.seed) if self.method == "probe" else config

    def made_from(self, model: str) -> str:
        """SHA-256 of everything that decides the number; `model`: that of the encoder, by its `identity`."""
        splits, metric = self.pairing.splits, self.pairing.task.config.metric
        images = [part and part.fingerprint for part in (splits.train, splits.val, splits.test)]
        parts = [model, to_tree(self.settings), metric, images, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run_campaign(
    subjects: Sequence[Subject], tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Measure what is missing; returns the records of this campaign, in the order of tasks and models.

    Raises:
        ConfigError: a method is not known, or no model can be measured by any.
        MoceError: as select, export and the methods; what was measured before is kept.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ConfigError(f"--methods: {', '.join(unknown)} is not known; expected some of {', '.join(METHODS)}.")
    check_results(out / RESULTS)
    _tell_untunable(subjects, methods)
    device = lone_device()
    with ExitStack() as opened:
        splits = [opened.enter_context(opened_task(task.train, task.val, task.test)) for task in tasks]
        for task, images in zip(tasks, splits, strict=True):
            check_metric(task, images)
        # First the experts of all tasks: what cannot be exported is refused before anything is measured.
        waiting = [
            Measurement(pairing, method, seed)
            for task, images in zip(tasks, splits, strict=True)
            for subject, pairing in [(one, _paired(one, task, images, out, device)) for one in subjects]
            for method in methods
            if not (subject.by_token and method == "finetune")
            for seed in (seeds if method != "knn" else [None])
        ]
        return list(_records(waiting, out, device))


def _tell_untunable(subjects: Sequence[Subject], methods: Sequence[str]) -> None:
    """Say which models are not fine-tuned. Raises ConfigError where that leaves nothing to measure."""
    if "finetune" not in methods or not (by_token := [subject for subject in subjects if subject.by_token]):
        return
    runs = ", ".join(str(subject.run) for subject in by_token)
    told = f"--methods: {runs} routes by token, so there is no dense ViT to fine-tune"
    if len(by_token) == len(subjects) and set(methods) == {"finetune"}:
        raise ConfigError(f"{told}: name another method, or other runs.")
    warn(f"{told}: its places in that table stay empty.")


def _paired(subject: Subject, task: Task, splits: Splits, out: Path, device: torch.device) -> Pairing:
    encoder, votes = encoder_for(subject, task, splits.train, out / "experts", device)
    if votes is not None:
        route = "-".join(map(str, votes["route"]))
        say(f"{task.name}: {subject.name} gives route {route}, {votes['share']:.1%} of the votes")
        record = {**votes, "model": subject.name, **known_by(subject.checkpoint, splits.train.fingerprint)}
        if record not in read_results(out / RESULTS):
            add_record(out / RESULTS, record)
    return Pairing(subject, task, splits, encoder)


def _records(waiting: Sequence[Measurement], out: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    number = 0
    for pairing, group in groupby(waiting, key=lambda one: one.pairing):
        encoder, metric = pairing.subject.open(pairing.encoder, device), pairing.task.config.metric
        for one in group:
            number += 1
            made_from = one.made_from(encoder.identity)
            record = _known(one, encoder, out)
            was_done = " (was done)" if record else ""
            if record is None:
                record = _measure(one, encoder, out, made_from, device) | one.key
                record |= {"made_from": made_from, "model_sha256": encoder.identity}
                add_record(out / RESULTS, record)
            seed = "" if one.seed is None else f" seed {one.seed}"
            name = f"{pairing.task.name} {pairing.subject.name} {one.method}{seed}"
            say(f"[{number}/{len(waiting)}] {name}: {DISPLAY_NAMES[metric]} {record[metric]:.4f}{was_done}")
            yield record


def _known(one: Measurement, encoder: Encoder, out: Path) -> dict[str, Any] | None:
    """The record of a measurement that is done. An earlier version knew an encoder by its weights alone."""
    by = {one.made_from(encoder.identity), one.made_from(encoder.fingerprint)}
    for record in read_results(out / RESULTS):
        same_model = record.get("model_sha256") in (encoder.identity, None)
        if same_model and record.get("made_from") in by and all(record.get(k) == v for k, v in one.key.items()):
            return record
    return None


def _measure(one: Measurement, encoder: Encoder, out: Path, made_from: str, device: torch.device) -> dict[str, Any]:
    task, subject = one.pairing.task, one.pairing.subject
    metric = task.config.metric
    if one.method == "finetune":
        record = finetuned(one.pairing.encoder, task, one.seed or 0, out / "finetune" / made_from[:16])
    else:
        score = measure_frozen(encoder, one.pairing.splits, one.settings, device, metric)
        record = accuracy_record(one.method, task.name, subject.name, score)
    return {**record, "metric": metric, "run": str(subject.run)}
