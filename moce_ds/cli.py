"""The `moce` command: one verb a stage. Verbs are thin: they read the words, call the stage, and print.

Stages are imported inside the verbs, so that `moce --help` answers at once and a verb needs only its own packages.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from moce_ds import __version__
from moce_ds import config as configuration
from moce_ds.bench.verbs import Numbers, bench
from moce_ds.errors import STOPPED, ConfigError, MoceError

PATH = click.Path(path_type=Path)
SETTINGS = "[CONFIG.yaml] [key=value ...]"


class Verb(click.Command):
    """A command whose --help ends with its settings."""

    def __init__(self, *args: Any, settings: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List every setting with its default."""
        if self.settings:
            module, name = self.settings.split(":")
            cls = getattr(__import__(module, fromlist=[name]), name)
            formatter.write(f"\nSettings (key=default):\n{configuration.help_text(cls)}\n")


def words(required: bool = False) -> Any:
    """The trailing words of a verb: a YAML file and `key=value` settings."""
    return click.argument("words", nargs=-1, required=required, metavar=SETTINGS)


def read_settings(cls: type[configuration.T], given: Sequence[str]) -> configuration.T:
    """Settings from a verb's trailing words. Raises ConfigError."""
    files = [word for word in given if "=" not in word]
    if len(files) > 1:
        raise ConfigError(
            f"Got several words that are not key=value: {' '.join(files)}; expected one YAML file at most."
        )
    pairs = [word for word in given if "=" in word]
    return configuration.load(cls, Path(files[0]) if files else None, pairs)


@click.group(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moce")
def moce() -> None:
    """Masked autoencoders with a mixture of cluster-conditional experts.

    \b
    The stages, in order:
      shards    images -> tar shards            select    which expert serves a task
      pretrain  a dense MAE (arch=mae)          export    that expert as a dense ViT
      features  its features of every image     knn       accuracy without training
      cluster   features -> clusters            probe     accuracy of a linear classifier
      pretrain  the experts (arch=moce)         report    one HTML page of a run

    Before a long run, `plan` says what it would take on other machines; `study` runs many, to compare them.
    """


@moce.command(cls=Verb, settings="moce_ds.data.shard_writer:ShardSettings")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@words()
def shards(source: Path, out: Path, words: Sequence[str]) -> None:
    """Turn a folder of images SOURCE into tar shards OUT; the folder of an image is its class.

    Interrupted, the same command goes on. Files that are no whole image are listed in OUT/rejected.jsonl.
    """
    from moce_ds.data.shard_writer import ShardSettings, write_shards
    from moce_ds.data.shards import ShardSet

    report = write_shards(source, out, read_settings(ShardSettings, words))
    rejected = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "none"
    click.echo(
        f"{out}: {report.count} images of {len(ShardSet.open(out).classes)} classes in {report.shards} shards, "
        f"{report.bytes / 2**20:.1f} MiB{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        + (f" (listed in {out / 'rejected.jsonl'})" if report.rejected else "")
    )


@moce.command(cls=Verb, settings="moce_ds.training.settings:PretrainSettings")
@words(required=True)
@click.option("--dry-run", is_flag=True, help="Print the resolved plan and the settings, and do nothing.")
@click.option("--processes", default=None, type=click.IntRange(1), help="With --dry-run: plan for so many processes.")
def pretrain(words: Sequence[str], dry_run: bool, processes: int | None) -> None:
    """Pre-train a masked autoencoder: dense (model.arch=mae) or with experts (model.arch=moce).

    Runs alone, under torchrun, or with `python -m launchers.local --nproc N pretrain ...`. The same command resumes.
    """
    from moce_ds.training.settings import PretrainSettings

    config = read_settings(PretrainSettings, words)
    if dry_run:
        from moce_ds.planning.dry_run import plan_table

        _print(plan_table(config, processes or int(os.environ.get("WORLD_SIZE", "1"))))
        click.echo(configuration.to_yaml(config))
        return
    from moce_ds.runtime import started
    from moce_ds.training.loop import pretrain as run

    with started(config.run.peer_timeout) as runtime:
        progress = run(config, runtime)
    if not progress.complete:
        sys.exit(STOPPED)


@moce.command(cls=Verb, settings="moce_ds.training.settings:PretrainSettings")
@words(required=True)
@click.option("--nodes", type=Numbers(), default="1", show_default=True, help="Nodes; several to compare: 1,2,4.")
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(1), help="GPUs (processes) of a node.")
@click.option("--device", default="h100", show_default=True, help="h100, h200, a100, this, or a YAML file.")
@click.option("--assume", multiple=True, metavar="KEY=VALUE", help="Replace something assumed of the device.")
@click.option("--images", type=click.IntRange(1), help="Images of the shard set, if it is not there yet.")
@click.option("--moved", type=click.FloatRange(0, 1), help="Share of the images that leave their rank.")
@click.option("--measure", is_flag=True, help="With --device this: take some steps, and print the error.")
@click.option("--json", "json_file", type=PATH, help="Write predictions and assumptions to this file.")
def plan(
    words: Sequence[str], nodes: list[int], gpus: int, device: str, assume: Sequence[str], measure: bool, **given: Any
) -> None:
    """Predict a run on machines that are not at hand: time of a step and its parts, memory, days, GPU-hours.

    Say `--nodes 1,2,4` to compare. With --device this, blocks, memory and links of this machine are timed for a moment
    and the plan is made of that; --measure then trains for some steps and says how far off it was. The model behind
    it, its assumptions and errors are in docs/planning.md.
    """
    from moce_ds.files import write_json
    from moce_ds.planning import report
    from moce_ds.planning.devices import THIS, assuming, find_device
    from moce_ds.planning.prediction import predict, steps_of_run
    from moce_ds.planning.work import Machines
    from moce_ds.training.settings import PretrainSettings

    config = read_settings(PretrainSettings, words)
    steps, measured = steps_of_run(config, given["images"]), None
    if device == THIS:
        from moce_ds.bench.calibration import calibrate

        calibration = calibrate(config, nodes, gpus, measure)
        assumed, measured = assuming(calibration.device, assume), calibration.step
    elif measure:
        raise ConfigError(f"--measure: only this machine can be measured; got --device {device}, expected {THIS}.")
    else:
        assumed = find_device(device, assume)
    predictions = [predict(config, Machines(count, gpus), assumed, steps, given["moved"]) for count in nodes]
    _print(report.prediction_table(config, device, assumed, predictions))
    told = [report.assumptions(config, assumed, given["moved"]), *report.advice(config, assumed, predictions)]
    click.echo("\n".join(told))
    if measured is not None:
        _print(report.error_table(predictions[0], measured))
    if given["json_file"] is not None:
        write_json(given["json_file"], report.to_record(assumed, predictions, measured))


@moce.command(cls=Verb, settings="moce_ds.models.encode:FeatureSettings")
@click.argument("encoder", type=PATH)
@click.argument("shards", type=PATH)
@click.argument("out", type=PATH)
@words()
def features(encoder: Path, shards: Path, out: Path, words: Sequence[str]) -> None:
    """Write the features that ENCODER (a dense run, or an exported encoder) gives the images of SHARDS to OUT.

    Several processes share the work. Interrupted, the same command goes on.
    """
    from moce_ds.data.shards import ShardSet
    from moce_ds.models.encode import FeatureSettings, open_encoder, write_features
    from moce_ds.runtime import started

    config = read_settings(FeatureSettings, words)
    with started() as runtime:
        opened = open_encoder(encoder, runtime.device)
        write_features(opened, ShardSet.open(shards), out, config, runtime)
        runtime.say(f"{out}: features of width {opened.shape.width}")


@moce.command(cls=Verb, settings="moce_ds.clustering.build:ClusterSettings")
@click.argument("features", type=PATH)
@click.argument("out", type=PATH)
@click.option("--shards", type=PATH, help="The shard set, to compare the clusters with its labels.")
@words()
def cluster(features: Path, out: Path, shards: Path | None, words: Sequence[str]) -> None:
    """Cluster FEATURES into OUT: k-means, then balanced assignment (method=sinkhorn)."""
    import torch

    from moce_ds.clustering.build import ClusterSettings, build_clusters
    from moce_ds.clustering.quality import report_table
    from moce_ds.data.shards import ShardSet

    config = read_settings(ClusterSettings, words)
    labelled = ShardSet.open(shards) if shards else None
    labels, classes = (labelled.labels, labelled.classes) if labelled else (None, [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, report = build_clusters(features, out, config, labels, classes, device)
    _print(report_table(report))


@moce.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
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
    _print(selection_table(selection, task or _task_name(data)))
    add_record(results, selection.record(task or _task_name(data)))


@moce.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option("--data", type=PATH, help="Choose the route by a task's images (a shard set or a folder).")
@click.option("--cluster", type=int, help="Choose the route of one cluster.")
@click.option("--route", help="Choose the experts, one a layer: 3,5.")
@words()
def export(
    run: Path, out: Path, data: Path | None, cluster: int | None, route: str | None, words: Sequence[str]
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
        exporting.export_dense(checkpoint, out)
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
    said = exporting.export_route(checkpoint, clusters, chosen, out, extra)
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
        click.option("--train", type=PATH, required=True, help="Labelled training images: a shard set or a folder."),
        click.argument("encoder", type=PATH),
    ):
        function = decorate(function)
    return function


@moce.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
@_accuracy_options
def knn(**given: Any) -> None:
    """Accuracy of a weighted k-nearest-neighbour vote on ENCODER's features."""
    from moce_ds.transfer.knn import knn_accuracy

    _accuracy("knn", knn_accuracy, **given)


@moce.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
@_accuracy_options
def probe(**given: Any) -> None:
    """Accuracy of a linear classifier on ENCODER's features, tuned on part of the training images."""
    from moce_ds.transfer.probe import linear_probe

    _accuracy("probe", linear_probe, **given)


def _accuracy(
    verb: str,
    measure: Any,
    encoder: Path,
    train: Path,
    test: Path,
    task: str | None,
    model: str | None,
    results: Path | None,
    words: Sequence[str],
) -> None:
    from moce_ds.models.encode import EncodeSettings, open_encoder
    from moce_ds.transfer.results import accuracy_record, add_record
    from moce_ds.transfer.task_data import encoded_split, opened_images

    config, device = read_settings(EncodeSettings, words), _device()
    opened = open_encoder(encoder, device)
    with opened_images(train) as train_set, opened_images(test) as test_set:
        split = encoded_split(opened, train_set, test_set, config, device)
    score = measure(*split)
    name, task_name = model or encoder.name, task or _task_name(test)
    click.echo(
        f"{verb} {task_name} {name}: top-1 {score.top1:.4f}, mean per class {score.mean_per_class:.4f} "
        f"({score.n_train} training, {score.n_test} test images)"
    )
    add_record(results, accuracy_record(verb, task_name, name, score))


@moce.command(cls=Verb, settings="moce_ds.models.encode:EncodeSettings")
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


@moce.command(cls=Verb, settings="launchers.grid:StudySettings")
@words(required=True)
@click.option("--list", "listed", is_flag=True, help="Print the cells and how far they are, and do nothing.")
@click.option("--cell", help="Run this cell only, such as num=4,seed=1.")
def study(words: Sequence[str], listed: bool, cell: str | None) -> None:
    """Run a grid of pre-trainings and evaluate each; `moce report OUT` shows them beside one another.

    Cells that are done are not run again, so the same command goes on after a stop, a kill or a failure.
    """
    from launchers.grid import StudySettings
    from launchers.study import run_study, states_table

    config = read_settings(StudySettings, words)
    if listed:
        _print(states_table(config))
        return
    sys.exit(run_study(config, cell))


@moce.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="The page (default: FOLDER/report.html).")
def report(folder: Path, out: Path | None) -> None:
    """Write one self-contained HTML page about a run, about a folder of runs and their results.json, or a study."""
    from moce_ds.analysis.report import build_report

    click.echo(str(build_report(folder, out)))


@moce.command()
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and compare checksums.")
def inspect(path: Path, verify: bool) -> None:
    """Say what PATH is (shards, features, clusters, run, checkpoint, encoder, results) and what it holds."""
    from moce_ds.analysis.inspection import describe, faults

    _print(describe(path))
    if verify:
        found = faults(path)
        click.echo("\n".join(found) if found else "Verified: everything is as it was written.")
        sys.exit(1 if found else 0)


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


def _print(renderable: Any) -> None:
    Console(width=None if sys.stdout.isatty() else 100, soft_wrap=False).print(renderable)


moce.add_command(bench)


def main() -> None:
    """Entry point: user errors in one message and their status, Ctrl-C without a traceback."""
    try:
        moce(prog_name="moce", standalone_mode=False)
    except MoceError as error:
        if os.environ.get("RANK", "0") == "0":
            # Names out of a file may hold what a terminal takes for commands.
            click.echo(
                "Error: " + "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(error)), err=True
            )
        sys.exit(error.status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
