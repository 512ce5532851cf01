"""The verbs of workflows: init, which writes a pipeline, and those that run other verbs, also in several processes."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from moce_ds.cli.next_step import conclude
from moce_ds.cli.options import PATH, Verb, force_option, no_cache_option, words
from moce_ds.cli.workflow.init_verb import init
from moce_ds.common.config.command_line import is_config_word, read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import show


@click.command(cls=Verb, settings="moce_ds.cli.workflow.study_grid:StudySettings")
@words(required=True)
@click.option("--list", "listed", is_flag=True, help="Print the cells and their states, and exit.")
@force_option()
@click.option("--cell", help="Run this cell only, such as num=4,seed=1.")
def study(words: Sequence[str], listed: bool, cell: str | None) -> None:
    """Run and evaluate a grid of pre-training runs; `moce report OUT` compares them.

    Finished cells are not run again: rerun the same command after a stop, a kill or a failure.
    """
    from moce_ds.cli.workflow.study import list_study, run_study
    from moce_ds.cli.workflow.study_grid import StudySettings

    config = read_settings(StudySettings, words)
    if listed:
        show(list_study(config))
        return
    status = run_study(config, cell)
    if status == 0 and cell is None:
        conclude(config.out, "report", config.out)
    sys.exit(status)


@click.command(cls=Verb, settings="moce_ds.cli.workflow.pipeline:PipelineSettings")
@words(required=True)
@click.option("--list", "listed", is_flag=True, help="Print the stages and their states, and exit.")
@force_option()
@click.option("--stage", help="Run this stage only, such as features.")
@click.option("--plan", "device", metavar="DEVICE", help="Predict hours, memory and disk on DEVICE (see `moce plan`).")
@click.option("--nodes", default=1, type=click.IntRange(1), help="With --plan: nodes, of `processes` GPUs each.")
@click.option("--images", type=click.IntRange(1), help="With --plan: number of images, if there are no shards yet.")
def pipeline(
    words: Sequence[str], listed: bool, stage: str | None, device: str | None, nodes: int, images: int | None
) -> None:
    """Run all stages, from images to the experts of tasks, their evaluation and a report.

    Finished stages are not run again: rerun the same command after a stop, a kill or a failure.
    """
    from moce_ds.cli.workflow.pipeline import PipelineSettings, list_pipeline, run_pipeline

    if device is not None:
        from moce_ds.cli.workflow.pipeline_plan import show_plan

        show_plan(words, device, nodes, images)
        return
    if listed:
        show(list_pipeline(words))
        return
    status, out = run_pipeline(words, stage), read_settings(PipelineSettings, words).out
    if status == 0 and stage is None:
        report = out / "report.html"
        conclude(report if report.exists() else out, "pipeline", *words, "--list")
    sys.exit(status)


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--tasks", required=True, help="Names of known tasks, or YAML files: digits,my_task.yaml.")
@click.option("--config", type=PATH, help="A YAML file whose settings override those of every task.")
@click.option("--data", type=PATH, help="A folder with a folder for each task (default: data in its settings).")
@click.option("--methods", default="knn,probe", show_default=True, help="Some of knn,probe,finetune.")
@click.option("--seeds", default="0", show_default=True, help="Random seeds of probe and finetune, such as 0,1,2.")
@click.option("--out", type=PATH, help="Output folder (default: transfer in the first of RUNS).")
@no_cache_option()
def transfer(
    runs: tuple[Path, ...],
    tasks: str,
    config: Path | None,
    data: Path | None,
    methods: str,
    seeds: str,
    out: Path | None,
) -> None:
    """Compare RUNS (or folders of runs) on tasks: choose experts, tune, train and test.

    For each run and task it selects and exports an expert, tunes on validation images, trains and tests. Prints a table
    for each method at the end and keeps every number in OUT/results.json. Rerun the same command to resume, or with
    more tasks, methods or seeds to add what is missing.
    """
    from moce_ds.cli.workflow.transfer import campaign_tables, run_campaign
    from moce_ds.cli.workflow.transfer_models import find_subjects
    from moce_ds.cli.workflow.transfer_tasks import read_tasks
    from moce_ds.evaluation.results_file import RESULTS

    subjects = find_subjects(list(runs))
    read = read_tasks(_names("--tasks", tasks), config, data)
    chosen = _names("--methods", methods)
    records = run_campaign(subjects, read, chosen, _seeds(seeds), out or runs[0] / "transfer")
    for table in campaign_tables(records, [subject.name for subject in subjects]):
        show(table)
    conclude((out or runs[0] / "transfer") / RESULTS)


def _names(option: str, text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise ConfigError(f"{option}: got {text!r}; expected one name or more, with a comma between two.")
    return names


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() and len(part) < 19 for part in text.split(",")):  # 64 bits hold 18 digits
        raise ConfigError(f"--seeds: got {text!r}; expected numbers with commas between them, such as 0,1,2.")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


# Options after the launched verb belong to the verb.
FOREIGN: Any = {"allow_interspersed_args": False}


@click.group()
def launch() -> None:
    """Run a verb in several processes: on this machine, or as a SLURM job."""


@launch.command("local", context_settings=FOREIGN)
@click.option("--nproc", default=2, show_default=True, type=click.IntRange(1), help="Processes to start.")
@click.option("--max-restarts", default=0, show_default=True, type=click.IntRange(0), help="Restarts after a loss.")
@click.argument("verb")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF THE VERB ...]")
def local(nproc: int, max_restarts: int, verb: str, rest: Sequence[str]) -> None:
    """Run VERB, such as pretrain, in several processes on this machine."""
    from moce_ds.cli.launch.local import run_processes

    _check_verb(verb)
    sys.exit(run_processes([sys.executable, "-m", "moce_ds", verb, *rest], nproc, max_restarts))


@launch.command("slurm", cls=Verb, settings="moce_ds.cli.launch.slurm_profile:SlurmProfile", context_settings=FOREIGN)
@click.argument("words", nargs=-1, required=True, metavar="[PROFILE.yaml] [key=value ...] VERB [ITS ARGUMENTS ...]")
def slurm(words: Sequence[str]) -> None:
    """Queue a verb as a SLURM job with the resources of a profile: one process per GPU.

    `shards`, `pretrain`, `features`, `cluster`, `finetune`, `detect` and `segment` use all processes. `study` becomes
    an array of jobs, and `pipeline` a chain. Other verbs run in one process. A job is requeued and resumes after its
    time limit, a preemption, or the loss of a node.
    """
    from moce_ds.cli.launch.slurm_profile import SlurmProfile
    from moce_ds.cli.workflow.submit import JOB_VERBS, launch_on_slurm

    verb = next((i for i, word in enumerate(words) if word in JOB_VERBS or not is_config_word(word)), None)
    if verb is None:
        raise ConfigError(f"No verb follows {' '.join(words)}: name one, such as pretrain CONFIG.yaml.")
    _check_verb(words[verb])
    launch_on_slurm(read_settings(SlurmProfile, words[:verb]), words[verb:])


def _check_verb(verb: str) -> None:
    """Raise ConfigError if a word is not a verb, before processes or jobs are started."""
    command = click.get_current_context().find_root().command
    verbs = sorted(command.commands) if isinstance(command, click.Group) else []
    if verb not in verbs:
        near = get_close_matches(verb, verbs, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(verbs)}."
        raise ConfigError(f"{verb!r} is not a verb of moce. {hint}")


VERBS = (init, study, pipeline, transfer, launch)
