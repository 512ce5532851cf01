"""The verb for public data sets: dataset."""

from collections.abc import Sequence
from pathlib import Path

import click

from moce_ds.cli.options import PATH, Verb, words
from moce_ds.config.words import read_settings
from moce_ds.console import say
from moce_ds.text import counted


@click.command(cls=Verb, settings="moce_ds.data.sources.public.datasets:DatasetSettings")
@click.argument("name")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def dataset(name: str, source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn the public data set NAME, unpacked in SOURCE, into shard sets OUT/train, OUT/val and OUT/test.

    Names: aircraft, caltech101, cars, cifar10, cifar100, dtd, flowers102, food101, pets, sun397, voc2007.
    """
    from moce_ds.data.sources.public.datasets import DatasetSettings, write_dataset

    for report in write_dataset(name, source, out, read_settings(DatasetSettings, words)).values():
        rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
        say(
            f"{report.path}: {counted(report.count, 'image')} of {counted(report.classes, 'class', 'classes')}"
            f"{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        )


VERBS = (dataset,)
