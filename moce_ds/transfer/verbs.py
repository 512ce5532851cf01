"""The verbs about a task: select, export, knn, probe, evaluate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moce_ds.command_line import PATH, Verb, read_settings, show, words
from moce_ds.errors import ConfigError
from moce_ds.transfer.protocol_verbs import VERBS as PROTOCOL_VERBS


@click.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, required=True, help="The task's images: a shard set or a folder of images.")
@click.option("--task", default=None, help="The task's name in results (default: that of --data).")
@click.option("--results", type=PATH, help="A results.json to add the record to.")
@words()
def select(run: Path, data: Path, task: str | None, results: Path | None, words: Sequence[str]) -> None:
    """Find the route through the experts of RUN that serves a task's images best."""
    from moce_ds.models.encode import EncodeSettings
    from moce_ds.transfer.results import add_record, selection_table
    from moce_ds.transfer.select import select_route
    from moce_ds.transfer.task_data import opened_images

    config = read_settings(EncodeSettings, words)
    with opened_images(data) as images:
        selection = select_route(run, images, config, _device())
    show(selection_table(selection, task or _task_name(data)))
    add_record(results, selection.record(task or _task_name(data)))


@click.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option("--data", type=PATH, help="Choose the route by a task's images (a shard set or a folder).")
@click.option("--cluster", type=int, help="Choose the route of one cluster.")
@click.option("--route", help="Choose the experts, one a layer: 3,5.")
@click.option("--replace", is_flag=True, help="Replace an earlier export in OUT.")
@words()
def export(
    run: Path,
    out: Path,
    data: Path | None,
    cluster: int | None,
    route: str | None,
    replace: bool,
    words: Sequence[str],
) -> None:
    """Write one route of RUN as a dense ViT (timm's layout) to OUT; the encoder of a dense RUN needs no choice."""
    from moce_ds.checkpoint_files import find
    from moce_ds.models.encode import EncodeSettings
    from moce_ds.transfer import export as exporting
    from moce_ds.transfer.select import run_clusters, select_route
    from moce_ds.transfer.task_data import opened_images

    config = read_settings(EncodeSettings, words)
    choices = [
        name for name, value in (("--data", data), ("--cluster", cluster), ("--route", route)) if value is not None
    ]
    checkpoint = find(run)
    if not checkpoint.manifest["model"]["experts"]:
        if choices:
            raise ConfigError(f"{choices[0]}: {run} is a dense run, which has one encoder and no routes.")
        exporting.export_dense(checkpoint, out, replace)
        click.echo(f"{out}: the dense encoder of step {checkpoint.step}")
        return
    if len(choices) != 1:
        raise ConfigError(f"{run} has experts: choose a route with one of --data, --cluster, --route.")
    checkpoint, clusters = run_clusters(run)
    extra: dict[str, Any] = {}
    if data is not None:
        with opened_images(data) as images:
            selection = select_route(run, images, config, _device())
        chosen, extra = exporting.choose_selected(checkpoint, selection), {"votes": selection.record(_task_name(data))}
    elif cluster is not None:
        chosen = exporting.choose_cluster(checkpoint, cluster)
    else:
        chosen = exporting.choose_route(checkpoint, _experts(str(route)))
    said = exporting.export_route(checkpoint, clusters, chosen, out, extra, replace)
    click.echo(
        f"{out}: route {'-'.join(map(str, said['route']))} of step {said['step']}; differs from the trained model by "
        f"{said['max_difference']:.1e} (of the largest output)"
    )


def _accuracy_options(function: Any) -> Any:
    for decorate in (
        words(),
        click.option("--results", type=PATH, help="A results.json to add the record to."),
        click.option("--model", default=None, help="The encoder's name in results (default: its folder's)."),
        click.option("--task", default=None, help="The task's name in results (default: the folder of --test)."),
        click.option("--test", type=PATH, required=True, help="Labelled test images."),
        click.option("--val", type=PATH, help="Labelled images for choosing (probe; default: some of --train)."),
        click.option("--train", type=PATH, required=True, help="Labelled training images: a shard set or a folder."),
        click.argument("encoder", type=PATH),
    ):
        function = decorate(function)
    return function


@click.command(cls=Verb, settings="moce_ds.transfer.knn:KnnSettings")
@_accuracy_options
def knn(**given: Any) -> None:
    """Accuracy of a weighted k-nearest-neighbour vote on ENCODER's features; nothing is chosen, --val votes too."""
    _accuracy("knn", **given)


@click.command(cls=Verb, settings="moce_ds.transfer.probe:ProbeSettings")
@_accuracy_options
def probe(**given: Any) -> None:
    """Accuracy of a linear classifier on ENCODER's features, its strength chosen on validation images."""
    _accuracy("probe", **given)


def _accuracy(
    verb: str,
    encoder: Path,
    train: Path,
    val: Path | None,
    test: Path,
    task: str | None,
    model: str | None,
    results: Path | None,
    words: Sequence[str],
) -> None:
    from moce_ds.models.encode import open_encoder
    from moce_ds.transfer.frozen import SETTINGS, measure_frozen
    from moce_ds.transfer.metrics import SPOKEN
    from moce_ds.transfer.results import accuracy_record, add_record
    from moce_ds.transfer.task_data import opened_task

    config, device = read_settings(SETTINGS[verb], words), _device()
    opened = open_encoder(encoder, device)
    with opened_task(train, val, test) as splits:
        score = measure_frozen(opened, splits, config, device)
    name, task_name = model or encoder.name, task or _task_name(test)
    told = ", ".join(f"{SPOKEN[metric]} {value:.4f}" for metric, value in score.figures.items())
    click.echo(f"{verb} {task_name} {name}: {told} ({score.n_train} training, {score.n_test} test images)")
    add_record(results, accuracy_record(verb, task_name, name, score))


@click.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, required=True, help="Held-out images: a shard set or a folder of images.")
@click.option("--dense", type=PATH, help="The run of a dense MAE, to compare with.")
@click.option("--task", default=None, help="The data's name in results (default: that of --data).")
@click.option("--results", type=PATH, help="A results.json to add the record to.")
@words()
def evaluate(
    run: Path, data: Path, dense: Path | None, task: str | None, results: Path | None, words: Sequence[str]
) -> None:
    """Reconstruction error of RUN on held-out images: selected route, each image's own route, dense twin."""
    from moce_ds.models.encode import EncodeSettings
    from moce_ds.transfer.evaluate import evaluate_run
    from moce_ds.transfer.results import add_record
    from moce_ds.transfer.task_data import opened_images

    config = read_settings(EncodeSettings, words)
    with opened_images(data) as images:
        found = evaluate_run(run, images, dense, config, _device())
    named = {"dense twin": found.dense, "selected route": found.selected, "own routes": found.own}
    base = found.dense or found.own
    for name, error in named.items():
        if error is not None:
            click.echo(f"{name:<15} {error:.5f}  x {error / base:.4f}")
    add_record(results, found.record(task or _task_name(data), run.name))


def _task_name(data: Path) -> str:
    """The task behind `digits/train` and behind `digits`: digits."""
    return data.absolute().parent.name if data.name in ("train", "val", "test") else data.name


def _device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _experts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--route: got {text!r}; expected one expert a layer, such as 3,5.") from None


VERBS = (select, export, knn, probe, evaluate, *PROTOCOL_VERBS)
