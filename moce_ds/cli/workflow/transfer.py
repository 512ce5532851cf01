"""`moce transfer`: measures every model on every task by every method and seed. Each measurement is a stage.

OUT/results.json holds the record of each measurement as soon as it is done, OUT/experts the exported experts, and
OUT/finetune the runs of fine-tuning. Several commands with the same OUT share the measurements.
"""

import dataclasses
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moce_ds.cli.workflow.runner import Progress, run_stages
from moce_ds.cli.workflow.stage import Stage, StageRecord, Workflow
from moce_ds.cli.workflow.transfer_models import Expert, Subject
from moce_ds.cli.workflow.transfer_tasks import Task, check_metric, finetuned
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say, warn
from moce_ds.common.text import route_label
from moce_ds.data.task_images import Splits, opened_task
from moce_ds.distributed.runtime import Runtime, lone_device
from moce_ds.evaluation.frozen_features import measure_frozen
from moce_ds.evaluation.metrics import DISPLAY_NAMES, accuracy_record
from moce_ds.evaluation.results_file import RESULTS, add_record, check_results, known_by, read_results
from moce_ds.evaluation.settings import decisive
from moce_ds.models.vit import Encoder

_logger = logging.getLogger(__name__)

METHODS = {"knn": "k-NN", "probe": "linear probe", "finetune": "fine-tuning"}
"""The methods, and their names in tables."""
_METRICS = {"top1": "top-1", "mean_per_class": "per class", "map11": "mAP"}
"""Names of the metrics, short enough for a table of eleven tasks and five models in 100 columns."""
_NONE = "-"

Cells = dict[tuple[str, str], list[float]]
"""Percent for each seed, by task and model."""


@dataclasses.dataclass(frozen=True)
class Pairing:
    """A model and a task: the images, and the encoder of the model for the task."""

    subject: Subject
    task: Task
    splits: Splits
    out: Path

    @property
    def name(self) -> str:
        """The name in progress messages."""
        return f"{self.task.name} {self.subject.name}"

    @property
    def encoder(self) -> Path:
        """The path of the encoder; the run itself if it is dense or routes by token."""
        exported = self.out / "experts" / self.subject.slug / self.task.name
        return exported if self.subject.has_routes else self.subject.run

    def expert(self, device: torch.device) -> Expert:
        """The expert that is exported as the encoder."""
        return Expert(self.subject, self.task, self.splits.train, self.encoder, device)


class OpenEncoder:
    """Keeps the encoder of one pairing open until another one is requested."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of: Pairing | None = None

    def of(self, pairing: Pairing) -> Encoder:
        """The encoder. Raises ArtefactError."""
        if self._of is not pairing:
            self._encoder = pairing.subject.open(pairing.encoder, self.device)
            self._of = pairing
        return self._encoder


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measurement: a method and a seed (None for a deterministic method). Its record is in results.json."""

    pairing: Pairing
    method: str
    seed: int | None
    opened: OpenEncoder

    @property
    def path(self) -> Path:
        """As `RecordFile`."""
        return self.pairing.out / RESULTS

    @property
    def key(self) -> dict[str, Any]:
        """The key of its record."""
        task, model = self.pairing.task.name, self.pairing.subject.name
        return {"verb": self.method, "task": task, "model": model, "seed": self.seed}

    @property
    def settings(self) -> Any:
        """The method's settings for this task, with the seed."""
        config = getattr(self.pairing.task.config, self.method)
        return dataclasses.replace(config, seed=self.seed) if self.method == "probe" else config

    def stage(self) -> Stage:
        """The measurement as a stage."""
        name = f"{self.pairing.name} {self.method}{'' if self.seed is None else f' seed {self.seed}'}"
        lock = self.pairing.out / ".locks" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
        return Stage(name, self, lock, self.made_from, self.measure)

    def made_from(self) -> MadeFrom:
        """A digest of all that determines the result; the encoder enters by its `identity`."""
        identity = self.opened.of(self.pairing).identity
        return MadeFrom({"made_from": self._digest(identity), "model_sha256": identity})

    def _digest(self, model: str) -> str:
        """SHA-256 of all that determines the result; `model` is a checksum of the encoder."""
        splits, metric = self.pairing.splits, self.pairing.task.config.metric
        images = [part and part.fingerprint for part in (splits.train, splits.val, splits.test)]
        parts = [model, decisive(self.settings), metric, images, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def read(self) -> StageRecord | None:
        """As `RecordFile`. An earlier version identified an encoder by its weights alone."""
        encoder = self.opened.of(self.pairing)
        by = {self._digest(encoder.identity), self._digest(encoder.fingerprint)}
        for record in read_results(self.path):
            same_model = record.get("model_sha256") in (encoder.identity, None)
            if same_model and record.get("made_from") in by and all(record.get(k) == v for k, v in self.key.items()):
                return StageRecord(self.made_from().parts, "done", measures=record)
        return None

    def write(self, record: StageRecord) -> None:
        """As `RecordFile`; writes only finished measurements."""
        if record.state == "done":
            add_record(self.path, {**record.measures, **self.key, **record.made_from})

    def measure(self) -> dict[str, Any]:
        """Measure; returns the content of its record. Raises MoceError if the method does."""
        pairing, opened = self.pairing, self.opened
        task, subject, metric = pairing.task, pairing.subject, pairing.task.config.metric
        if self.method == "finetune":
            folder = pairing.out / "finetune" / self.made_from().parts["made_from"][:16]
            record = finetuned(pairing.encoder, task, self.seed or 0, folder)
        else:
            score = measure_frozen(
                opened.of(pairing), pairing.splits, self.settings, Runtime.alone(opened.device), metric
            )
            record = accuracy_record(self.method, task.name, subject.name, score)
        return {**record, "metric": metric, "run": str(subject.run)}


def run_campaign(
    subjects: Sequence[Subject], tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Make the missing measurements; returns the records of this campaign, in the order of tasks and models.

    Raises:
        ConfigError: a method is unknown, or no method applies to any model.
        MoceError: selection, export or a method failed; earlier measurements are kept.
        SystemExit: a signal stopped the campaign.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ConfigError(f"--methods: {', '.join(unknown)} is not known; expected some of {', '.join(METHODS)}.")
    check_results(out / RESULTS)
    _warn_untunable(subjects, methods)
    device = lone_device()
    with ExitStack() as stack:
        splits = [stack.enter_context(opened_task(task.train, task.val, task.test)) for task in tasks]
        for task, images in zip(tasks, splits, strict=True):
            check_metric(task, images)
        pairs = zip(tasks, splits, strict=True)
        pairings = [Pairing(subject, task, images, out) for task, images in pairs for subject in subjects]
        # First export the experts of all tasks, so that errors of export appear before any measurement.
        _export_all([pairing for pairing in pairings if pairing.subject.has_routes], out, device)
        return _measure_all(pairings, methods, seeds, out, device)


def _warn_untunable(subjects: Sequence[Subject], methods: Sequence[str]) -> None:
    """Warn of models that cannot be fine-tuned. Raises ConfigError if nothing is left to measure."""
    if "finetune" not in methods or not (by_token := [subject for subject in subjects if subject.by_token]):
        return
    runs = ", ".join(str(subject.run) for subject in by_token)
    fault = f"--methods: {runs} routes by token, so there is no dense ViT to fine-tune"
    if len(by_token) == len(subjects) and set(methods) == {"finetune"}:
        raise ConfigError(f"{fault}: name another method, or other runs.")
    warn(f"{fault}: its cells in that table stay empty.")


def _export_all(pairings: Sequence[Pairing], out: Path, device: torch.device) -> None:
    stages = [pairing.expert(device).stage(pairing.name) for pairing in pairings]
    workflow = Workflow("transfer", "expert", out, stages)
    of_stage = {pairing.name: pairing for pairing in pairings}

    def report(stage: Stage) -> None:
        """Print and store the votes of an expert."""
        pairing = of_stage[stage.name]
        votes = pairing.expert(device).votes()
        voted = f"route {route_label(votes['route'])}, {votes['share']:.1%} of the votes"
        say(f"{pairing.task.name}: {pairing.subject.name} gives {voted}")
        model = known_by(pairing.subject.checkpoint, pairing.splits.train.fingerprint)
        record = {**votes, "model": pairing.subject.name, **model}
        if record not in read_results(out / RESULTS):
            add_record(out / RESULTS, record)

    _run(workflow, _Reporting(workflow, lambda stage, was_done: report(stage)))


def _measure_all(
    pairings: Sequence[Pairing], methods: Sequence[str], seeds: Sequence[int], out: Path, device: torch.device
) -> list[dict[str, Any]]:
    opened = OpenEncoder(device)
    stages = [
        Measurement(pairing, method, seed, opened).stage()
        for pairing in pairings
        for method in methods
        if not (pairing.subject.by_token and method == "finetune")
        for seed in (seeds if method != "knn" else [None])
    ]
    workflow = Workflow("transfer", "measurement", out, stages)
    records: dict[str, dict[str, Any]] = {}

    def report(stage: Stage, was_done: bool) -> None:
        """Print a result, and collect its record while its encoder is open."""
        record = stage.records.read()
        assert record is not None, "it is done"
        records[stage.name] = record.measures
        metric, number = record.measures["metric"], [each.name for each in stages].index(stage.name) + 1
        figure = f"{DISPLAY_NAMES[metric]} {record.measures[metric]:.4f}{' (was done)' if was_done else ''}"
        say(f"[{number}/{len(stages)}] {stage.name}: {figure}")

    _run(workflow, _Reporting(workflow, report))
    return [records[stage.name] for stage in stages]


class _Reporting(Progress):
    """Prints the measurements of a stage."""

    def __init__(self, workflow: Workflow, report: Callable[[Stage, bool], None]) -> None:
        super().__init__(workflow)
        self._report = report

    def started(self, stage: Stage) -> None:
        """Prints nothing: the stage prints its own messages."""

    def skipped(self, stage: Stage) -> None:
        self._report(stage, True)

    def done(self, stage: Stage, seconds: float) -> None:
        self._report(stage, False)


def _run(workflow: Workflow, progress: Progress) -> None:
    """Run stages until one fails. Raises the error of that stage, or SystemExit after a request to stop."""
    outcome = run_stages(workflow.stages, progress)
    for failure in outcome.failures:
        if failure.error:
            raise failure.error
    if outcome.stopped:
        _logger.info(f"Stopped as asked at {outcome.stopped[0].name}. Rerun the same command to resume.")
        raise SystemExit(outcome.status)


def campaign_tables(records: Sequence[dict[str, Any]], models: Sequence[str]) -> list[Table]:
    """A table for each method: a row for each task, in the order of `records`, a row of means, a column for each model.

    In percent; ± is the sample standard deviation over seeds, if there are several. A missing value is "-".
    """
    tasks = {record["task"]: _METRICS[record["metric"]] for record in records}
    tables = []
    for verb, method in METHODS.items():
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
        # Wrap long names, but never a number.
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
    """The mean over tasks; "-" unless all tasks have values, as it would not be comparable."""
    return f"{statistics.fmean(map(statistics.fmean, by_task)):.1f}" if all(by_task) else _NONE
