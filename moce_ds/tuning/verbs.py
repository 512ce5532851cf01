"""The verbs that train on a task: finetune."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from moce_ds.command_line import PATH, Verb, read_settings, say, words
from moce_ds.errors import STOPPED
from moce_ds.text import in_line
from moce_ds.values import is_number
from moce_ds.yaml_text import Plain


@click.command("finetune", cls=Verb, settings="moce_ds.tuning.settings:FinetuneSettings")
@click.argument("encoder", type=PATH)
@click.option("--train", type=PATH, required=True, help="Labelled training images: a shard set or a folder.")
@click.option("--test", type=PATH, required=True, help="Labelled test images, looked at once, at the end.")
@click.option("--val", help="Labelled validation images, or a share of the training images such as 0.1.")
@click.option("--out", type=PATH, required=True, help="The folder of the run.")
@click.option("--task", default=None, help="The task's name in results (default: the folder of --test).")
@click.option("--model", default=None, help="The encoder's name in results (default: its folder).")
@click.option("--results", type=PATH, help="A results.json to add the record to.")
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
    """Train ENCODER and a linear head on a task's labels; OUT/tuned is the tuned encoder with its head.

    Runs alone, or with `moce launch local --nproc N finetune ...`. The same command resumes. With --val the best
    weights by validation are kept, else the last.
    """
    from moce_ds.results_file import add_record, check_results
    from moce_ds.runtime import started
    from moce_ds.transfer.metrics import SPOKEN
    from moce_ds.transfer.verbs import task_of
    from moce_ds.tuning.classification import TUNED
    from moce_ds.tuning.finetune import finetune as run
    from moce_ds.tuning.settings import FinetuneSettings

    named: dict[str, Path | str] = {"run.out": out, "data.encoder": encoder, "data.train": train, "data.test": test}
    if val is not None:  # a folder may be called 1
        named |= {"data.val_share" if is_number(val) and not Path(val).exists() else "data.val": Plain(val)}
    config = read_settings(FinetuneSettings, words, named)
    check_results(results)
    with started(config.run.peer_timeout) as runtime:
        record = run(config, runtime)
    if record is None:
        sys.exit(STOPPED)
    if runtime.is_main:
        record |= {"task": task or task_of(test), "model": model or encoder.name}
        told = ", ".join(f"{spoken} {record[metric]:.4f}" for metric, spoken in SPOKEN.items() if metric in record)
        counted = f"({record['n_train']} training, {record['n_test']} test images)"
        say(in_line(f"finetune {record['task']} {record['model']}: {told} {counted}"))
        say(f"{out / TUNED}: the tuned encoder and its head")
        add_record(results, record)


VERBS = (finetune,)
