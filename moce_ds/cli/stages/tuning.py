"""The verbs that train on a task: finetune, detect, segment."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from moce_ds.cli.next_step import conclude
from moce_ds.cli.options import PATH, Verb, no_cache_option, words
from moce_ds.common.config.command_line import settings_layers
from moce_ds.common.config.settings import T, checked_settings
from moce_ds.common.config.values import is_number
from moce_ds.common.config.yaml_text import Plain
from moce_ds.common.errors import STOPPED
from moce_ds.common.host.program import say
from moce_ds.common.text import in_line


@click.command("finetune", cls=Verb, settings="moce_ds.tuning.settings:FinetuneSettings")
@click.argument("encoder", type=PATH)
@click.option("--train", type=PATH, required=True, help="Labelled training images: shards, or what `shards` reads.")
@click.option("--test", type=PATH, required=True, help="Labelled test images, used once at the end.")
@click.option("--val", help="Labelled validation images, or a share of --train such as 0.1.")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option("--task", default=None, help="Name of the task in results (default: the folder of --test).")
@click.option("--model", default=None, help="Name of the encoder in results (default: its folder).")
@click.option("--results", type=PATH, help="A results.json to add the record to.")
@no_cache_option()
@words()
def finetune(
    encoder: Path,
    train: Path,
    test: Path,
    val: str | None,
    out: Path,
    task: str | None,
    model: str | None,
    results: Path | None,
    words: Sequence[str],
) -> None:
    """Train ENCODER and a linear head on a task's labels.

    OUT/tuned is the tuned encoder with its head. Runs in one process, or with `moce launch local --nproc N finetune
    ...`. Rerun the same command to resume. With --val the run keeps the best weights by validation, otherwise the last
    ones.
    """
    from moce_ds.tuning.settings import FinetuneSettings

    named: dict[str, Path | str] = {"run.out": out, "data.encoder": encoder, "data.train": train, "data.test": test}
    if val is not None:  # a folder may have the name 1
        named |= {"data.val_share" if is_number(val) and not Path(val).exists() else "data.val": Plain(val)}
    config = checked_settings(FinetuneSettings, settings_layers(FinetuneSettings, words, named))
    from moce_ds.checkpoint.run_folder import TUNED
    from moce_ds.data.task_images import task_of
    from moce_ds.distributed.runtime import started
    from moce_ds.evaluation.results_file import add_record, check_results
    from moce_ds.tuning.classification import finetune as run

    check_results(results)
    with started(config.run.peer_timeout) as runtime:
        record = run(config, runtime)
    if record is None:
        sys.exit(STOPPED)
    if runtime.is_main:
        record |= {"task": task or task_of(test), "model": model or encoder.name}
        say(in_line(f"finetune {record['task']} {record['model']}: {_scores(record)}"))
        say(f"{out / TUNED}: the tuned encoder and its head")
        add_record(results, record)
    conclude(out, "report", out)


def _scores(record: dict[str, Any]) -> str:
    from moce_ds.evaluation.metrics import DISPLAY_NAMES

    metrics = {name: record[metric] for metric, name in DISPLAY_NAMES.items() if metric in record}
    scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return f"{scores} ({record['n_train']} training, {record['n_test']} test images)"


@click.command(cls=Verb, settings="moce_ds.tuning.settings:DetectSettings")
@click.argument("encoder", type=PATH)
@click.option("--train", type=PATH, required=True, help="COCO's JSON of the training images.")
@click.option("--images", type=PATH, required=True, help="Folder of the training images.")
@click.option("--val", type=PATH, help="JSON of the validation split, for choosing the best weights.")
@click.option("--test", type=PATH, help="JSON of the test split (default: the validation split).")
@click.option("--eval-images", type=PATH, help="Folder of the images of --val and --test (default: --images).")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@words()
def detect(words: Sequence[str], **paths: Path | None) -> None:
    """Train Mask R-CNN with ENCODER as backbone on a set in COCO's format.

    Measures the average precision. Runs in one process, under torchrun, or with `moce launch local --nproc N detect
    ...`. Rerun the same command to resume.
    """
    from moce_ds.tuning.settings import DetectSettings

    config = _settings(DetectSettings, paths, words)
    from moce_ds.tuning.detection import DetectionTask

    _tune(config, DetectionTask)


@click.command(cls=Verb, settings="moce_ds.tuning.settings:SegmentSettings")
@click.argument("encoder", type=PATH)
@click.option("--train", type=PATH, required=True, help="Folder with images/ and annotations/, or images/NAME.")
@click.option("--val", type=PATH, help="Such a folder for choosing the best weights.")
@click.option("--test", type=PATH, help="Such a folder for the final scores (default: the validation split).")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@words()
def segment(words: Sequence[str], **paths: Path | None) -> None:
    """Train UperNet with ENCODER as backbone on a set in ADE20K's format.

    Measures the mean intersection over union. Runs in one process, under torchrun, or with `moce launch local --nproc N
    segment ...`. Rerun the same command to resume.
    """
    from moce_ds.tuning.settings import SegmentSettings

    config = _settings(SegmentSettings, paths, words)
    from moce_ds.tuning.segmentation import SegmentationTask

    _tune(config, SegmentationTask)


def _settings(cls: type[T], paths: dict[str, Path | None], words: Sequence[str]) -> T:
    """The settings from the paths and words of a verb."""
    keys = {"out": "run.out"}
    named = {keys.get(name, f"data.{name}"): path for name, path in paths.items() if path}
    return checked_settings(cls, settings_layers(cls, words, named))


def _tune(config: Any, make: Callable[..., Any]) -> None:
    """Run the task that `make` makes."""
    from moce_ds.distributed.runtime import started
    from moce_ds.tuning.tune import tune

    with started(config.run.peer_timeout) as runtime:
        with runtime.raise_on_all_ranks():
            task = make(config.data, config.model, config.optim, config.engine, config.run)
        task.check_data(runtime)
        measures = tune(task, config, runtime)
        if measures is not None and runtime.is_main:
            say(f"{config.run.out}: " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items()))
    if measures is None:
        sys.exit(STOPPED)
    conclude(config.run.out, "report", config.run.out)


VERBS = (finetune, detect, segment)
