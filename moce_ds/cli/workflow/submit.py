"""`moce launch slurm ...`: checks a verb, records the launch, and queues its jobs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moce_ds.checkpoint.run_folder import LAUNCHES
from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.launch.slurm_queue import Submitted, begin_launch, record_jobs, refuse_second, submit
from moce_ds.cli.options import FORCED
from moce_ds.cli.stages.registry import STAGE_VERBS
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_folders, keep_stages, pipeline_workflow
from moce_ds.cli.workflow.stage import Stage, Workflow
from moce_ds.cli.workflow.study import checked_cells, keep_record, study_workflow
from moce_ds.cli.workflow.study_grid import StudySettings, check_places
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import OptimSettings, PretrainSettings

JOB_VERBS = {*STAGE_VERBS, "study", "pipeline", "transfer"}
"""The verbs that a job can run."""

TUNING = ("finetune", "detect", "segment")
PARALLEL = ("shards", "pretrain", "features", "cluster", *TUNING)
"""Verbs whose work several processes share."""


def launch_on_slurm(profile: SlurmProfile, words: Sequence[str]) -> None:
    """Queue a `moce` verb with its arguments, and print the commands that show its log and state.

    Raises:
        ConfigError: the verb's settings have a fault, SLURM is not installed or refuses the job, or the same
            job is already queued.
        ArtefactError: the record of the launch cannot be written.
    """
    verb, *rest = words
    queue: Callable[[SlurmProfile, Sequence[str]], list[Submitted]]
    known = {"pretrain": _queue_pretrain, "study": _queue_study, "pipeline": _queue_pipeline}
    queue = known.get(verb) or _queue_other(verb)
    for job in queue(profile, rest):
        say(f"Job {job.job} is queued: {job.what}\n  log     tail -F {job.log}")
        say(f"  state   squeue --jobs {job.job}\n  cancel  scancel {job.job}")


def _queue_pretrain(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
    from moce_ds.training.run_checks import RequestedRun  # imports torch

    config = read_settings(PretrainSettings, _without_options(words))
    RequestedRun(config).check_folder()
    usable = usable_nodes(config.optim, config.ep_size, profile)
    command = ["pretrain", *words]
    refuse_second(config.run.out / LAUNCHES)
    folder = begin_launch(config.run.out / LAUNCHES, command, profile, config)
    return record_jobs(folder, [submit(profile, [command], folder, config.run.out.name, usable_nodes=usable)])


def _without_options(words: Sequence[str]) -> list[str]:
    """The words of settings, without `--force`: memory is checked where the run starts."""
    return [word for word in words if word != FORCED]


def usable_nodes(optim: OptimSettings, ep_size: int, profile: SlurmProfile) -> list[int]:
    """The numbers of nodes that SLURM may allocate and whose processes can share the run's batch.

    Raises:
        ConfigError: the number that the profile asks for is not one of them.
    """
    batch_arithmetic(optim, profile.nodes * profile.processes_per_node, ep_size)
    usable = []
    for nodes in profile.node_counts:
        try:
            batch_arithmetic(optim, nodes * profile.processes_per_node, ep_size)
        except ConfigError:
            continue
        usable.append(nodes)
    return usable


def _queue_study(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
    study = read_settings(StudySettings, _without_options(words))
    cells = checked_cells(study)
    check_places(study, cells)
    return _queue_workflow(study_workflow(study, cells), profile, words, study, partial(keep_record, study, cells))


def _queue_pipeline(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
    pipeline = read_settings(PipelineSettings, _without_options(words))
    workflow = pipeline_workflow(pipeline, words)
    check_folders(pipeline, workflow.stages)
    keep = partial(keep_stages, workflow.stages, pipeline.out)
    return _queue_workflow(workflow, profile, words, pipeline, keep)


def _queue_workflow(
    workflow: Workflow, profile: SlurmProfile, words: Sequence[str], config: Any, keep: Callable[[], None]
) -> list[Submitted]:
    """Queue the stages that are not done, each after those that it needs; similar stages become an array.

    Args:
        config: the settings of the workflow, recorded with the launch.
        keep: writes the workflow's record into its folder.
    """
    groups = queued_stages(workflow.stages, profile)
    refuse_second(workflow.out / LAUNCHES)
    folder = begin_launch(workflow.out / LAUNCHES, [workflow.verb, *words], profile, config)
    keep()
    say(f"{workflow.summary(workflow.stages)} in {workflow.out}.")
    jobs: list[Submitted] = []
    job_of: dict[str, str] = {}
    for group in groups:
        names = [stage.name for stage in group.stages]
        commands = [[workflow.verb, *words, f"--{workflow.noun}", name] for name in names]
        alone = len(names) == 1
        called = f"{workflow.out.name}-{names[0]}" if alone else workflow.out.name
        job = submit(
            group.profile, commands, folder, called, [job_of[name] for name in group.needs], group.usable_nodes
        )
        job_of |= dict.fromkeys(names, job.job)
        jobs.append(replace(job, what=f"{names[0]}, {job.what}") if alone else job)
        record_jobs(folder, jobs)  # at once: sbatch may refuse the next
    return jobs


@dataclass
class QueuedStages:
    """Stages that run as one job, or as an array of jobs.

    Attributes:
        profile: the size of each job.
        usable_nodes: numbers of nodes that a job can use; empty: all.
        needs: queued stages that must be done first.
    """

    profile: SlurmProfile
    usable_nodes: list[int]
    needs: list[str]
    stages: list[Stage]


def queued_stages(stages: Sequence[Stage], profile: SlurmProfile) -> list[QueuedStages]:
    """The stages that are not done, and those that need one of them, because their inputs may change.

    Raises:
        ConfigError: a stage's processes cannot share its batch.
    """
    groups: list[QueuedStages] = []
    queued: set[str] = set()
    for stage in stages:
        needs = [name for name in stage.needs if name in queued]
        if stage.is_done() and not needs:
            continue
        queued.add(stage.name)
        sized, config = stage.profile(profile), stage.config
        try:
            is_run = isinstance(config, PretrainSettings)
            usable = usable_nodes(config.optim, config.ep_size, sized) if is_run else []
        except ConfigError as error:
            raise ConfigError(f"{stage.name}: {error}") from None
        alike = next((group for group in groups if (group.profile, group.needs) == (sized, needs)), None)
        if alike is None:
            groups.append(QueuedStages(sized, usable, needs, [stage]))
        else:
            alike.stages.append(stage)
    return groups


def _queue_other(verb: str) -> Callable[[SlurmProfile, Sequence[str]], list[Submitted]]:
    if verb not in JOB_VERBS:
        raise ConfigError(f"{verb} is not a verb of moce; expected one of {', '.join(sorted(JOB_VERBS))}.")

    def queue(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
        if verb in TUNING and profile.min_nodes:
            raise ConfigError(
                f"min_nodes: {verb} runs on a fixed number of nodes, as its batch is shared; leave it out."
            )
        fitting = profile if verb in PARALLEL else profile.for_one_process()
        folder = begin_launch(Path(LAUNCHES), [verb, *words], fitting)
        return record_jobs(folder, [submit(fitting, [[verb, *words]], folder, f"moce-{verb}")])

    return queue
