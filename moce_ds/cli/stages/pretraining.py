"""The verbs of pre-training: pretrain, and plan, which predicts its cost."""

import sys
from collections.abc import Sequence
from typing import Any

import click

from moce_ds.cli.next_step import beside, conclude
from moce_ds.cli.options import PATH, Verb, force_option, words
from moce_ds.cli.stages.bench import Numbers
from moce_ds.common.config.command_line import settings_layers
from moce_ds.common.config.model_kinds import model_kind_of_settings
from moce_ds.common.config.printing import explained
from moce_ds.common.config.settings import checked_settings, to_tree
from moce_ds.common.errors import STOPPED, ConfigError
from moce_ds.common.host.program import say, show
from moce_ds.common.host.rank import ProcessRank


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
    from moce_ds.forecast.preflight import plan_table, started_run
    from moce_ds.forecast.step_cost import Work

    work = Work.of(config)
    if dry_run:
        title, world_size = f"{config.model.arch} -> {config.run.out}", processes or ProcessRank.here().world_size
        show(plan_table(title, work, config.data.shards, world_size))
        say(*explained(PretrainSettings, to_tree(config), layers))
        return
    from moce_ds.training.pretrain import pretrain as run

    with started_run(work, config.run.peer_timeout) as runtime:
        progress = run(config, runtime)
    if not progress.complete:
        sys.exit(STOPPED)
    kind, out = model_kind_of_settings(config.model.arch, config.experts.gate), config.run.out
    if not kind.has_experts:
        conclude(out, "features", out, config.data.shards, beside(out, "features"))
    elif kind.routes_by_cluster:
        conclude(out, "select", out, "--data", "FOLDER")
    else:
        conclude(out, "report", out)


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

    Use `--nodes 1,2,4` to compare. With --device this, the plan uses short measurements of the blocks, memory, links,
    host work and loading of this machine; --measure then trains some steps and prints the error of the prediction.
    docs/planning.md describes the model, its assumptions and errors.
    """
    from moce_ds.training.settings import PretrainSettings

    config = checked_settings(PretrainSettings, settings_layers(PretrainSettings, words))
    from moce_ds.common.storage.files import check_output, write_json, writes_to
    from moce_ds.forecast import prediction
    from moce_ds.forecast.devices import THIS, assuming, find_device
    from moce_ds.forecast.host_work import HostWork
    from moce_ds.forecast.step_cost import Machines, Work

    if options["json_file"] is not None:
        check_output(options["json_file"], "a plan", b'"device": {')
    work, moved, measured = HostWork.of(Work.of(config), config.data, config.experts), options["moved"], None
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
    say(prediction.assumptions(work, assumed, moved), *prediction.advice(work.work, assumed, predicted))
    if measured is not None:
        show(prediction.error_table(predicted[0], measured))
    if options["json_file"] is not None:
        with writes_to(options["json_file"]):
            write_json(options["json_file"], prediction.to_record(assumed, predicted, measured))
    conclude(options["json_file"], "pretrain", *words)


VERBS = (pretrain, plan)
