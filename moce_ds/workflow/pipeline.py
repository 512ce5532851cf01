"""All stages from images to a report: `moce pipeline CONFIG`. Stages that are done stay; the same command goes on."""

import logging
import os
import sys
from collections.abc import Sequence

import click
from rich.table import Table

from moce_ds.config.words import read_settings
from moce_ds.console import say
from moce_ds.errors import STOPPED, ConfigError
from moce_ds.host.place import Place
from moce_ds.storage.locks import is_held
from moce_ds.text import counted, in_line
from moce_ds.workflow.pipeline_stages import PipelineSettings, check_batches, check_folders, stages_of
from moce_ds.workflow.stage import Stage, keep_stages, run_stage, share_stage

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
        StageError: a stage failed; those that follow were not run.
    """
    pipeline = read_settings(PipelineSettings, words)
    stages = stages_of(pipeline)
    chosen = stages if only is None else [_in_turn(stages, only)]
    _check_processes(chosen)
    check_folders(pipeline, stages)
    if only is not None and chosen[0].parallel and "RANK" in os.environ:
        share_stage(chosen[0])
        return 0
    check_batches(chosen, pipeline.processes)
    keep_stages(stages, pipeline.out)
    for stage in chosen:
        place = f"stage {stages.index(stage) + 1} of {len(stages)} {stage.name}"
        status = _run(stage, words, pipeline.processes, place)
        if status == STOPPED:
            _logger.info(f"Stopped as asked in stage {stage.name}. Rerun the same command to resume.")
        if status:
            return status
    done = sum(stage.is_done() for stage in stages)
    say(f"{done} of {counted(len(stages), 'stage')} done in {pipeline.out}.")
    return 0


def states_table(words: Sequence[str]) -> Table:
    """The stages and how far they are. Raises ConfigError for a fault in the settings of any."""
    pipeline = read_settings(PipelineSettings, words)
    table = Table(title=in_line(f"{pipeline.images or pipeline.shards} -> {pipeline.out}"), title_justify="left")
    for heading, justify in (("stage", "left"), ("state", "left"), ("since", "left"), ("seconds", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for stage in stages_of(pipeline):
        record = stage.record()
        state: str = "waiting" if record is None else record.state
        if state == "done" and not stage.is_done():
            state = "changed"
        if is_held(stage.lock):
            state = "running"
        seconds = f"{record.seconds:.0f}" if record and record.seconds else ""
        table.add_row(stage.name, state, record.at if record else "", seconds)
    return table


def _in_turn(stages: Sequence[Stage], name: str) -> Stage:
    """The stage of that name, those before it being done. Raises ConfigError."""
    names = [stage.name for stage in stages]
    if name not in names:
        raise ConfigError(f"--stage: the pipeline has no stage {name}; it has {', '.join(names)}.")
    *before, stage = stages[: names.index(name) + 1]
    waiting = next((earlier.name for earlier in before if not earlier.is_done()), None)
    if waiting is not None:
        raise ConfigError(f"--stage: {name} comes after {waiting}, which is not done: run --stage {waiting} first.")
    return stage


def _check_processes(chosen: Sequence[Stage]) -> None:
    """Raise ConfigError if a launcher has started several processes for what they cannot share."""
    here = Place.here().world_size
    if here > 1 and not (len(chosen) == 1 and chosen[0].parallel):
        what = chosen[0].name if len(chosen) == 1 else "the whole pipeline"
        raise ConfigError(f"This is one of {here} processes, and {what} runs in one. Name a stage that they share.")


def _run(stage: Stage, words: Sequence[str], processes: int, place: str) -> int:
    """Run a stage unless it is done, saying so; returns 0 or its status."""
    if is_held(stage.lock):
        _logger.info(f"{place} waits for the process that runs it")
    elif stage.is_done():
        _logger.info(f"{place} is done")
        return 0
    else:
        _logger.info(f"{place}{f' in {processes} processes' if stage.parallel else ''} ...")
    shared = [sys.executable, "-m", "moce_ds", "pipeline", *words, "--stage", stage.name]
    try:
        status = run_stage(stage, shared, processes)
    except (KeyboardInterrupt, click.Abort):  # click makes the one into the other
        return STOPPED
    if status == 0 and (record := stage.record()):
        _logger.info(f"{place} done in {record.seconds:.0f} s")
    return status
