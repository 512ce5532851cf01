"""The `moce` command: the verbs of single stages (stages/), and those that run other verbs (workflow/)."""

from typing import Any

import click

from moce_ds.cli.config_verbs import config
from moce_ds.cli.stages.registry import STAGE_VERBS
from moce_ds.cli.workflow.workflow_verbs import VERBS as WORKFLOW_VERBS
from moce_ds.common.host import gpus, threads
from moce_ds.common.host.program import run_command, say, set_log_level


def _print_versions(context: click.Context, parameter: click.Parameter, wanted: Any) -> None:
    if wanted and not context.resilient_parsing:
        from moce_ds.doctor.packages import version_lines

        say(*version_lines())
        context.exit()


_version_option = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_versions,
    help="Print the versions of moce_ds and of the libraries that it computes with, and exit.",
)


@click.group(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@_version_option
@click.option("-v", "--verbose", is_flag=True, help="Log debug output, with time, rank and module.")
@click.option("-q", "--quiet", is_flag=True, help="Print only results, warnings and errors.")
def moce(verbose: bool, quiet: bool) -> None:
    """Masked autoencoders with a mixture of cluster-conditional experts.

    \b
    The stages, in order:
      shards    images -> tar shards            select    the expert for a task
      pretrain  a dense MAE (arch=mae)          export    that expert as a dense ViT
      features  its features of every image     knn       accuracy without training
      cluster   features -> clusters            probe     accuracy of a linear classifier
      pretrain  the experts (arch=moce)         finetune  train encoder and classifier
                                                report    one HTML page of a run

    `init` writes a pipeline for your own images, and `pipeline` runs all stages. `plan` predicts time and memory of a
    run on other machines. `study` runs and compares a grid of runs.

    Results go to standard output, everything else to standard error. MOCE_DEVICE=cpu in the environment hides all GPUs.
    """
    gpus.apply_choice()
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet exclude each other.")
    if verbose or quiet:
        set_log_level("debug" if verbose else "warning")


for verb in (*STAGE_VERBS.values(), *WORKFLOW_VERBS, config):
    moce.add_command(verb)


def main() -> None:
    """Entry point."""
    threads.apply_choice()
    run_command(moce, "moce")
