"""`moce pipeline CONFIG`: all stages from images to a report, as steps that run one after the other."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moce_ds.artefacts.pipeline_folder import StagesRecord
from moce_ds.config.words import read_settings
from moce_ds.console import say
from moce_ds.errors import ConfigError, MoceError
from moce_ds.host.place import Place
from moce_ds.workflow.engine import Failure, Progress, StepError, run_steps, states_table
from moce_ds.workflow.pipeline_stages import PipelineSettings, check_batches, check_folders, pipeline_workflow
from moce_ds.workflow.step import Step, Workflow, perform

_logger = logging.getLogger(__name__)


def run_pipeline(words: Sequence[str], only: str | None = None) -> int:
    """Run all stages that are not done, in order, or `only` one; returns the exit status (STOPPED: as asked).

    Several of these at once share the stages: one that another process runs is waited for. Where torchrun or a job has
    started this process, it is one of those that share the stage.

    Args:
        words: as of `moce pipeline`, which the processes of a parallel stage are started with.

    Raises:
        ConfigError: before anything is run: a fault in the settings of any stage, a folder that is missing or holds
            another run, or a stage that is not to be run yet.
        StepError: a stage failed; those that follow were not run.
    """
    pipeline = read_settings(PipelineSettings, words)
    workflow = pipeline_workflow(pipeline, words)
    stages = workflow.steps
    chosen = stages if only is None else [_in_turn(workflow, only)]
    _check_processes(chosen)
    check_folders(pipeline, stages)
    if only is not None and chosen[0].parallel and "RANK" in os.environ:
        _share(chosen[0])
        return 0
    check_batches(chosen, pipeline.processes)
    keep_stages(stages, pipeline.out)
    outcome = run_steps(chosen, Progress(workflow))
    for stage in outcome.stopped:
        _logger.info(f"Stopped as asked in stage {stage.name}. Rerun the same command to resume.")
    for failure in outcome.failures:
        if not failure.shown:
            raise StepError("stage", failure)
    if outcome.status == 0:
        say(f"{workflow.summary(stages)} in {pipeline.out}.")
    return outcome.status


def list_pipeline(words: Sequence[str]) -> Table:
    """The stages and how far they are. Raises ConfigError for a fault in the settings of any."""
    pipeline = read_settings(PipelineSettings, words)
    return states_table(pipeline_workflow(pipeline), f"{pipeline.images or pipeline.shards} -> {pipeline.out}")


def keep_stages(stages: Sequence[Step], out: Path) -> None:
    """Record the order of the stages and what each makes, for whoever verifies the folder. Raises ArtefactError."""
    makes: dict[str, list[str]] = {
        stage.name: [str(place.relative_to(out) if place.is_relative_to(out) else place) for place in stage.outputs]
        for stage in stages
    }
    StagesRecord(makes).write(out)


def _share(stage: Step) -> None:
    """Run a stage as one of its processes. Raises StepError in the first one, else MoceError."""
    try:
        perform(stage)
    except MoceError as error:
        if Place.here().rank:
            raise
        raise StepError("stage", Failure(stage, str(error), error.status)) from None


def _in_turn(workflow: Workflow, name: str) -> Step:
    """The stage of that name, those before it being done. Raises ConfigError."""
    stage = workflow.named(name)
    before = workflow.steps[: workflow.steps.index(stage)]
    waiting = next((earlier.name for earlier in before if not earlier.is_done()), None)
    if waiting is not None:
        raise ConfigError(f"--stage: {name} comes after {waiting}, which is not done: run --stage {waiting} first.")
    return stage


def _check_processes(chosen: Sequence[Step]) -> None:
    """Raise ConfigError if a launcher has started several processes for what they cannot share."""
    here = Place.here().world_size
    if here > 1 and not (len(chosen) == 1 and chosen[0].parallel):
        what = chosen[0].name if len(chosen) == 1 else "the whole pipeline"
        raise ConfigError(f"This is one of {here} processes, and {what} runs in one. Name a stage that they share.")
