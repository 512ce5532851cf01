"""`moce launch slurm ...`: what a verb needs of a job, checked and recorded before anything is queued."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import dropwhile, groupby
from pathlib import Path

from moce_ds.checkpoint.run_layout import LAUNCHES
from moce_ds.cli.options import FORCED
from moce_ds.cli.verbs import STAGE_VERBS
from moce_ds.config.settings import from_tree, to_tree
from moce_ds.config.words import read_settings
from moce_ds.console import say
from moce_ds.errors import ConfigError
from moce_ds.launch.slurm_profile import SlurmProfile
from moce_ds.launch.slurm_queue import Submitted, submit
from moce_ds.launch.snapshot import begin_launch, record_jobs, refuse_second
from moce_ds.text import counted
from moce_ds.training.settings import PretrainSettings, batch_arithmetic
from moce_ds.workflow.pipeline_stages import PipelineSettings, check_batches, check_folders, stages_of
from moce_ds.workflow.stage import Stage
from moce_ds.workflow.study import keep_record
from moce_ds.workflow.study_cell import is_done
from moce_ds.workflow.study_grid import Cell, StudySettings, cells_of, check_places, check_settings

JOB_VERBS = {*STAGE_VERBS, "study", "pipeline", "transfer"}
"""What a job can run."""

TUNING = ("finetune", "detect", "segment")
PARALLEL = ("pretrain", "features", *TUNING)
"""Verbs whose work several processes share."""


def launch_on_slurm(profile: SlurmProfile, words: Sequence[str]) -> None:
    """Queue a `moce` verb with its arguments, and say where to look.

    Raises:
        ConfigError: a fault in the verb's settings, SLURM is not here or refuses the job, or it has one in the queue.
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
    from moce_ds.training.run_checks import check_run  # brings DeepSpeed along

    config = read_settings(PretrainSettings, _without_options(words))
    check_run(config)
    usable = usable_nodes(config, profile)
    command = ["pretrain", *words]
    refuse_second(config.run.out / LAUNCHES)
    folder = begin_launch(config.run.out / LAUNCHES, command, profile, config)
    return record_jobs(folder, [submit(profile, [command], folder, config.run.out.name, usable_nodes=usable)])


def _without_options(words: Sequence[str]) -> list[str]:
    """The words of settings; whether a run fits into memory is looked at where it starts."""
    return [word for word in words if word != FORCED]


def usable_nodes(config: PretrainSettings, profile: SlurmProfile) -> list[int]:
    """Numbers of nodes, of those that SLURM may give, whose processes can share the run's batch.

    Raises:
        ConfigError: the number that the profile asks for is not one of them.
    """
    batch_arithmetic(config, profile.nodes * profile.processes_per_node)
    usable = []
    for nodes in profile.node_counts:
        try:
            batch_arithmetic(config, nodes * profile.processes_per_node)
        except ConfigError:
            continue
        usable.append(nodes)
    return usable


def _queue_study(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
    """An array of jobs for the cells of each size that are not done."""
    study = read_settings(StudySettings, _without_options(words))
    cells = cells_of(study)
    check_settings(cells)
    check_places(study, cells)
    refuse_second(study.out / LAUNCHES)
    folder = begin_launch(study.out / LAUNCHES, ["study", *words], profile, study)
    keep_record(study, cells)
    pending = sorted((cell for cell in cells if not is_done(study, cell)), key=_size)
    if not pending:
        say(f"{len(cells)} of {counted(len(cells), 'cell')} done in {study.out}.")
    jobs = []
    for (nodes, processes), group in groupby(pending, _size):
        gpus = processes if profile.gpus_per_node else 0
        sized = replace(profile, nodes=nodes, min_nodes=None, tasks_per_node=processes, gpus_per_node=gpus)
        commands = [["study", *words, "--cell", cell.name] for cell in group]
        jobs.append(submit(sized, commands, folder, study.out.name))
    return record_jobs(folder, jobs)


def _size(cell: Cell) -> tuple[int, int]:
    return cell.nodes, cell.processes


def _queue_pipeline(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
    """A chain of jobs: each stage that is not done, after the one before it has succeeded."""
    pipeline = read_settings(PipelineSettings, _without_options(words))
    stages = stages_of(pipeline)
    check_folders(pipeline, stages)
    queued = queued_stages(profile, pipeline, stages)
    refuse_second(pipeline.out / LAUNCHES)
    folder = begin_launch(pipeline.out / LAUNCHES, ["pipeline", *words], profile, pipeline)
    skipped = [stage.name for stage in stages[: len(stages) - len(queued)]]
    say(f"Done in {pipeline.out}: {', '.join(skipped) or 'no stage'}.")
    jobs: list[Submitted] = []
    for stage, sized, usable in queued:
        command, after = ["pipeline", *words, "--stage", stage.name], [job.job for job in jobs[-1:]]
        job = submit(sized, [command], folder, f"{pipeline.out.name}-{stage.name}", after, usable)
        jobs.append(replace(job, what=f"{stage.name}, {job.what}"))
        record_jobs(folder, jobs)  # at once: sbatch may refuse the next
    return jobs


def queued_stages(
    profile: SlurmProfile, pipeline: PipelineSettings, stages: Sequence[Stage]
) -> list[tuple[Stage, SlurmProfile, list[int]]]:
    """What a pipeline queues: the first stage that is not done and all after it, which may change with it.

    Each comes with its profile and the numbers of nodes that it can use (none: all). Raises ConfigError.
    """
    queued = []
    for stage in dropwhile(Stage.is_done, stages):
        changes = pipeline.resources.get(stage.name, {})
        sized = from_tree(SlurmProfile, to_tree(profile) | changes, f"resources.{stage.name}")
        sized = sized if stage.parallel else sized.for_one_process()
        check_batches([stage], sized.nodes * sized.processes_per_node)
        usable = usable_nodes(stage.config, sized) if isinstance(stage.config, PretrainSettings) else []
        queued.append((stage, sized, usable))
    return queued


def _queue_other(verb: str) -> Callable[[SlurmProfile, Sequence[str]], list[Submitted]]:
    if verb not in JOB_VERBS:
        raise ConfigError(f"{verb} is no verb of moce; expected one of {', '.join(sorted(JOB_VERBS))}.")

    def queue(profile: SlurmProfile, words: Sequence[str]) -> list[Submitted]:
        if verb in TUNING and profile.min_nodes:
            raise ConfigError(
                f"min_nodes: {verb} runs on a fixed number of nodes, as its batch is shared; leave it out."
            )
        fitting = profile if verb in PARALLEL else profile.for_one_process()
        folder = begin_launch(Path(LAUNCHES), [verb, *words], fitting)
        return record_jobs(folder, [submit(fitting, [[verb, *words]], folder, f"moce-{verb}")])

    return queue
