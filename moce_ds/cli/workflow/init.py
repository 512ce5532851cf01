"""`moce init`: writes a pipeline file for a user's own images, and prints what its runs will cost.

The values come from the rule in `recipe.py`. The file is checked as `moce pipeline` checks it, before it is written.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from moce_ds.cli.next_step import quoted
from moce_ds.cli.workflow.image_sample import ImageSample
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, check_folders, stages_of
from moce_ds.cli.workflow.pipeline_plan import (
    SetOfImages,
    notes_on_plan,
    plan_of_pipeline_table,
    plan_pipeline,
    this_machine,
)
from moce_ds.cli.workflow.recipe import FEWEST, Chosen, Hardware, Images, Recipe
from moce_ds.cli.workflow.stage import Stage
from moce_ds.common.config.printing import annotated
from moce_ds.common.config.settings import from_tree, nested
from moce_ds.common.config.values import path_text
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.gpus import DEVICE
from moce_ds.common.host.program import say, show, warn
from moce_ds.common.storage.files import atomic_file, writes_to
from moce_ds.common.text import counted, in_line
from moce_ds.forecast.devices import THIS, Device, device_of_gpu, find_device
from moce_ds.training.settings import PretrainSettings

_USABLE = 0.9  # of a GPU's memory
_CPUS_PER_GPU = 12  # cores of a process on a cluster, as in configs/slurm/gpu.yaml


class Gpu(NamedTuple):
    """A GPU of this machine: its name, and its memory in bytes."""

    name: str
    memory: float


@dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        path, sample: the images.
        size: of the encoder; None: by the rule.
        tasks: name and folder of each task.
        out: the file to write.
        device: of the estimate, as for `moce plan`; None: this machine without GPUs, else `gpu`.
        gpu: of this machine; None: there is none.
    """

    path: Path
    sample: ImageSample
    hardware: Hardware
    size: str | None
    tasks: Mapping[str, Path]
    out: Path
    device: str | None
    gpu: Gpu | None = None

    @property
    def images(self) -> Images:
        """The images' number and sizes."""
        return self.sample.images


def check_new(out: Path) -> None:
    """Raise ConfigError if the file to write exists."""
    if os.path.lexists(out):
        raise ConfigError(f"--out: {in_line(out)} exists already: give another name, or replace it with --replace.")


def check_gpus(gpus: int, visible: int, device: str | None) -> None:
    """Raise ConfigError if a machine with GPUs is to compute without them, since `moce pipeline` would use them.

    Args:
        visible: GPUs of this machine.
        device: as of `Request`. The file is for other machines if it is not this one.
    """
    if gpus == 0 and visible and device in (None, THIS):
        raise ConfigError(
            f"--gpus: got 0; this machine has {counted(visible, 'GPU')}, which the pipeline would use. Hide them from "
            f"both commands: `{DEVICE}=cpu moce init ...`, then `{DEVICE}=cpu moce pipeline ...`. For other machines, "
            "give --device too."
        )


def write_pipeline(request: Request) -> None:
    """Choose, check, estimate and write; prints the estimate and the next command.

    Raises:
        ConfigError: there are too few images, a task is missing, or the hardware cannot share the work.
        ArtefactError: the file cannot be written.
    """
    if request.images.count < FEWEST:
        raise ConfigError(
            f"--images: {in_line(request.path)} has {request.images.count} images; expected at least {FEWEST}, and for "
            "experts that are worth their training some thousands."
        )
    from moce_ds.forecast.step_cost import Machines

    recipe = Recipe(request.images, request.hardware, request.size)
    device_name, device = _device(request, _checked_stages(request, recipe))
    recipe = _fitting(request, recipe, device.memory) if request.hardware.gpus else recipe
    stages = _checked_stages(request, recipe)
    machines = Machines(request.hardware.nodes, request.hardware.processes)
    planned = plan_pipeline(stages, SetOfImages.of(request.images), machines, device)
    with writes_to(request.out), atomic_file(request.out) as draft:
        draft.write_text("\n".join(_lines(request, recipe)) + "\n", encoding="utf-8")
    show(plan_of_pipeline_table(f"Prediction for {request.hardware} ({device_name})", planned, device))
    say(*notes_on_plan(planned, device))
    if recipe.warning:
        warn(recipe.warning)
    if not request.tasks:
        warn("Without a task no expert is exported or measured: add tasks to the file, or give --task NAME=FOLDER.")
    say(f"{in_line(request.out)}: written. Next:", *_next(request))


def _values(request: Request, recipe: Recipe) -> Iterator[Chosen]:
    """The values of the file, in order."""
    out = Path("runs") / request.out.stem
    yield Chosen("out", path_text(out), "everything that the stages write")
    kind = "images" if request.sample.shards is None else "shards"
    yield Chosen(kind, path_text(request.path), f"{request.images.count:,} images")
    if request.tasks:
        tasks = {name: path_text(folder) for name, folder in request.tasks.items()}
        yield Chosen("tasks", tasks, "each folder has train/ and test/")
        yield Chosen("reconstruction", True, "pictures of what each expert makes of the tasks' images")
    yield Chosen("dense", True, "also train the MAE as long as the experts, to compare")
    yield Chosen("processes", request.hardware.processes, "of each machine")
    if request.hardware.nodes > 1 and request.hardware.gpus:
        for stage in ("shards", "clusters"):
            yield Chosen(f"resources.{stage}.gpus_per_node", 0, "needs no GPU")
            yield Chosen(f"resources.{stage}.cpus_per_task", 8, "")
    yield from recipe.choices()


def _lines(request: Request, recipe: Recipe) -> Iterator[str]:
    """The text of the file."""
    yield f"# Written by `moce init` for {in_line(request.path)} on {request.hardware}."
    yield "# docs/own-images.md has the rule behind the values; change any of them. `settings` holds those of"
    yield "# `moce pretrain` and `moce cluster`; `moce pipeline --help` lists the other keys."
    yield from annotated(_values(request, recipe))


def _checked_stages(request: Request, recipe: Recipe) -> list[Stage]:
    """The stages of the pipeline, checked as `moce pipeline` does. Raises ConfigError."""
    tree = nested({chosen.key: chosen.value for chosen in _values(request, recipe)})
    pipeline = from_tree(PipelineSettings, tree, str(request.out))
    stages = list(stages_of(pipeline))
    check_batches(stages, request.hardware.world_size)
    check_folders(pipeline, stages)
    return stages


def _runs(stages: list[Stage]) -> dict[str, PretrainSettings]:
    return {stage.name: stage.config for stage in stages if isinstance(stage.config, PretrainSettings)}


def _fitting(request: Request, recipe: Recipe, memory: float) -> Recipe:
    """The recipe with the fewest parts of a batch that fit into the memory of a GPU, or with single images."""
    from moce_ds.forecast.step_cost import Work

    world, most = request.hardware.world_size, recipe.batch_size // request.hardware.world_size
    while True:
        works = [Work.of(config) for config in _runs(_checked_stages(request, recipe)).values()]
        if recipe.accumulation >= most or all(work.memory(world).total < _USABLE * memory for work in works):
            return recipe
        recipe = replace(recipe, accumulation=2 * recipe.accumulation)


def _device(request: Request, stages: list[Stage]) -> tuple[str, Device]:
    """The name and the description of the device of the estimate. Measures this machine if it is the device."""
    if request.device is None and request.hardware.gpus:
        return device_of_gpu(*(request.gpu or ("", None)))
    name = request.device or THIS
    if name == THIS:
        return "this machine", this_machine(stages, request.sample, request.hardware.processes)
    return name, find_device(name)


def _next(request: Request) -> list[str]:
    """The commands to run next."""
    hardware, run = request.hardware, ("pipeline", request.out)
    if hardware.nodes == 1:
        hidden = f"{DEVICE}=cpu " if not hardware.gpus and os.environ.get(DEVICE) == "cpu" else ""
        return [f"  {hidden}{quoted(*run)}"]
    each = hardware.processes
    of_node = {"gpus_per_node": hardware.gpus} if hardware.gpus else {"tasks_per_node": each}
    profile = {"nodes": hardware.nodes, **of_node}
    profile["cpus_per_task"] = _CPUS_PER_GPU if hardware.gpus else max(1, hardware.cores // each)
    values = [f"{key}={value}" for key, value in profile.items()]
    return [
        f"  {quoted('config', 'new', 'slurm', 'cluster.yaml', *values)}   # then set partition and account in it",
        f"  {quoted('launch', 'slurm', 'cluster.yaml', *run)}",
    ]
