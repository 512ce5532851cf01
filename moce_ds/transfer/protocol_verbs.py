"""The verbs of the transfer protocol: dataset, transfer."""

from collections.abc import Sequence
from pathlib import Path

import click

from moce_ds.command_line import PATH, Verb, read_settings, say, show, words
from moce_ds.errors import ConfigError
from moce_ds.text import counted


@click.command(cls=Verb, settings="moce_ds.data.public.datasets:DatasetSettings")
@click.argument("name")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def dataset(name: str, source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn the public data set NAME, unpacked in SOURCE, into shard sets OUT/train, OUT/val and OUT/test.

    Names: aircraft, caltech101, cars, cifar10, cifar100, dtd, flowers102, food101, pets, sun397, voc2007.
    """
    from moce_ds.data.public.datasets import DatasetSettings, write_dataset

    for report in write_dataset(name, source, out, read_settings(DatasetSettings, words)).values():
        rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
        say(
            f"{report.path}: {counted(report.count, 'image')} of {counted(report.classes, 'class', 'classes')}"
            f"{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        )


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--tasks", required=True, help="Names of files in configs/transfer, or YAML files: digits,textiles.")
@click.option("--config", type=PATH, help="A YAML file whose settings win over those of every task.")
@click.option("--data", type=PATH, help="A folder with a folder for each task (default: data of its settings).")
@click.option("--methods", default="knn,probe", show_default=True, help="Some of knn,probe,finetune.")
@click.option("--seeds", default="0", show_default=True, help="Of probe and finetune, with commas: 0,1,2.")
@click.option("--out", type=PATH, help="Folder of everything (default: transfer in the first of RUNS).")
def transfer(
    runs: tuple[Path, ...],
    tasks: str,
    config: Path | None,
    data: Path | None,
    methods: str,
    seeds: str,
    out: Path | None,
) -> None:
    """Compare RUNS (or folders of runs) on tasks: select and export an expert, tune on validation images, train, test.

    A table for each method at the end; every number is kept in OUT/results.json. The same command goes on, or adds
    what is new.
    """
    from moce_ds.transfer.campaign import run_campaign
    from moce_ds.transfer.campaign_table import campaign_tables
    from moce_ds.transfer.subjects import find_subjects
    from moce_ds.transfer.tasks import read_tasks

    subjects = find_subjects(list(runs))
    read = read_tasks(_names("--tasks", tasks), config, data)
    chosen = _names("--methods", methods)
    records = run_campaign(subjects, read, chosen, _seeds(seeds), out or runs[0] / "transfer")
    for table in campaign_tables(records, [subject.name for subject in subjects]):
        show(table)


def _names(option: str, text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise ConfigError(f"{option}: got {text!r}; expected one name or more, with a comma between two.")
    return names


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() and len(part) < 19 for part in text.split(",")):  # 64 bits hold 18 digits
        raise ConfigError(f"--seeds: got {text!r}; expected numbers with commas between them, such as 0,1,2.")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


VERBS = (dataset, transfer)
