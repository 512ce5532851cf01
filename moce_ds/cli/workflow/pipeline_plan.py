"""What a pipeline will cost: predicted hours and memory of its runs (docs/planning.md), and the disk that it fills."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from moce_ds.cli.workflow.image_sample import ImageSample
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, stages_of
from moce_ds.cli.workflow.recipe import Images
from moce_ds.cli.workflow.stage import Stage
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say, show
from moce_ds.common.host.threads import allowed_cpus
from moce_ds.common.text import counted
from moce_ds.data.shards import ShardSet
from moce_ds.forecast.devices import THIS, Device, find_device
from moce_ds.forecast.host_work import HostWork
from moce_ds.forecast.prediction import Prediction, advice, predict, rounded
from moce_ds.forecast.preflight import gibibytes
from moce_ds.forecast.step_cost import Machines, Work
from moce_ds.training.schedule import make_schedule
from moce_ds.training.settings import PretrainSettings

_logger = logging.getLogger(__name__)

_PLAN = "--plan"
_TAR_BYTES = 1024  # header and padding of an image in a shard
_CHECKPOINT_BYTES = 12  # of a parameter: the weight and Adam's two moments, fp32
_FEATURE_BYTES = 2  # float16


@dataclass(frozen=True)
class SetOfImages:
    """The images of a pipeline: their number, mean size in a shard, and hours to write the shards (None: unknown)."""

    count: int
    stored_bytes: float
    hours: float | None = None

    @classmethod
    def of(cls, images: Images, count: int | None = None) -> "SetOfImages":
        """Images that were counted and examined here, or `count` such images."""
        count = count or images.count
        hours = None if images.seconds is None else images.seconds * count / 3600 / allowed_cpus()
        return cls(count, images.stored_bytes, hours)


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
        device_name: of the table, a YAML file, or THIS, which measures this machine.
        images: their number; None: those of the shard set, or else of `images` of the pipeline.

    Raises:
        ConfigError: a fault in the settings of any stage, an unknown device or number of images.
        DataError: the images cannot be read.
    """
    pipeline = read_settings(PipelineSettings, words)
    stages = stages_of(pipeline)
    machines = Machines(nodes, pipeline.processes)
    check_batches(stages, machines.world_size)
    title = f"Prediction for {nodes} x {pipeline.processes} {device_name}"
    if device_name == THIS:
        check_here(nodes, pipeline.processes, torch.cuda.device_count())
        title = f"Prediction for {counted(pipeline.processes, 'process', 'processes')} of this machine"
        made = ShardSet.recognises(pipeline.shard_set)
        sample = ImageSample.of(pipeline.shard_set if made else pipeline.images or pipeline.shard_set)
        device, set_of_images = this_machine(stages, sample, pipeline.processes), SetOfImages.of(sample.images, images)
    else:
        device = find_device(device_name, flag=_PLAN)
        set_of_images = _images_of(pipeline, images, device)
    planned = plan_pipeline(stages, set_of_images, machines, device)
    show(plan_of_pipeline_table(title, planned, device))
    say(*notes_on_plan(planned, device))


def check_here(nodes: int, processes: int, gpus: int) -> None:
    """Raise ConfigError if a pipeline uses more than this machine and its GPUs."""
    if nodes > 1:
        raise ConfigError(f"--nodes: got {nodes}; {_PLAN} {THIS} is one machine: leave it out, or name a device.")
    if gpus and processes > gpus:
        raise ConfigError(
            f"{_PLAN}: got {THIS}; the pipeline has processes={processes}, and this machine {counted(gpus, 'GPU')}: "
            f"name a device, or set processes={gpus}."
        )


def this_machine(stages: Sequence[Stage], sample: ImageSample, processes: int) -> Device:
    """This machine as a device, measured in some seconds with the shapes of the run with experts.

    Args:
        sample: images to load.

    Raises:
        ConfigError: there are fewer GPUs than processes.
        DataError: an image cannot be read.
    """
    from moce_ds.bench.calibration import calibrate  # imports the training code

    _logger.info("Measuring this machine for the estimate: some seconds.")
    config = next(stage.config for stage in stages if stage.name == "moce")
    with sample.as_shards() as shards:
        data = replace(config.data, shards=shards)
        work = HostWork.of(Work.of(config), data, config.experts)
        return calibrate(work, config.experts, config.loss_weights, [1], processes, measure=False).device


def _images_of(pipeline: PipelineSettings, count: int | None, device: Device) -> SetOfImages:
    shards = pipeline.shard_set
    if ShardSet.recognises(shards):
        opened = ShardSet.open(shards)
        return SetOfImages(count or opened.count, float(opened.samples["size"].mean()))
    if count is not None:
        return SetOfImages(count, device.host.image_bytes)
    if pipeline.images is not None and pipeline.images.exists():
        return SetOfImages.of(ImageSample.of(pipeline.images).images)
    raise ConfigError(f"--images: {shards} does not exist yet: give the number of images, such as 1281167.")


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
