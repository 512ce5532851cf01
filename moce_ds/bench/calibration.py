"""`moce plan --device this`: measures this machine as a device of a plan, and the planned step.

The device consists of the speed of single blocks, a memory copy and collectives, and of its host
(`host_calibration.py`); the step is not used for it. All but loading are timed in turns, so that other load on the
machine affects them equally.

Axes: B images of a micro-batch of a process, T tokens, D width.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moce_ds.bench.host_calibration import Loading, host_cases, images_to_load, measured_host
from moce_ds.bench.timing import in_processes, interleaved
from moce_ds.bench.training_step import TrainingStep
from moce_ds.common.config import settings as configuration
from moce_ds.common.errors import ConfigError
from moce_ds.distributed.runtime import Runtime
from moce_ds.forecast.devices import Device
from moce_ds.forecast.host_work import HostWork
from moce_ds.forecast.step_cost import Flops, Machines, Work, block_flops
from moce_ds.models.mae import make_block
from moce_ds.models.settings import ExpertSettings
from moce_ds.models.shapes import DecoderShape, LossWeights, ViTShape
from moce_ds.training.schedule import batch_arithmetic

_COPIED = 2**28  # bytes; larger than the caches
_LARGEST = 2**26  # maximum bytes of a measured collective
_ROUNDS = 9
_IN_A_ROW = 4  # passes of a block timed together, so that its caches are as warm as in a model


@dataclass(frozen=True)
class Calibration:
    """This machine as a device, and the median seconds of a step if it was measured."""

    device: Device
    step: float | None


def calibrate(
    host_work: HostWork,
    experts: ExpertSettings,
    loss_weights: LossWeights,
    nodes: Sequence[int],
    gpus: int,
    measure: bool,
) -> Calibration:
    """Calibrate a device for the shapes of a run; with `measure`, also train some steps on random images.

    Args:
        experts, loss_weights: for the measured steps.

    Raises:
        ConfigError: this machine has fewer nodes or GPUs, or the settings do not fit that many processes.
        DataError: an image of `data.shards` cannot be read.
    """
    work = host_work.work
    if list(nodes) != [1]:
        raise ConfigError(f"--nodes: got {','.join(map(str, nodes))}; --device this is one machine: use --nodes 1.")
    if torch.cuda.is_available() and gpus > torch.cuda.device_count():
        raise ConfigError(f"--gpus: got {gpus}; this machine has {torch.cuda.device_count()}.")
    batch_arithmetic(work.optim, gpus, work.ep_size)
    work.exchange(Machines(1, gpus), None)  # refuses unplannable settings before processes start
    with images_to_load(host_work.data.shards) as shards:
        measured = in_processes(_calibrate, gpus, host_work, shards, experts, loss_weights, measure)
    return Calibration(configuration.from_tree(Device, measured["device"], "calibration"), measured["step"])


def _calibrate(
    host_work: HostWork,
    shards: Path,
    experts: ExpertSettings,
    loss_weights: LossWeights,
    measure: bool,
    runtime: Runtime,
) -> dict[str, Any]:
    """Time everything in turn, all processes at once; the slowest process counts."""
    work = host_work.work
    sizes = _Sizes.of(work, runtime.world_size)
    loading = Loading.measure(host_work, shards, sizes.micro, runtime)
    cases = _parts(sizes, runtime) | host_cases(host_work, sizes.micro, runtime)
    if measure:
        cases["step"] = TrainingStep(work, experts, loss_weights, runtime)
    medians = interleaved(cases, _ROUNDS, runtime.barrier)
    seconds = dict(zip(medians, runtime.max(list(medians.values())), strict=True))
    host = measured_host(host_work, seconds, loading, sizes.micro, runtime)
    device = replace(_device(sizes, seconds, runtime), asynchronous=runtime.device.type == "cuda", host=host)
    return {"device": configuration.to_tree(device), "step": seconds.get("step")}


@dataclass(frozen=True)
class _Sizes:
    """Sizes of the measurements: blocks of these shapes on the tokens of a micro-batch, and collectives of these bytes.

    Attributes:
        micro: images of a micro-batch of a process.
        tokens: visible tokens of an image, cls included.
        bf16: whether blocks run under autocast.
        flops: of an image.
        reduced, exchanged: bytes of a reduction and of an all-to-all, about those of a step, divisible by the number of
            processes.
    """

    micro: int
    tokens: int
    shape: ViTShape
    decoder: DecoderShape
    bf16: bool
    flops: Flops
    reduced: int
    exchanged: int

    @classmethod
    def of(cls, work: Work, world_size: int) -> "_Sizes":
        """The sizes for a run in `world_size` processes."""
        spec, micro = work.spec, batch_arithmetic(work.optim, world_size, work.ep_size).micro
        tokens, shape = work.visible_tokens, spec.shape
        bf16, unit = work.engine.precision == "bf16", 4 * world_size
        reduced, exchanged = (
            max(unit, min(numbers * (2 if bf16 else 4), _LARGEST) // unit * unit)
            for numbers in (work.parameters.shared, micro * tokens * shape.width)
        )
        return cls(micro, tokens, shape, spec.decoder, bf16, work.image_flops, reduced, exchanged)


def _parts(sizes: _Sizes, runtime: Runtime) -> dict[str, Callable[[], object]]:
    """The measurements that describe a device: blocks, a copy of memory, collectives."""
    shape, decoder, micro = sizes.shape, sizes.decoder, sizes.micro
    encoder_block = make_block(shape.width, shape.heads, shape.mlp_ratio)
    decoder_block = make_block(decoder.width, decoder.heads, 4.0)
    parts: dict[str, Callable[[], object]] = {
        "encoder": _block_pass(encoder_block, (micro, sizes.tokens, shape.width), sizes.bf16, runtime),
        "decoder": _block_pass(decoder_block, (micro, shape.num_patches + 1, decoder.width), sizes.bf16, runtime),
        "copy": _copy(runtime),
        "start": _all_reduce(4, runtime),
        "reduce": _all_reduce(sizes.reduced, runtime),
        "exchange": _all_to_all(sizes.exchanged, runtime),
    }
    if runtime.device.type == "cuda":  # too little for a GPU, which waits for the host
        parts["launch"] = _block_pass(encoder_block, (1, sizes.tokens, shape.width), sizes.bf16, runtime, times=1)
    return parts


def _device(sizes: _Sizes, seconds: Mapping[str, float], runtime: Runtime) -> Device:
    shape, decoder, micro, flops = sizes.shape, sizes.decoder, sizes.micro, sizes.flops
    # Seconds of an image's blocks, each kind at its measured speed.
    encoder = flops.encoder * seconds["encoder"] / block_flops(sizes.tokens, shape.width, shape.mlp_ratio)
    decoding = flops.decoder * seconds["decoder"] / block_flops(shape.num_patches + 1, decoder.width, 4.0)
    rate = _IN_A_ROW * 3 * (flops.encoder + flops.decoder) * micro / (encoder + decoding)
    away = 1 - 1 / runtime.world_size

    def link(sent: float, took: float) -> float:
        return sent / max(took - seconds["start"], took / 2)

    bandwidth = 2 * _COPIED / seconds["copy"]
    reduces = link(2 * away * sizes.reduced, seconds["reduce"]) if away else bandwidth
    exchanges = link(away * sizes.exchanged, seconds["exchange"]) if away else bandwidth
    inside = max(reduces, exchanges)
    return Device(
        bf16=rate,
        fp32=rate,
        compute_share=1.0,
        memory=_memory(runtime),
        bandwidth=bandwidth,
        bandwidth_share=1.0,
        inside=inside,
        across=inside,
        exchange_share=exchanges / inside,
        reduce_share=reduces / inside,
        inside_latency=seconds["start"],
        across_latency=seconds["start"],
    )


def _block_pass(
    block: nn.Module, size_BTD: tuple[int, int, int], bf16: bool, runtime: Runtime, times: int = _IN_A_ROW
) -> Callable[[], None]:
    block.to(runtime.device)
    x_BTD = torch.randn(*size_BTD, device=runtime.device, requires_grad=True)
    grad_BTD = torch.randn_like(x_BTD)

    def run() -> None:
        for _ in range(times):
            block.zero_grad(set_to_none=True)
            x_BTD.grad = None
            with torch.autocast(runtime.device.type, torch.bfloat16, enabled=bf16):
                y_BTD = block(x_BTD)
            y_BTD.backward(grad_BTD.to(y_BTD.dtype))

    return run


def _copy(runtime: Runtime) -> Callable[[], object]:
    source, target = (torch.zeros(_COPIED // 4, device=runtime.device) for _ in range(2))
    return lambda: target.copy_(source)


def _all_reduce(size: int, runtime: Runtime) -> Callable[[], object]:
    tensor = torch.zeros(size // 4, device=runtime.device)
    return lambda: dist.all_reduce(tensor)


def _all_to_all(size: int, runtime: Runtime) -> Callable[[], object]:
    source, target = (torch.zeros(size // 4, device=runtime.device) for _ in range(2))
    return lambda: dist.all_to_all_single(target, source)


def _memory(runtime: Runtime) -> float:
    if runtime.device.type == "cuda":
        return float(torch.cuda.get_device_properties(runtime.device).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / runtime.world_size)
