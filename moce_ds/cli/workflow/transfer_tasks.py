"""The tasks of the transfer protocol: their images, their metrics, and the settings of each method.

Fine-tuning runs `moce finetune` in a separate process, because it trains.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce_ds.cli.launch.local import log_tail, run_logged
from moce_ds.common.config.composition import Layer, file_layers
from moce_ds.common.config.settings import OpenShare, from_layers, option, settings
from moce_ds.common.config.values import arguments, expanded
from moce_ds.common.errors import STOPPED, ArtefactError, ConfigError
from moce_ds.common.storage.files import read_json
from moce_ds.data.shard_manifest import MANIFEST
from moce_ds.data.sources.public.datasets import DatasetSettings, write_dataset
from moce_ds.data.sources.public.readers import SPLITS
from moce_ds.data.task_images import Splits
from moce_ds.evaluation.settings import KnnSettings, Metric, ProbeSettings

_logger = logging.getLogger(__name__)

TASK_FILES = Path(__file__).with_name("configs") / "tasks"
"""The folder of the tasks known by name; it is installed with the package."""


@settings
class FinetuneWords:
    """Words of `moce finetune`, and choices among them."""

    words: list[str] = option([], "settings of moce finetune, as key=value")
    choices: list[list[str]] = option([], "lists of further settings; the best on the validation split is used")
    validation_share: OpenShare = option(
        0.2, "share of the training images that choose the weights, if there is no validation split"
    )


@settings
class TaskSettings:
    """A task of `moce transfer`."""

    data: Path = option(help="folder with train, test and perhaps val: shard sets, or folders of images by class")
    dataset: str | None = option(None, "public data set that moce dataset writes there if it is missing")
    source: Path | None = option(None, "folder of that data set, as it is distributed")
    metric: Metric = option("top1", "top1, mean_per_class or map11 (images with several labels)")
    knn: KnnSettings = dataclasses.field(default_factory=KnnSettings)
    probe: ProbeSettings = dataclasses.field(default_factory=ProbeSettings)
    finetune: FinetuneWords = dataclasses.field(default_factory=FinetuneWords)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task by name; `val` is None if it has no validation split."""

    name: str
    config: TaskSettings
    train: Path
    val: Path | None
    test: Path


def read_task(word: str, overrides: Path | None, data: Path | None) -> Task:
    """The task for a word of `--tasks`: the name of a known task (`TASK_FILES`), or a YAML file.

    Args:
        overrides: a YAML file whose settings win.
        data: a folder with a folder for each task, used instead of `data` in the settings.

    Raises:
        ConfigError: there is no such task, its settings have faults, or its images are missing.
    """
    path = _task_file(word)
    layers = file_layers(path, TaskSettings)
    if overrides is not None:
        layers += file_layers(overrides, TaskSettings)
    if data is not None:
        layers.append(Layer("--data", {"data": data / path.stem}))
    config = from_layers(TaskSettings, layers)
    _write_missing(path.stem, config)
    places = {split: config.data / split for split in SPLITS}
    for split in ("train", "test"):
        if not places[split].is_dir():
            what = "is not a folder" if places[split].exists() else "not found"
            raise ConfigError(f"Task {path.stem}: {places[split]} {what}: {_how_to_write(config)}")
    val = places["val"] if places["val"].is_dir() else None
    if val is None and config.finetune.choices:
        raise ConfigError(f"Task {path.stem}: finetune.choices need validation images in {places['val']}.")
    return Task(path.stem, config, places["train"], val, places["test"])


def _task_file(word: str) -> Path:
    try:
        named = expanded(word)
    except ValueError as error:
        raise ConfigError(f"--tasks: {word}: {error}.") from None
    path = known_tasks().get(word, named) if not named.is_file() else named
    if path.is_dir():
        raise ConfigError(f"--tasks: {path} is a folder; expected a YAML file.")
    if not path.exists():
        raise ConfigError(f"--tasks: {word} not found; known tasks: {', '.join(known_tasks())}. Or name a YAML file.")
    return path


def known_tasks() -> dict[str, Path]:
    """The files of the tasks known by name."""
    return {path.stem: path for path in sorted(TASK_FILES.glob("*.yaml"))}


def check_metric(task: Task, splits: Splits) -> None:
    """Raise ConfigError if the task's labels do not allow its metric."""
    several = splits.train.targets is not None
    if several != (task.config.metric == "map11"):
        kind, allowed = ("several labels", "map11") if several else ("one label", "top1 or mean_per_class")
        raise ConfigError(
            f"Task {task.name}: metric: got {task.config.metric}; its images have {kind} each: expected {allowed}."
        )


def _write_missing(name: str, config: TaskSettings) -> None:
    written = all((config.data / split / MANIFEST).exists() for split in SPLITS)
    if config.dataset is None or written:
        return
    if config.source is None or not config.source.is_dir():
        raise ConfigError(f"Task {name}: {config.data} is not complete: {_how_to_write(config)}")
    write_dataset(config.dataset, config.source, config.data, DatasetSettings())


def _how_to_write(config: TaskSettings) -> str:
    if config.dataset is None:
        return "expected a shard set (`moce shards`) or a folder of images by class; --data says where tasks are."
    unpacked = f" ({config.source} does not exist)" if config.source else ""
    return f"write it with `moce dataset {config.dataset} UNPACKED {config.data}`, or set source{unpacked}."


def read_tasks(words: Sequence[str], overrides: Path | None, data: Path | None) -> list[Task]:
    """All tasks, each once. Raises ConfigError if `read_task` does, or for a duplicate."""
    tasks = [read_task(word, overrides, data) for word in words]
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tasks: {', '.join(twice)} is named twice.")
    return tasks


def finetuned(encoder: Path, task: Task, seed: int, out: Path) -> dict[str, Any]:
    """Fine-tune an encoder on a task with the best of the choices; returns the record of the test split.

    Only the validation split decides between choices. Stopped fine-tuning resumes.

    Raises:
        ArtefactError: the process failed; the message contains the end of its log.
        KeyboardInterrupt: the process was stopped.
    """
    metric = task.config.metric
    words = [*task.config.finetune.words, f"data.metric={metric}", f"run.seed={seed}"]
    chosen: Sequence[str] = []
    if choices := task.config.finetune.choices:
        figures = [
            _finetune_once(encoder, task.train, None, task.val, [*words, *choice], out / f"choice-{number}")[metric]
            for number, choice in enumerate(choices)
        ]
        chosen = choices[figures.index(max(figures))]
    val = task.val or task.config.finetune.validation_share
    record = _finetune_once(encoder, task.train, val, task.test, [*words, *chosen], out / "final")
    return {**record, "settings": {**record["settings"], "chosen": list(chosen)}}


def _finetune_once(
    encoder: Path, train: Path, val: Path | float | None, test: Path | None, words: Sequence[str], out: Path
) -> dict[str, Any]:
    """Run one `moce finetune` unless it is done; returns its record."""
    result, log = out / "result.json", out / "log.txt"
    command: list[object] = ["finetune", encoder, "--train", train, "--test", test]
    command += ["--val", val] if val is not None else []
    command += ["--out", out / "run", "--results", result, *words]
    if not result.exists():
        _logger.info(f"fine-tuning: tail -F {log}")
        status = run_logged([sys.executable, "-m", "moce_ds", *arguments(command)], log)
        if status == STOPPED:
            raise KeyboardInterrupt
        if status or not result.exists():
            lines = log_tail(log).splitlines()
            message = "\n  ".join(line.removeprefix("Error: ") for line in lines)
            raise ArtefactError(f"moce finetune ended with status {status} (full log: {log}):\n  {message}")
    record: dict[str, Any] = read_json(result, "the result of fine-tuning", "moce finetune")[0]
    return record
