"""`moce bench ...`: the command line of the measurements."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from moce_ds.cli.options import PATH
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say, show


class Numbers(click.ParamType):
    """Positive numbers separated by commas: 64,128,256."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = [str(part) for part in value] if isinstance(value, list) else str(value).split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r}: expected positive numbers separated by commas, such as 64,128.", param, ctx)
        return [int(part) for part in parts]


def _json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--json",
        "json_file",
        type=PATH,
        callback=_free_for(b'"machine": {'),
        help="Write machine and rows to this file.",
    )(function)


def _free_for(mark: bytes) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """A check, before anything is measured, that a file does not exist or is from an earlier measurement."""

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        from moce_ds.common.storage.files import check_output

        if path is not None:
            check_output(path, "a measurement", mark)
        return path

    return check


def _repeats(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--repeats", default=default, show_default=True, help="Repetitions; the median is reported.")


@click.group()
def bench() -> None:
    """Measure this machine; each result is a ratio between alternatives in one run."""


@bench.command("layer")
@click.option("--batch", type=Numbers(), default="128", show_default=True, help="Images per process, B.")
@click.option("--experts", type=Numbers(), default="8", show_default=True, help="Experts per layer, E.")
@click.option("--width", type=Numbers(), default="384", show_default=True, help="Width, D.")
@click.option(
    "--processes", default=2, show_default=True, help="Processes for expert parallelism; 1: single-process cases only."
)
@click.option(
    "--starts",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Number of times that new processes are started.",
)
@click.option(
    "--plot",
    type=PATH,
    callback=_free_for(b"Software\0moce_ds"),
    help="Write a bar chart of the ratios to this PNG.",
)
@_repeats(7)
@_json_option
def layer(
    batch: list[int],
    experts: list[int],
    width: list[int],
    processes: int,
    starts: int,
    plot: Path | None,
    repeats: int,
    json_file: Path | None,
) -> None:
    """Time of an expert layer relative to a dense MLP of the same active size.

    With several sizes (--batch 64,128) the first is used while other options vary.
    """
    import torch

    from moce_ds.bench.layer import measure, plot_rows

    if torch.cuda.is_available():
        processes = min(processes, torch.cuda.device_count())
    odd = [count for count in experts if count % processes]
    if odd:
        raise ConfigError(f"--experts: {odd[0]} is not a multiple of --processes {processes}.")
    rows = measure(batch, experts, width, repeats, processes, starts)
    _show(rows, json_file)
    if plot is not None:
        plot_rows(rows, plot)


@bench.command("step")
@click.option("--batch", default=16, show_default=True, help="Images, B.")
@click.option("--experts", default=8, show_default=True, help="Experts per layer, E.")
@click.option("--width", default=192, show_default=True, help="Width of the encoder, D; a multiple of 64.")
@_repeats(15)
@_json_option
def step(batch: int, experts: int, width: int, repeats: int, json_file: Path | None) -> None:
    """Time of a training step of MoCE relative to the dense MAE.

    Two of the 12 blocks have experts.
    """
    from moce_ds.bench.layer import bench_step
    from moce_ds.distributed.runtime import lone_device

    if width % 64:
        raise ConfigError(f"--width: got {width}; expected a multiple of 64.")
    _show(bench_step(batch, experts, width, repeats, lone_device()), json_file)


@bench.command("load")
@click.option("--images", default=256, show_default=True, help="Images of 500x375 pixels.")
@click.option("--threads", default=1, show_default=True, help="Decoding threads, or worker processes.")
@_repeats(5)
@_json_option
def load(images: int, threads: int, repeats: int, json_file: Path | None) -> None:
    """Images per second of our loader, DALI's reader and a DataLoader.

    Also the time that training waits for slow storage.
    """
    from moce_ds.bench.load import bench_load
    from moce_ds.distributed.runtime import lone_device

    _show(bench_load(images, threads, repeats, lone_device()), json_file)


@bench.command("orders")
@click.option("--images", default=8192, show_default=True, type=click.IntRange(256), help="Images of 100 x 75 pixels.")
@click.option("--delay", default=5.0, show_default=True, type=click.FloatRange(0), help="Milliseconds of each read.")
@_repeats(3)
@_json_option
def orders(images: int, delay: float, repeats: int, json_file: Path | None) -> None:
    """Files per second from a slow storage, by data.order, with and without data.cache."""
    from moce_ds.bench.orders import bench_orders

    _show(bench_orders(images, delay / 1000, repeats), json_file)


@bench.command("peers")
@click.option(
    "--sizes",
    default="demo,vit-small",
    show_default=True,
    help="demo (32 px, width 96, B 128), vit-small (ViT-S/16, 224 px, B 16), or both.",
)
@click.option("--images", type=PATH, help="A folder of JPEG files for vit-small; by default they are made.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="DataLoader workers of the loop, and decoding threads of ours (default: one per core).",
)
@click.option("--quick", is_flag=True, help="One turn of each program.")
@_repeats(3)
@_json_option
def peers(
    sizes: str, images: Path | None, workers: int | None, quick: bool, repeats: int, json_file: Path | None
) -> None:
    """Images per second of `moce pretrain` relative to a plain PyTorch loop.

    The loop follows the recipe of the public MAE: torchvision transforms, DataLoader, AdamW. Every program runs whole,
    in a new process, in turns with the others. A full run takes some minutes.
    """
    from moce_ds.bench.peers import SIZES, bench_peers
    from moce_ds.common.host.threads import allowed_cpus

    chosen = [name.strip() for name in sizes.split(",")]
    if unknown := sorted(set(chosen) - set(SIZES)):
        raise ConfigError(f"--sizes: got {unknown[0]!r}; expected {', '.join(SIZES)}.")
    rows = bench_peers([SIZES[name] for name in chosen], images, workers or allowed_cpus(), 1 if quick else repeats)
    _show(rows, json_file)


@bench.command("gpu")
@click.option("--models", default="base,large", show_default=True, help="base (ViT-B/16), large (ViT-L/16), or both.")
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1), help="Images per GPU, B.")
@click.option("--experts", default=8, show_default=True, type=click.IntRange(2), help="Experts per layer, E.")
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1), help="DALI's decoding threads.")
@click.option("--folder", type=PATH, default=".", show_default=True, help="A folder on the disk for checkpoints.")
@_repeats(7)
@_json_option
def gpu(
    models: str, batch: int, experts: int, threads: int, folder: Path, repeats: int, json_file: Path | None
) -> None:
    """Expert layer, step, loading and checkpoints on the GPUs of this machine.

    Compares the dense MAE with MoCE, DeepSpeed's stock layer and TokenMoE at 224 px in bf16. With several GPUs also
    with expert parallelism over all of them. Takes about ten minutes.
    """
    import torch

    from moce_ds.bench.gpu import MODELS, GpuSizes, bench_gpu

    chosen = [name.strip() for name in models.split(",")]
    if unknown := sorted(set(chosen) - set(MODELS)):
        raise ConfigError(f"--models: got {unknown[0]!r}; expected {', '.join(MODELS)}.")
    if not torch.cuda.is_available():
        raise ConfigError("moce bench gpu needs a GPU: torch sees no CUDA device on this machine.")
    sizes = GpuSizes(tuple(MODELS[name] for name in chosen), batch, experts, threads, repeats)
    _show(bench_gpu(sizes, torch.cuda.device_count(), folder), json_file)


@bench.command("checkpoint")
@click.option("--vit", default="vit_base_patch16_224", show_default=True, help="Encoder, by timm's name.")
@click.option(
    "--processes",
    type=Numbers(),
    help="Measure a MoCE with 8 experts a layer, which as many processes share, once for each number.",
)
@click.option("--folder", type=PATH, default=".", show_default=True, help="A folder on the disk to measure.")
@_repeats(5)
@_json_option
def checkpoint(vit: str, processes: list[int] | None, folder: Path, repeats: int, json_file: Path | None) -> None:
    """Time to save and load a checkpoint, compared with the raw disk.

    Also the pause that a save makes in training. Without --processes the state is that of a dense MAE in one process.
    """
    from moce_ds.bench.checkpoint import bench_checkpoint
    from moce_ds.bench.checkpoint_exchange import EXPERTS, bench_exchange
    from moce_ds.distributed.runtime import started
    from moce_ds.models.settings import ModelSettings

    if processes:
        if odd := [count for count in processes if EXPERTS % count]:
            raise ConfigError(f"--processes: {odd[0]} does not divide the {EXPERTS} experts of a layer.")
        _show(bench_exchange(vit, processes, folder, repeats), json_file)
        return
    with started() as runtime:
        rows = bench_checkpoint(ModelSettings(vit=vit), folder, repeats, runtime)
    _show(rows, json_file)


@bench.command("scale")
@click.option("--cases", default="all", show_default=True, help="Parts to measure, separated by commas.")
@click.option(
    "--largest",
    default=1_000_000,
    show_default=True,
    type=click.IntRange(1000),
    help="Most images; reading tables is measured with up to 100 times as many.",
)
@click.option("--folder", type=PATH, default=".", show_default=True, help="A folder on the disk for the inputs.")
@_repeats(3)
@_json_option
def scale(cases: str, largest: int, folder: Path, repeats: int, json_file: Path | None) -> None:
    """Growth of time and memory with the number of images.

    Measures parts of the program on synthetic inputs, each in a new process, fits power laws to the three largest
    numbers of images, and extrapolates them to 14 million, 100 million and a billion.
    """
    from moce_ds.bench.scale import bench_scale
    from moce_ds.bench.scale_cases import CASES

    chosen = list(CASES) if cases == "all" else [name.strip() for name in cases.split(",")]
    if unknown := sorted(set(chosen) - set(CASES)):
        raise ConfigError(f"--cases: got {unknown[0]!r}; expected {', '.join(CASES)}, or all.")
    for name in chosen:
        say(f"{name}: {CASES[name].what}")
    rows, laws = bench_scale({name: CASES[name] for name in chosen}, largest, repeats, folder)
    _show(rows, json_file, laws)


def _show(rows: list[dict[str, Any]], json_file: Path | None, laws: Sequence[dict[str, Any]] = ()) -> None:
    from moce_ds.bench.timing import machine
    from moce_ds.common.storage.files import write_json, writes_to

    title = " ".join(f"{name} {value}" for name, value in machine().items() if value)
    for part, heading in ((rows, title), (laws, "laws, and their values at more images")):
        if part:
            table = Table(*part[0], title=heading, title_justify="left")
            for row in part:
                table.add_row(*map(_text, row.values()))
            show(table, width=120)
    if json_file is not None:
        found = {"machine": machine() | {"cores": os.cpu_count()}, "rows": rows}
        with writes_to(json_file):
            write_json(json_file, found | ({"laws": laws} if laws else {}))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


VERBS = (bench,)
