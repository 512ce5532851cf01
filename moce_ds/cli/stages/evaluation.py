"""The verbs that measure encoders and runs without training: knn, probe, evaluate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moce_ds.cli.next_step import beside, conclude
from moce_ds.cli.options import PATH, Verb, heads_option, no_cache_option, words
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say, show
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.text import in_line


def _accuracy_options(function: Any) -> Any:
    for decorate in (
        words(),
        heads_option(),
        no_cache_option(),
        click.option("--results", type=PATH, help="A results.json to add the record to."),
        click.option("--model", default=None, help="Name of the encoder in results (default: its folder)."),
        click.option("--task", default=None, help="Name of the task in results (default: the folder of --test)."),
        click.option("--test", type=PATH, required=True, help="Labelled test images."),
        click.option("--val", type=PATH, help="Labelled validation images (probe; default: some of --train)."),
        click.option(
            "--train",
            type=PATH,
            required=True,
            help="Labelled training images: a shard set, or what `moce shards` reads.",
        ),
        click.argument("encoder", type=PATH),
    ):
        function = decorate(function)
    return function


@click.command(cls=Verb, settings="moce_ds.evaluation.settings:KnnSettings")
@_accuracy_options
def knn(**options: Any) -> None:
    """Measure the accuracy of a weighted k-nearest-neighbour vote on ENCODER's features.

    The images of --val vote too.
    """
    _accuracy("knn", **options)


@click.command(cls=Verb, settings="moce_ds.evaluation.settings:ProbeSettings")
@_accuracy_options
def probe(**options: Any) -> None:
    """Measure the accuracy of a linear classifier on ENCODER's features.

    Its regularisation strength is chosen on validation images. With method=sgd, several processes share the work.
    """
    _accuracy("probe", **options)


def _accuracy(
    verb: str,
    encoder: Path,
    train: Path,
    val: Path | None,
    test: Path,
    task: str | None,
    model: str | None,
    results: Path | None,
    heads: int | None,
    words: Sequence[str],
) -> None:
    from moce_ds.data.task_images import task_of
    from moce_ds.distributed.runtime import started
    from moce_ds.evaluation.frozen_features import SETTINGS, TaskPaths, measure_encoder
    from moce_ds.evaluation.metrics import DISPLAY_NAMES, accuracy_record
    from moce_ds.evaluation.results_file import add_record, check_results

    config = read_settings(SETTINGS[verb], words)
    _check_processes(verb, config)
    check_results(results)
    with started() as runtime:
        score, known_by = measure_encoder(encoder, TaskPaths(train, val, test), config, runtime, heads)
        is_main = runtime.is_main
    if not is_main:
        return
    name, task_name = model or encoder.name, task or task_of(test)
    scores = ", ".join(f"{DISPLAY_NAMES[metric]} {value:.4f}" for metric, value in score.figures.items())
    say(f"{verb} {in_line(task_name)} {in_line(name)}: {scores} ({score.n_train} training, {score.n_test} test images)")
    add_record(results, accuracy_record(verb, task_name, name, score) | known_by)
    images = ["--train", train, *(["--val", val] if val else []), "--test", test]
    if verb == "knn":
        conclude(results, "probe", encoder, *images, *([] if heads is None else ["--heads", heads]))
    elif heads is None:
        conclude(results, "finetune", encoder, "--out", beside(encoder, "finetune"), *images)
    else:  # finetune takes no files of weights without a number of heads
        conclude(results)


def _check_processes(verb: str, config: Any) -> None:
    """Raise ConfigError if a launcher has started several processes and they cannot share the work."""
    here = ProcessRank.here().world_size
    if here > 1 and getattr(config, "method", None) != "sgd":
        raise ConfigError(
            f"This is one of {here} processes, and {verb} runs in one; with method=sgd, `moce probe` shares its work."
        )


@click.command(cls=Verb, settings="moce_ds.encoders.settings:EncodeSettings")
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, required=True, help="Held-out images: a shard set, or what `moce shards` reads.")
@click.option("--dense", type=PATH, help="The run of a dense MAE for comparison.")
@click.option("--task", default=None, help="Name of the data in results (default: from --data).")
@click.option("--results", type=PATH, help="A results.json to add the record to.")
@no_cache_option()
@click.option("--picture", type=PATH, help="Write a PNG: images of every expert, reconstructed by all experts.")
@words()
def evaluate(
    run: Path,
    data: Path,
    dense: Path | None,
    task: str | None,
    results: Path | None,
    picture: Path | None,
    words: Sequence[str],
) -> None:
    """Measure the reconstruction error of RUN on held-out images.

    Compares the selected route, each image's own route, and with --dense a dense MAE. `moce report FOLDER` shows the
    pictures in FOLDER/pictures.
    """
    from moce_ds.data.task_images import task_of
    from moce_ds.distributed.runtime import lone_device
    from moce_ds.encoders.settings import EncodeSettings
    from moce_ds.evaluation.expert_pictures import check_picture, expert_sheet
    from moce_ds.evaluation.reconstruction import HeldOut, evaluate_run, routed_images
    from moce_ds.evaluation.results_file import add_record, check_results
    from moce_ds.selection.run_clusters import run_clusters

    config, device, name = read_settings(EncodeSettings, words), lone_device(), task or task_of(data)
    check_results(results)
    checkpoint, clusters = run_clusters(run)
    check_picture(picture, checkpoint)
    with routed_images(checkpoint, clusters, data, config, device) as task_images:
        errors = evaluate_run(checkpoint, clusters, task_images, dense, config, device)
        if picture:
            held_out = HeldOut.of(checkpoint, task_images.images, config, device)
            expert_sheet(checkpoint, clusters, task_images, held_out, (name, run.name)).write(picture)
            say(f"{picture}: written.")
    show(errors.table(name))
    add_record(results, errors.record(name, run.name))
    conclude(results, "report", run)


VERBS = (knn, probe, evaluate)
