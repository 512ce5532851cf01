"""`moce init`: writes a pipeline file for a user's own images, and prints what its runs will cost.

The values come from the rule in `recipe.py`. The file is checked as `moce pipeline` checks it, before it is written.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moce_ds.cli.workflow.image_sample import ImageSample
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, check_folders, stages_of
from moce_ds.cli.workflow.pipeline_plan import SetOfImages, notes_on_plan, plan_of_pipeline_table, plan_pipeline
from moce_ds.cli.workflow.recipe import FEWEST, Chosen, Hardware, Images, Recipe
from moce_ds.cli.workflow.stage import Stage
from moce_ds.common.config.printing import annotated
from moce_ds.common.config.settings import from_tree, nested
from moce_ds.common.config.values import path_text
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say, show, warn
from moce_ds.common.host.threads import allowed_cpus
from moce_ds.common.storage.files import atomic_file, writes_to
from moce_ds.common.text import in_line
from moce_ds.forecast.devices import DEVICES, THIS, Device, find_device
from moce_ds.training.settings import PretrainSettings

_logger = logging.getLogger(__name__)

_USABLE = 0.9  # of a GPU's memory


@dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        path, sample: the images.
        size: of the encoder; None: by the rule.
        tasks: name and folder of each task.
        out: the file to write.
        device: of the estimate, as for `moce plan`; None: this machine without GPUs, else its GPU.
    """

    path: Path
    sample: ImageSample
    hardware: Hardware
    size: str | None
    tasks: Mapping[str, Path]
    out: Path
    device: str | None

    @property
    def images(self) -> Images:
        """The images' number and sizes."""
        return self.sample.images


def check_new(out: Path) -> None:
    """Raise ConfigError if the file to write exists."""
    if os.path.lexists(out):
        raise ConfigError(f"--out: {in_line(out)} exists already: give another name, or replace it with --replace.")


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
    device_name, device = _device(request, recipe)
    recipe = _fitting(request, recipe, device.memory) if request.hardware.gpus else recipe
    stages = _checked_stages(request, recipe)
    hours = None if request.images.seconds is None else request.images.seconds * request.images.count / 3600
    images = SetOfImages(request.images.count, request.images.stored_bytes, hours and hours / allowed_cpus())
    machines = Machines(request.hardware.nodes, request.hardware.processes)
    planned = plan_pipeline(stages, images, machines, device)
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


def _device(request: Request, recipe: Recipe) -> tuple[str, Device]:
    """The name and the description of the device of the estimate. Measures this machine if it is the device."""
    from moce_ds.forecast.host_work import HostWork
    from moce_ds.forecast.step_cost import Work

    name = request.device or (_name_of_gpu(DEVICES) if request.hardware.gpus else THIS)
    if name != THIS:
        return name, find_device(name)
    from moce_ds.bench.calibration import calibrate

    _logger.info("Measuring this machine for the estimate: some seconds.")
    config = _runs(_checked_stages(request, recipe))["moce"]
    with request.sample.as_shards() as shards:
        data = replace(config.data, shards=shards)
        work = HostWork.of(Work.of(config), data, config.experts)
        measured = calibrate(work, config.experts, config.loss_weights, [1], request.hardware.processes, measure=False)
    return "this machine", measured.device


def _name_of_gpu(known: Iterable[str]) -> str:
    """The known device that is the GPU of this machine, else the first one."""
    import torch

    name = torch.cuda.get_device_name(0).lower() if torch.cuda.is_available() else ""
    return next((device for device in known if device in name), next(iter(known)))


def _next(request: Request) -> list[str]:
    """The commands to run next."""
    out, nodes = in_line(request.out), request.hardware.nodes
    if nodes == 1:
        return [f"  moce pipeline {out}"]
    profile = f"nodes={nodes} gpus_per_node={request.hardware.gpus}"
    return [
        f"  moce config new slurm cluster.yaml {profile}   (then set partition and account in it)",
        f"  moce launch slurm cluster.yaml pipeline {out}",
    ]
