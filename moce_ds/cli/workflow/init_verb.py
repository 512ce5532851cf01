"""The verb `moce init`: its flags, and the questions that it asks on a terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moce_ds.cli.options import PATH
from moce_ds.cli.workflow.recipe import SIZES, Hardware, Recipe
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say

if TYPE_CHECKING:
    from moce_ds.cli.workflow.init import Gpu

_OUT = Path("pipeline.yaml")


class _Task(click.ParamType):
    """A name and a folder, NAME=FOLDER."""

    name = "task"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, sign, folder = value.partition("=")
        if not sign or not name:
            raise ConfigError(f"--task: got {value!r}; expected NAME=FOLDER, a folder with train/ and test/.")
        return name, PATH.convert(folder, param, ctx)


@click.command()
@click.option("--images", type=PATH, help="Folder of images, or any SOURCE of `moce shards`, or a shard set.")
@click.option("--gpus", type=click.IntRange(0), help="GPUs of each node, 0: CPUs  [default: those of this machine].")
@click.option("--nodes", type=click.IntRange(1), help="Nodes  [default: 1].")
@click.option("--size", type=click.Choice(list(SIZES)), help="Size of the encoder  [default: by a rule].")
@click.option("--task", "tasks", type=_Task(), multiple=True, metavar="NAME=FOLDER", help="A task; repeatable. FOLDER "
              "holds train/ and test/, of images in folders of their classes.")  # fmt: skip
@click.option("--out", type=PATH, help=f"The file to write  [default: {_OUT}].")
@click.option("--device", help="For the estimate: a --device of `moce plan`  [default: that of this machine].")
@click.option("--replace", is_flag=True, help="Replace an existing file.")
def init(
    images: Path | None,
    gpus: int | None,
    nodes: int | None,
    size: str | None,
    tasks: Sequence[tuple[str, Path]],
    out: Path | None,
    device: str | None,
    replace: bool,
) -> None:
    """Write a pipeline file for your own images, and print what it will cost.

    Without --images it asks for what is not given. A rule chooses the values from the number and size of the images and
    from the hardware (docs/own-images.md); each value has its reason beside it. Nothing is trained.
    """
    from moce_ds.cli.workflow.image_sample import ImageSample
    from moce_ds.cli.workflow.init import Request, check_gpus, check_new, write_pipeline
    from moce_ds.common.host.threads import allowed_cpus

    asks = images is None
    images = images or _asked_images()
    if out is not None and not replace:
        check_new(out)
    sample = ImageSample.of(images)
    found = sample.images
    say(f"{images}: {found.count:,} images, shorter sides of {found.side} pixels (median)")
    visible = _visible_gpus()
    gpus = _answer(gpus, asks, "GPUs of each node, 0 for CPUs", visible, click.IntRange(0))
    check_gpus(gpus, visible, device)
    nodes = _answer(nodes, asks, "Nodes", 1, click.IntRange(1))
    hardware = Hardware(nodes, gpus, allowed_cpus())
    if asks:
        usual = Recipe(found, hardware).vit
        chosen = _answer(size, asks, "Size of the encoder", usual, click.Choice(list(SIZES)))
        size = None if chosen == usual else chosen
        tasks = tasks or _asked_tasks()
    out = _answer(out, asks, "File to write", _OUT, PATH)
    if not replace:
        check_new(out)
    write_pipeline(Request(images, sample, hardware, size, dict(tasks), out, device, _first_gpu(visible)))


def _answer(given: Any, asks: bool, question: str, default: Any, kind: click.ParamType) -> Any:
    """What is given, or else the answer to a question, or the default."""
    if given is not None:
        return given
    return _asked(question, default, kind) if asks else default


def _asked(question: str, default: Any, kind: click.ParamType) -> Any:
    return click.prompt(question, default=default, type=kind, err=True)


def _asked_images() -> Path:
    """The images, which have no default. Raises ConfigError without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "--images: not given, and this is no terminal to ask on. Give --images FOLDER; --gpus, --nodes, --size, "
            "--task and --out have defaults (moce init --help)."
        )
    path: Path = _asked("Folder of images", None, PATH)
    return path


def _asked_tasks() -> list[tuple[str, Path]]:
    """Tasks until an empty answer."""
    tasks: list[tuple[str, Path]] = []
    while answer := click.prompt("Task, NAME=FOLDER (empty: no more)", default="", show_default=False, err=True):
        tasks.append(_Task().convert(answer, None, None))
    return tasks


def _visible_gpus() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count()


def _first_gpu(visible: int) -> "Gpu | None":
    """The first of the visible GPUs."""
    if not visible:
        return None
    import torch

    from moce_ds.cli.workflow.init import Gpu

    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, float(found.total_memory))
