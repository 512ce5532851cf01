"""What a pipeline will cost: predicted hours and memory of its runs (docs/planning.md), and the disk that it fills."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, stages_of
from moce_ds.cli.workflow.stage import Stage
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say, show
from moce_ds.data.shards import ShardSet
from moce_ds.forecast.devices import Device, find_device
from moce_ds.forecast.host_work import HostWork
from moce_ds.forecast.prediction import Prediction, advice, predict, rounded
from moce_ds.forecast.preflight import gibibytes
from moce_ds.forecast.step_cost import Machines, Work
from moce_ds.training.schedule import make_schedule
from moce_ds.training.settings import PretrainSettings

_TAR_BYTES = 1024  # header and padding of an image in a shard
_CHECKPOINT_BYTES = 12  # of a parameter: the weight and Adam's two moments, fp32
_FEATURE_BYTES = 2  # float16


@dataclass(frozen=True)
class SetOfImages:
    """The images of a pipeline: their number, mean size in a shard, and hours to write the shards (None: unknown)."""

    count: int
    stored_bytes: float
    hours: float | None = None


@dataclass(frozen=True)
class PlannedStage:
    """The cost of a stage: the prediction of a run, hours, and bytes on disk. None: not predicted."""

    name: str
    hours: float | None
    disk: float
    run: Prediction | None = None
    work: Work | None = None


def plan_pipeline(
    stages: Sequence[Stage], images: SetOfImages, machines: Machines, device: Device
) -> list[PlannedStage]:
    """The cost of the stages that take time or disk in proportion to the images.

    Raises:
        ConfigError: the batch of a run cannot be divided among the processes.
        ArtefactError: existing shards or clusters cannot be read.
    """
    return list(_planned(stages, images, machines, device))


def _planned(
    stages: Sequence[Stage], images: SetOfImages, machines: Machines, device: Device
) -> Iterator[PlannedStage]:
    configs: dict[str, Any] = {stage.name: stage.config for stage in stages}
    for name, config in configs.items():
        if name == "shards":
            yield PlannedStage(name, images.hours, images.count * (images.stored_bytes + _TAR_BYTES))
        elif name == "features":
            yield PlannedStage(name, None, images.count * configs["mae"].vit_shape.width * _FEATURE_BYTES)
        elif isinstance(config, PretrainSettings):
            work = Work.of(config)
            host = replace(HostWork.of(work, config.data, config.experts), image_bytes=images.stored_bytes)
            host = replace(host, clusters=host.clusters or configs["clusters"].num_clusters)
            run = predict(host, machines, device, make_schedule(config.optim, images.count).steps)
            disk = config.run.keep_checkpoints * work.parameters.total * _CHECKPOINT_BYTES
            yield PlannedStage(name, run.days * 24, disk, run, work)


def show_plan(words: Sequence[str], device_name: str, nodes: int, images: int | None) -> None:
    """Print the plan of `moce pipeline WORDS` on nodes of `processes` GPUs.

    Args:
        images: their number; None: those of the shard set.

    Raises:
        ConfigError: a fault in the settings of any stage, an unknown device or number of images.
    """
    pipeline = read_settings(PipelineSettings, words)
    stages, device = stages_of(pipeline), find_device(device_name)
    machines = Machines(nodes, pipeline.processes)
    check_batches(stages, machines.world_size)
    planned = plan_pipeline(stages, _images_of(pipeline.shard_set, images, device), machines, device)
    show(plan_of_pipeline_table(f"Prediction for {nodes} x {pipeline.processes} {device_name}", planned, device))
    say(*notes_on_plan(planned, device))


def _images_of(shards: Path, count: int | None, device: Device) -> SetOfImages:
    if ShardSet.recognises(shards):
        opened = ShardSet.open(shards)
        return SetOfImages(count or opened.count, float(opened.samples["size"].mean()))
    if count is None:
        raise ConfigError(f"--images: {shards} does not exist yet: give the number of images, such as 1281167.")
    return SetOfImages(count, device.host.image_bytes)


def plan_of_pipeline_table(title: str, planned: Sequence[PlannedStage], device: Device) -> Table:
    """One row for each stage, and their sum."""
    table = Table(title=title, title_justify="left")
    table.add_column("stage", style="bold")
    total = "GPU-hours" if device.asynchronous else "process-hours"
    for column in ("steps", "step", "hours", total, "memory each", "disk"):
        table.add_column(column, justify="right")
    for stage in planned:
        run = stage.run
        steps = (f"{run.steps:,}", f"{run.step * 1e3:,.0f} ms") if run else ("", "")
        cost = (_hours(run.gpu_hours), gibibytes(run.memory.total)) if run else ("", "")
        last = stage is planned[-1]
        table.add_row(stage.name, *steps, _hours(stage.hours), *cost, _gigabytes(stage.disk), end_section=last)
    hours, all_hours = sum(s.hours or 0 for s in planned), sum(s.run.gpu_hours for s in planned if s.run)
    table.add_row("sum", "", "", _hours(hours), _hours(all_hours), "", _gigabytes(sum(s.disk for s in planned)))
    return table


def notes_on_plan(planned: Sequence[PlannedStage], device: Device) -> list[str]:
    """What the numbers are; and for GPUs where memory does not suffice or the device waits, with what helps."""
    notes = ["Hours are predictions (docs/planning.md), checkpoints are those that are kept; ? is not predicted."]
    if device.asynchronous:
        notes += (
            text for stage in planned if stage.run and stage.work for text in advice(stage.work, device, [stage.run])
        )
    return list(dict.fromkeys(notes))


def _hours(value: float | None) -> str:
    if value is None:
        return "?"
    return rounded(value) if value >= 0.01 else "< 0.01"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"
