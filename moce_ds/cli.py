"""The `moce` command: one verb a stage. Verbs are thin: they read the words, call the stage, and print.

Stages are imported inside the verbs, so that `moce --help` answers at once and a verb needs only its own packages.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moce_ds import __version__, threads
from moce_ds import config as configuration
from moce_ds.bench.verbs import Numbers, bench
from moce_ds.command_line import (
    PATH,
    Verb,
    force_option,
    heads_option,
    is_config_word,
    read_settings,
    run_command,
    say,
    show,
    words,
)
from moce_ds.errors import STOPPED, ConfigError
from moce_ds.place import Place
from moce_ds.text import counted
from moce_ds.transfer.verbs import VERBS as TRANSFER_VERBS
from moce_ds.tuning.dense_verbs import VERBS as DENSE_VERBS
from moce_ds.tuning.verbs import VERBS as TUNING_VERBS


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
      pretrain  the experts (arch=moce)         finetune  train encoder and classifier
                                                report    one HTML page of a run

    `pipeline` runs them all. Before a long run, `plan` says what it would take on other machines; `study` runs many, to
    compare them.
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
    say(
        f"{out}: {counted(report.count, 'image')} of {counted(len(ShardSet.open(out).classes), 'class', 'classes')} in "
        f"{counted(report.shards, 'shard')}, "
        f"{report.bytes / 2**20:.1f} MiB{' (was complete)' if report.already_complete else ''}; rejected: {rejected}"
        + (f" (listed in {out / 'rejected.jsonl'})" if report.rejected else "")
    )


@moce.command(cls=Verb, settings="moce_ds.training.settings:PretrainSettings")
@words(required=True)
@click.option("--dry-run", is_flag=True, help="Print the resolved plan and the settings, and do nothing.")
@click.option("--processes", default=None, type=click.IntRange(1), help="With --dry-run: plan for so many processes.")
@force_option()
def pretrain(words: Sequence[str], dry_run: bool, processes: int | None) -> None:
    """Pre-train a masked autoencoder: dense (model.arch=mae) or with experts (model.arch=moce).

    Runs alone, under torchrun, or with `moce launch local --nproc N pretrain ...`. The same command resumes.
    """
    from moce_ds.training.settings import PretrainSettings

    config = read_settings(PretrainSettings, words)
    if dry_run:
        from moce_ds.planning.dry_run import plan_table

        show(plan_table(config, processes or Place.here().world_size))
        say(*configuration.to_yaml(config).splitlines())
        return
    from moce_ds.planning.fitting import check_memory
    from moce_ds.runtime import started
    from moce_ds.training.loop import pretrain as run

    check_memory(config, Place.here().world_size)

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
    from moce_ds.files import check_writable, write_json, writes_to
    from moce_ds.planning import report
    from moce_ds.planning.devices import THIS, assuming, find_device
    from moce_ds.planning.prediction import predict, steps_of_run
    from moce_ds.planning.work import Machines
    from moce_ds.training.settings import PretrainSettings

    config = read_settings(PretrainSettings, words)
    if given["json_file"] is not None:
        check_writable(given["json_file"])
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
    show(report.prediction_table(config, device, assumed, predictions))
    told = [report.assumptions(config, assumed, given["moved"]), *report.advice(config, assumed, predictions)]
    say(*told)
    if measured is not None:
        show(report.error_table(predictions[0], measured))
    if given["json_file"] is not None:
        with writes_to(given["json_file"]):
            write_json(given["json_file"], report.to_record(assumed, predictions, measured))


@moce.command(cls=Verb, settings="moce_ds.models.encode_settings:FeatureSettings")
@click.argument("encoder", type=PATH)
@click.argument("shards", type=PATH)
@click.argument("out", type=PATH)
@heads_option()
@words()
def features(encoder: Path, shards: Path, out: Path, heads: int | None, words: Sequence[str]) -> None:
    """Write the features that ENCODER gives the images of SHARDS to OUT.

    ENCODER is a dense run, an exported encoder, or a .pth file of the public MAE.
    Several processes share the work. Interrupted, the same command goes on.
    """
    from moce_ds.data.shards import ShardSet
    from moce_ds.models.encode import FeatureSettings, open_encoder, write_features
    from moce_ds.runtime import started

    config = read_settings(FeatureSettings, words)
    with started() as runtime:
        opened = open_encoder(encoder, runtime.device, heads)
        if encoder.is_file():
            runtime.say(f"{encoder}: taken for {opened.provenance['taken_for']}")
        write_features(opened, ShardSet.open(shards), out, config, runtime)
        runtime.say(f"{out}: features of width {opened.shape.width}")


@moce.command(cls=Verb, settings="moce_ds.clustering.settings:ClusterSettings")
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
    show(report_table(report, compared=shards is not None))


@moce.command(cls=Verb, settings="launchers.grid:StudySettings")
@words(required=True)
@click.option("--list", "listed", is_flag=True, help="Print the cells and how far they are, and do nothing.")
@force_option()
@click.option("--cell", help="Run this cell only, such as num=4,seed=1.")
def study(words: Sequence[str], listed: bool, cell: str | None) -> None:
    """Run a grid of pre-trainings and evaluate each; `moce report OUT` shows them beside one another.

    Cells that are done are not run again, so the same command goes on after a stop, a kill or a failure.
    """
    from launchers.grid import StudySettings
    from launchers.study import run_study, states_table

    config = read_settings(StudySettings, words)
    if listed:
        show(states_table(config))
        return
    sys.exit(run_study(config, cell))


@moce.command(cls=Verb, settings="launchers.stages:PipelineSettings")
@words(required=True)
@click.option("--list", "listed", is_flag=True, help="Print the stages and how far they are, and do nothing.")
@force_option()
@click.option("--stage", help="Run this stage only, such as features.")
def pipeline(words: Sequence[str], listed: bool, stage: str | None) -> None:
    """Run all stages, from images to the experts of tasks, their evaluation and a report.

    Stages that are done are not run again, so the same command goes on after a stop, a kill or a failure.
    """
    from launchers.pipeline import run_pipeline, states_table

    if listed:
        show(states_table(words))
        return
    sys.exit(run_pipeline(words, stage))


# What follows the launched verb is the verb's own, options too.
FOREIGN: Any = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@moce.group()
def launch() -> None:
    """Run a verb in several processes: on this machine, or as a job of SLURM."""


@launch.command("local", context_settings=FOREIGN)
@click.option("--nproc", default=2, show_default=True, type=click.IntRange(1), help="Processes to start.")
@click.option("--max-restarts", default=0, show_default=True, type=click.IntRange(0), help="After a lost process.")
@click.argument("verb")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF THE VERB ...]")
def local(nproc: int, max_restarts: int, verb: str, rest: Sequence[str]) -> None:
    """Run VERB in several processes on this machine, such as pretrain."""
    from launchers.local import run_processes

    sys.exit(run_processes([sys.executable, "-m", "moce_ds", verb, *rest], nproc, max_restarts))


@launch.command("slurm", cls=Verb, settings="launchers.slurm_profile:SlurmProfile", context_settings=FOREIGN)
@click.argument("words", nargs=-1, required=True, metavar="[PROFILE.yaml] [key=value ...] VERB [ITS ARGUMENTS ...]")
def slurm(words: Sequence[str]) -> None:
    """Queue a verb as a job of SLURM: one process a GPU, on as many nodes as the profile says.

    `pretrain`, `features`, `finetune`, `detect` and `segment` use all processes. `study` becomes an array of jobs, and
    `pipeline` a chain. Other verbs run in one process. A job whose time is over, that was preempted, or that lost a
    node goes on by itself.
    """
    from launchers.launch import launch_on_slurm
    from launchers.slurm_profile import SlurmProfile

    verb = next((i for i, word in enumerate(words) if word in moce.commands or not is_config_word(word)), None)
    if verb is None:
        raise ConfigError(f"No verb follows {' '.join(words)}: name one, such as pretrain CONFIG.yaml.")
    launch_on_slurm(read_settings(SlurmProfile, words[:verb]), words[verb:])


@moce.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="The page (default: FOLDER/report.html).")
def report(folder: Path, out: Path | None) -> None:
    """Write one self-contained HTML page about a run, about a folder of runs and their results.json, or a study."""
    from moce_ds.analysis.report import build_report

    say(str(build_report(folder, out)))


@moce.command()
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and compare checksums.")
def inspect(path: Path, verify: bool) -> None:
    """Say what PATH is (shards, features, clusters, run, checkpoint, encoder, results) and what it holds."""
    from moce_ds.analysis.inspection import describe, findings

    found = findings(path) if verify else None
    unverified = ["These parts cannot be verified:", *found.unverified] if found and found.unverified else []
    if found and found.faults:  # which the description may be refused for
        say(*found.faults, *unverified)
        sys.exit(1)
    show(describe(path))
    if found:
        say(*(["No fault found.", *unverified] if unverified else ["Verified: everything is as it was written."]))


for verb in (bench, *TRANSFER_VERBS, *TUNING_VERBS, *DENSE_VERBS):
    moce.add_command(verb)


def main() -> None:
    """Entry point."""
    threads.settle()
    run_command(moce, "moce")
