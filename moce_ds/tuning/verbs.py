"""The verbs that train on a task: finetune."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moce_ds.command_line import PATH, Verb, read_settings, words
from moce_ds.errors import STOPPED

if TYPE_CHECKING:
    from moce_ds.tuning.labelled import Splits
    from moce_ds.tuning.settings import FinetuneSettings


@click.command(cls=Verb, settings="moce_ds.tuning.settings:FinetuneSettings")
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
    out: Path,
    task: str | None,
    model: str | None,
    results: Path | None,
    words: Sequence[str],
    **data: Any,
) -> None:
    """Train ENCODER and a linear head on a task's labels; OUT/tuned is the tuned encoder.

    Runs alone, or with `moce launch local --nproc N finetune ...`. The same command resumes. With --val the best
    weights by validation are kept, else the last.
    """
    from moce_ds.models.encode import open_encoder
    from moce_ds.runtime import started
    from moce_ds.transfer.results import add_record
    from moce_ds.transfer.verbs import _task_name as task_name
    from moce_ds.tuning.classification import TUNED, Classification
    from moce_ds.tuning.loop import tune
    from moce_ds.tuning.settings import FinetuneSettings

    given = {"run.out": out, "data.encoder": encoder} | {f"data.{name}": path for name, path in data.items() if path}
    config = read_settings(FinetuneSettings, [*words, *(f"{key}={_as_yaml(value)}" for key, value in given.items())])
    with started(config.run.peer_timeout) as runtime, _splits(config) as splits:
        opened = open_encoder(encoder, runtime.device)
        measures = tune(Classification(opened, splits, config, runtime), config, runtime)
        if runtime.is_main and measures is not None:
            name, named = model or encoder.name, task or task_name(data["test"])
            told = ", ".join(f"{metric} {value:.4f}" for metric, value in measures.items())
            click.echo(
                f"finetune {named} {name}: {told} ({splits.train.count} training, {splits.test.count} test images)"
            )
            click.echo(f"{out / TUNED}: the tuned encoder and its head")
            add_record(results, _record(named, name, measures, config, splits))
    if measures is None:
        sys.exit(STOPPED)


def _as_yaml(value: Any) -> str:
    """A path or a number as YAML reads it back."""
    try:
        return str(float(value))
    except (TypeError, ValueError):
        return json.dumps(str(value))


@contextmanager
def _splits(config: "FinetuneSettings") -> Iterator["Splits"]:
    """The splits that the settings name, open for the length of the block. Raises DataError, ArtefactError."""
    from moce_ds.transfer.task_data import opened_images
    from moce_ds.tuning.labelled import make_splits

    data = config.data
    with ExitStack() as stack:
        train, test = (stack.enter_context(opened_images(path)) for path in (data.train, data.test))
        val = stack.enter_context(opened_images(data.val)) if isinstance(data.val, Path) else data.val
        yield make_splits(train, val, test, config.run.seed)


def _record(
    task: str, model: str, measures: dict[str, float], config: "FinetuneSettings", splits: "Splits"
) -> dict[str, Any]:
    """The result as plain data for results.json."""
    optim = config.optim
    return {
        "verb": "finetune",
        "task": task,
        "model": model,
        **measures,
        "n_train": splits.train.count + (splits.val.count if splits.val else 0),
        "n_test": splits.test.count,
        "settings": {
            "base_lr": optim.base_lr,
            "epochs": optim.epochs,
            "layer_decay": optim.layer_decay,
            "seed": config.run.seed,
        },
    }


VERBS = (finetune,)
