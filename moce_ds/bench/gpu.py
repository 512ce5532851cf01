"""`moce bench gpu`: what only a machine with GPUs shows, in one run.

For each model: the layer of experts (the cases of `moce bench layer`), a whole optimizer step, and the pause for a
checkpoint; once, the loader. With W processes, one per GPU, everything is measured with `ep_size` 1, and with `ep_size`
W if W > 1. The functions run on whatever device their processes have.

Axes: B images per process, D width, E experts, W processes.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import deepspeed
import torch
from torch import nn

from moce_ds.bench import cases
from moce_ds.bench.checkpoint import bench_checkpoint
from moce_ds.bench.layer import bench_layer
from moce_ds.bench.load import bench_load
from moce_ds.bench.timing import in_processes, interleaved, memory_and_waits
from moce_ds.bench.training_step import TrainingStep
from moce_ds.common.compat import quiet_deepspeed
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime
from moce_ds.forecast.step_cost import Work
from moce_ds.models.build import ModelSpec
from moce_ds.models.moce import MakeLayer
from moce_ds.models.settings import ExpertSettings, ModelGroups, ModelSettings, SdrSettings, TokenMoeSettings
from moce_ds.training.settings import EngineSettings, PretrainOptimSettings

Row = dict[str, Any]
Arch = Literal["mae", "moce", "token_moe"]

_PARTS = ("layer", "step", "checkpoint", "loading")
_IMAGES = 512  # that the loader reads in a round


@dataclass(frozen=True)
class GpuModel:
    """A model of the measurements; `arch` of the settings is replaced."""

    name: str
    settings: ModelSettings


MODELS = {
    "base": GpuModel("ViT-B/16", ModelSettings(vit="vit_base_patch16_224")),
    "large": GpuModel("ViT-L/16", ModelSettings(vit="vit_large_patch16_224")),
}


@dataclass(frozen=True)
class GpuSizes:
    """What is measured.

    Attributes:
        batch: images of a process.
        experts: experts of a layer, E.
        threads: decoding threads of the loader.
        repeats: rounds of each measurement; the medians count.
        images: images that the loader reads in a round.
    """

    models: tuple[GpuModel, ...]
    batch: int
    experts: int
    threads: int
    repeats: int
    images: int = _IMAGES


def bench_gpu(sizes: GpuSizes, processes: int, folder: Path) -> list[Row]:
    """Rows (part, model, name, mode, B, seconds, images per second, ratio, dropped, host waits, peak_mb).

    `part` is layer, step, checkpoint or loading. The ratio of layers and steps is their time over that of the dense
    model in the same processes; that of a checkpoint's pause is its share of a save. A case that does not fit into the
    memory has no numbers.

    Args:
        processes: W, one for each GPU; the largest number up to it that divides the experts is used.
        folder: on the disk for checkpoints.
    """
    count = max(n for n in range(1, processes + 1) if sizes.experts % n == 0)
    rows = in_processes(_alone_rows, 1, sizes, str(folder))
    for ep_size in sorted({1, count}):
        rows += in_processes(_together_rows, count, sizes, ep_size)
    return sorted(rows, key=lambda row: _PARTS.index(row["part"]))


def _alone_rows(sizes: GpuSizes, folder: str, runtime: Runtime) -> list[Row]:
    """What one process measures."""
    rows = _loading_rows(sizes, runtime)
    for model in sizes.models:
        rows += _layer_rows(sizes, model, runtime)
        rows += _checkpoint_rows(sizes, model, folder, runtime)
    return rows


def _together_rows(sizes: GpuSizes, ep_size: int, runtime: Runtime) -> list[Row]:
    """What all processes measure; the groups of one process have one `ep_size`."""
    rows = []
    for model in sizes.models:
        rows += _layer_rows(sizes, model, runtime) if ep_size > 1 else []
        rows += _step_rows(sizes, model, ep_size, runtime)
    return rows


def _layer_rows(sizes: GpuSizes, model: GpuModel, runtime: Runtime) -> list[Row]:
    """The cases of `moce bench layer`; their `ep_size` is the number of processes."""
    width = model.settings.vit_shape(None).width
    measured = ("B", "ratio", "dropped", "host_waits", "peak_mb")
    return [
        _row("layer", model, f"{row['name']}, {row['routing']}", row["mode"], **{key: row[key] for key in measured})
        for row in bench_layer([sizes.batch], [sizes.experts], [width], sizes.repeats, runtime)
    ]


def _step_rows(sizes: GpuSizes, model: GpuModel, ep_size: int, runtime: Runtime) -> list[Row]:
    """Whole optimizer steps. Each is timed in turns with the dense one, so that two models are in memory at most."""
    quiet_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    row = partial(_row, "step", model, mode=f"ep {ep_size} of {runtime.world_size}", B=sizes.batch)
    dense_name, *others = makers = _step_makers(sizes, model, ep_size, runtime)
    dense = _Built.of(makers[dense_name], runtime)
    if dense is None:
        return [row(f"{dense_name}: out of memory")]
    rows, of_dense = [], []
    for name in others:
        built = _Built.of(makers[name], runtime)
        if built is None:
            rows.append(row(f"{name}: out of memory"))
            continue
        medians = interleaved({dense_name: dense.step, name: built.step}, sizes.repeats, runtime.barrier)
        base, seconds = runtime.max(list(medians.values()))  # the slowest process counts
        of_dense.append(base)
        rows.append(row(name, **built.measures(seconds, base, sizes.batch, runtime)))
        del built
    if not of_dense:
        of_dense = runtime.max(list(interleaved({dense_name: dense.step}, sizes.repeats, runtime.barrier).values()))
    base = median(of_dense)
    return [row(dense_name, **dense.measures(base, base, sizes.batch, runtime)), *rows]


@dataclass(frozen=True)
class _Built:
    """A step that fits into the memory, and the bytes that its model, gradients and optimizer hold."""

    step: TrainingStep
    held: int

    @classmethod
    def of(cls, make: Callable[[], TrainingStep], runtime: Runtime) -> "_Built | None":
        """The step, taken once; None if there is too little memory on a rank. A collective."""
        gc.collect()  # an engine that is no longer used is in a cycle of references
        before, step = _allocated(runtime.device), None
        try:
            step = make()
            step()  # Adam's moments exist after it
        except torch.OutOfMemoryError:
            step = None
        (missing,) = runtime.max([float(step is None)])
        return None if step is None or missing else cls(step, _allocated(runtime.device) - before)

    def measures(self, seconds: float, base: float, batch: int, runtime: Runtime) -> Row:
        """The columns of a row; the process with the most memory counts."""
        transient, waits = memory_and_waits(self.step, runtime.device)
        (peak,) = runtime.max([float(self.held + transient)])
        return {
            "seconds": seconds,
            "images_per_second": batch * runtime.world_size / seconds,
            "ratio": seconds / base,
            "host_waits": waits,
            "peak_mb": peak / 2**20,
        }


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _step_makers(
    sizes: GpuSizes, model: GpuModel, ep_size: int, runtime: Runtime
) -> dict[str, Callable[[], TrainingStep]]:
    def stock(capacity: float) -> MakeLayer:
        def make_layer(make_expert: Callable[[], nn.Module], num_experts: int, shared: bool) -> nn.Module:
            width = model.settings.vit_shape(None).width
            return cases.stock_layer(make_expert, width, num_experts, ep_size, capacity)

        return make_layer

    step = partial(make_step, sizes, model, ep_size, runtime)
    return {
        "dense MAE": partial(step, "mae"),
        "MoCE": partial(step, "moce"),
        "stock DeepSpeed, no drop": partial(step, "token_moe", stock(0.0)),
        "stock DeepSpeed, capacity 1.25": partial(step, "token_moe", stock(1.25)),
        "TokenMoE, no drop": partial(step, "token_moe"),
    }


def make_step(
    sizes: GpuSizes, model: GpuModel, ep_size: int, runtime: Runtime, arch: Arch, make_layer: MakeLayer | None = None
) -> TrainingStep:
    """A step of a kind of model with the default settings of training, in bf16 on a GPU and float32 on a CPU."""
    settings = replace(model.settings, arch=arch)
    experts, shape = ExpertSettings(num=sizes.experts, ep_size=ep_size), settings.vit_shape(None)
    groups = ModelGroups(settings, experts, TokenMoeSettings(), SdrSettings(), shape)
    spec = ModelSpec(shape, settings.decoder, settings.mask_ratio, ImageInput(shape.image_size), groups.expert_shape(0))
    optim = PretrainOptimSettings(batch_size=sizes.batch * runtime.world_size)
    engine = EngineSettings(precision="bf16" if runtime.device.type == "cuda" else "fp32")
    work = Work(spec, ep_size if spec.experts else 1, optim, engine, teacher=False)
    return TrainingStep(work, experts, groups.loss_weights, runtime, make_layer)


def _checkpoint_rows(sizes: GpuSizes, model: GpuModel, folder: str, runtime: Runtime) -> list[Row]:
    rows = bench_checkpoint(model.settings, Path(folder), sizes.repeats, runtime)
    return [
        _row("checkpoint", model, row["name"], "1 process", seconds=row["seconds"], ratio=row["ratio"])
        for row in rows
        if row["name"] in ("save", "pause", "delay")
    ]


def _loading_rows(sizes: GpuSizes, runtime: Runtime) -> list[Row]:
    rows = bench_load(sizes.images, sizes.threads, sizes.repeats, runtime.device)
    return [
        _row("loading", None, row["name"], "1 process", **{key: row[key] for key in ("images_per_second", "ratio")})
        for row in rows
    ]


def _row(part: str, model: GpuModel | None, name: str, mode: str, **measured: Any) -> Row:
    columns = ("B", "seconds", "images_per_second", "ratio", "dropped", "host_waits", "peak_mb")
    head = {"part": part, "model": model.name if model else "", "name": name, "mode": mode}
    return head | {column: measured.get(column) for column in columns}
