"""The verbs of dense tasks: detect, segment."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from moce_ds.command_line import PATH, Verb, read_settings, say, words
from moce_ds.errors import STOPPED


@click.command(cls=Verb, settings="moce_ds.tuning.dense_settings:DetectSettings")
@click.argument("encoder", type=PATH)
@click.option("--train", type=PATH, required=True, help="COCO's JSON of the training images.")
@click.option("--images", type=PATH, required=True, help="Folder of the training images.")
@click.option("--val", type=PATH, help="JSON of a validation split, which chooses the best weights.")
@click.option("--test", type=PATH, help="JSON of what the final scores are of (default: the validation split).")
@click.option("--eval-images", type=PATH, help="Folder of the images of --val and --test (default: --images).")
@click.option("--out", type=PATH, required=True, help="The run's folder.")
@words()
def detect(words: Sequence[str], **paths: Path | None) -> None:
    """Train Mask R-CNN around ENCODER on a set in COCO's format, and measure the average precision.

    Runs alone, under torchrun, or with `moce launch local --nproc N detect ...`. The same command resumes.
    """
    from moce_ds.tuning.dense_settings import DetectSettings
    from moce_ds.tuning.detection import DetectionTask

    _tune(DetectSettings, DetectionTask, paths, words)


@click.command(cls=Verb, settings="moce_ds.tuning.dense_settings:SegmentSettings")
@click.argument("encoder", type=PATH)
@click.option("--train", type=PATH, required=True, help="Folder with images/ and annotations/, or images/NAME.")
@click.option("--val", type=PATH, help="Such a folder, which chooses the best weights.")
@click.option("--test", type=PATH, help="Such a folder, which the final scores are of (default: the validation split).")
@click.option("--out", type=PATH, required=True, help="The run's folder.")
@words()
def segment(words: Sequence[str], **paths: Path | None) -> None:
    """Train UperNet around ENCODER on a set in ADE20K's format, and measure the mean intersection over union.

    Runs alone, under torchrun, or with `moce launch local --nproc N segment ...`. The same command resumes.
    """
    from moce_ds.tuning.dense_settings import SegmentSettings
    from moce_ds.tuning.segmentation import SegmentationTask

    _tune(SegmentSettings, SegmentationTask, paths, words)


def _tune(cls: Any, make: Callable[[Any], Any], paths: dict[str, Path | None], words: Sequence[str]) -> None:
    """Settings out of the verb's paths and words; then the whole run."""
    from moce_ds.runtime import started
    from moce_ds.tuning.loop import tune

    keys = {"out": "run.out"}
    named = {keys.get(name, f"data.{name}"): path for name, path in paths.items() if path}
    config = read_settings(cls, words, named)
    with started(config.run.peer_timeout) as runtime:
        with runtime.together():
            task = make(config)
        task.check_data(runtime)
        found = tune(task, config, runtime)
        if found is not None and runtime.is_main:
            say(f"{config.run.out}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    if found is None:
        sys.exit(STOPPED)


VERBS = (detect, segment)
