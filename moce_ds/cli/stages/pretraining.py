"""The verbs of the stages up to a trained model, and those that read the results: report, inspect."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moce_ds.cli.stages.bench import Numbers
from moce_ds.cli.stages.options import PATH, Verb, checked_settings, force_option, heads_option, words
from moce_ds.common.config.command_line import read_settings, settings_layers
from moce_ds.common.config.printing import explained
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import STOPPED, ConfigError
from moce_ds.common.host.program import say, show
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.text import counted


@click.command(cls=Verb, settings="moce_ds.data.shard_writer:ShardSettings")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def shards(source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn a folder of images SOURCE into tar shards OUT.

    The folder of an image is its class. Rerun the same command to resume. Files that are not complete images are listed
    in OUT/rejected.jsonl.
    """
    from moce_ds.data.shard_writer import ShardSettings, write_shards
    from moce_ds.data.shards import ShardSet

    report = write_shards(source, out, read_settings(ShardSettings, words))
    rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
    say(
        f"{out}: {counted(report.count, 'image')} of {counted(len(ShardSet.open(out).classes), 'class', 'classes')} in "
        f"{counted(report.shards, 'shard')}, "
        f"{report.bytes / 2**20:.1f} MiB{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        + (f" (listed in {out / 'rejected.jsonl'})" if report.rejected else "")
    )


@click.command(cls=Verb, settings="moce_ds.data.sources.public.datasets:DatasetSettings")
@click.argument("name")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def dataset(name: str, source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn the public data set NAME, unpacked in SOURCE, into shard sets in OUT.

    The shard sets are OUT/train, OUT/val and OUT/test. Names: aircraft, caltech101, cars, cifar10, cifar100, dtd,
    flowers102, food101, pets, sun397, voc2007.
    """
    from moce_ds.data.sources.public.datasets import DatasetSettings, write_dataset

    for report in write_dataset(name, source, out, read_settings(DatasetSettings, words)).values():
        rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
        say(
            f"{report.path}: {counted(report.count, 'image')} of {counted(report.classes, 'class', 'classes')}"
            f"{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        )


@click.command(cls=Verb, settings="moce_ds.training.settings:PretrainSettings")
@words(required=True)
@click.option("--dry-run", is_flag=True, help="Print the plan and the settings with their origins, and exit.")
@click.option(
    "--processes", default=None, type=click.IntRange(1), help="With --dry-run: number of processes to plan for."
)
@force_option()
def pretrain(words: Sequence[str], dry_run: bool, processes: int | None) -> None:
    """Pre-train a masked autoencoder, dense or with experts (model.arch).

    Runs in one process, under torchrun, or with `moce launch local --nproc N pretrain ...`. Rerun the same command to
    resume.
    """
    from moce_ds.training.settings import PretrainSettings

    layers = settings_layers(PretrainSettings, words)
    config = checked_settings(PretrainSettings, layers)
    if processes and not dry_run:
        raise ConfigError("--processes: it only plans, with --dry-run; start processes with moce launch or torchrun.")
    from moce_ds.forecast.preflight import check_memory, plan_table
    from moce_ds.forecast.step_cost import Work

    work = Work.of(config)
    if dry_run:
        title, world_size = f"{config.model.arch} -> {config.run.out}", processes or ProcessRank.here().world_size
        show(plan_table(title, work, config.data.shards, world_size))
        say(*explained(PretrainSettings, to_tree(config), layers))
        return
    from moce_ds.distributed.runtime import started
    from moce_ds.training.pretrain import pretrain as run

    with started(config.run.peer_timeout) as runtime:
        with runtime.raise_on_all_ranks():
            check_memory(work, runtime.world_size, runtime.device)
        progress = run(config, runtime)
    if not progress.complete:
        sys.exit(STOPPED)


@click.command(cls=Verb, settings="moce_ds.training.settings:PretrainSettings")
@words(required=True)
@click.option("--nodes", type=Numbers(), default="1", show_default=True, help="Nodes; several for a comparison: 1,2,4.")
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(1), help="GPUs (processes) per node.")
@click.option("--device", default="h100", show_default=True, help="h100, h200, a100, this, or a YAML file.")
@click.option("--assume", multiple=True, metavar="KEY=VALUE", help="Replace an assumption about the device.")
@click.option("--images", type=click.IntRange(1), help="Images of the shard set, if it does not exist yet.")
@click.option("--moved", type=click.FloatRange(0, 1), help="Share of the images that leave their rank.")
@click.option("--measure", is_flag=True, help="With --device this: train some steps, and print the error.")
@click.option("--json", "json_file", type=PATH, help="Write predictions and assumptions to this file.")
def plan(
    words: Sequence[str], nodes: list[int], gpus: int, device: str, assume: Sequence[str], measure: bool, **options: Any
) -> None:
    """Predict the time, memory and GPU-hours of a run on other machines.

    Use `--nodes 1,2,4` to compare. With --device this, the plan uses short measurements of the blocks, memory and links
    of this machine; --measure then trains some steps and prints the error of the prediction. docs/planning.md describes
    the model, its assumptions and errors.
    """
    from moce_ds.training.settings import PretrainSettings

    config = checked_settings(PretrainSettings, settings_layers(PretrainSettings, words))
    from moce_ds.common.storage.files import check_output, write_json, writes_to
    from moce_ds.forecast import prediction
    from moce_ds.forecast.devices import THIS, assuming, find_device
    from moce_ds.forecast.step_cost import Machines, Work

    if options["json_file"] is not None:
        check_output(options["json_file"], "a plan", b'"device": {')
    work, moved, measured = Work.of(config), options["moved"], None
    steps = prediction.steps_of_run(config.data.shards, config.optim, options["images"])
    if device == THIS:
        from moce_ds.bench.calibration import calibrate

        calibration = calibrate(work, config.experts, config.loss_weights, nodes, gpus, measure)
        assumed, measured = assuming(calibration.device, assume), calibration.step
    elif measure:
        raise ConfigError(f"--measure: only this machine can be measured; got --device {device}, expected {THIS}.")
    else:
        assumed = find_device(device, assume)
    predicted = [prediction.predict(work, Machines(count, gpus), assumed, steps, moved) for count in nodes]
    show(prediction.prediction_table(config.model.arch, device, assumed, predicted))
    say(prediction.assumptions(work, assumed, moved), *prediction.advice(work, assumed, predicted))
    if measured is not None:
        show(prediction.error_table(predicted[0], measured))
    if options["json_file"] is not None:
        with writes_to(options["json_file"]):
            write_json(options["json_file"], prediction.to_record(assumed, predicted, measured))


@click.command(cls=Verb, settings="moce_ds.encoders.settings:FeatureSettings")
@click.argument("encoder", type=PATH)
@click.argument("shards", type=PATH)
@click.argument("out", type=PATH)
@heads_option()
@words()
def features(encoder: Path, shards: Path, out: Path, heads: int | None, words: Sequence[str]) -> None:
    """Write the features of ENCODER for the images of SHARDS to OUT.

    ENCODER is a dense run, an exported encoder, or a .pth file of the public MAE. Several processes share the work.
    Rerun the same command to resume.
    """
    from moce_ds.data.shards import ShardSet
    from moce_ds.distributed.runtime import started
    from moce_ds.encoders.features import write_features
    from moce_ds.encoders.open import open_encoder
    from moce_ds.encoders.settings import FeatureSettings

    config = read_settings(FeatureSettings, words)
    with started() as runtime:
        opened = open_encoder(encoder, runtime.device, heads)
        if encoder.is_file():
            runtime.say(f"{encoder}: read as {opened.provenance['taken_for']}")
        write_features(opened, ShardSet.open(shards), out, config, runtime)
        runtime.say(f"{out}: features of width {opened.shape.width}")


@click.command(cls=Verb, settings="moce_ds.clustering.settings:ClusterSettings")
@click.argument("features", type=PATH)
@click.argument("out", type=PATH)
@click.option("--shards", type=PATH, help="The shard set, for comparing the clusters with its labels.")
@words()
def cluster(features: Path, out: Path, shards: Path | None, words: Sequence[str]) -> None:
    """Cluster FEATURES into OUT: k-means, then balanced assignment (method=sinkhorn)."""
    from moce_ds.clustering.build import ClusterSettings, build_clusters
    from moce_ds.clustering.quality import report_table
    from moce_ds.data.shards import ShardSet
    from moce_ds.distributed.runtime import lone_device

    config = read_settings(ClusterSettings, words)
    labelled = ShardSet.open(shards) if shards else None
    labels, classes = (labelled.labels, labelled.classes) if labelled else (None, [])
    _, report = build_clusters(features, out, config, labels, classes, str(lone_device()))
    show(report_table(report, compared=shards is not None))


@click.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="File of the page (default: FOLDER/report.html).")
def report(folder: Path, out: Path | None) -> None:
    """Write one self-contained HTML page about a run, a folder of runs, or a study.

    The page of a folder also shows its results.json.
    """
    from moce_ds.report.build import build_report

    say(str(build_report(folder, out)))


@click.command()
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read all files and compare checksums.")
def inspect(path: Path, verify: bool) -> None:
    """Describe what moce wrote to PATH, and verify its checksums.

    PATH holds shards, features, clusters, a run, a checkpoint, an encoder, an export, results, a study or a pipeline.
    """
    from moce_ds.inspection.inspection import describe, findings

    checked = findings(path) if verify else None
    unverified = ["These parts cannot be verified:", *checked.unverified] if checked and checked.unverified else []
    if checked and checked.faults:  # the description may fail because of them
        say(*checked.faults, *unverified)
        sys.exit(1)
    show(describe(path))
    if checked:
        say(*(["No fault found.", *unverified] if unverified else ["Verified: everything is as it was written."]))


VERBS = (shards, dataset, pretrain, plan, features, cluster, report, inspect)
