"""Before a run starts: its plan (`--dry-run`), and whether it fits into the memory of this machine."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from moce_ds.common.errors import ConfigError
from moce_ds.common.host.machine import control_groups
from moce_ds.data.shards import ShardSet
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.forecast.step_cost import Work
from moce_ds.models.shapes import ExpertShape
from moce_ds.training.schedule import batch_arithmetic, make_schedule
from moce_ds.training.settings import OptimSettings

FORCE = "MOCE_FORCE"
"""The environment variable by which `--force` reaches the processes of a run."""

_LIMITS = ("memory.max", "memory.limit_in_bytes")


def plan_table(title: str, work: Work, shards: Path, world_size: int) -> Table:
    """Parameters, tokens, batches, steps, memory and the placement of experts as a table.

    Raises:
        ConfigError: the batch cannot be divided.
    """
    batches = batch_arithmetic(work.optim, world_size, work.ep_size)
    count, shape, experts, needed = work.parameters, work.spec.shape, work.spec.experts, work.memory(world_size)
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "encoder", f"{shape.depth} blocks, width {shape.width}, {shape.heads} heads, patch {shape.patch_size}"
    )
    table.add_row("parameters", f"total {_millions(count.total)}, active {_millions(count.active)}, encoder "
                  f"{_millions(count.encoder)}; a process holds {_millions(count.held)}")  # fmt: skip
    table.add_row("tokens", f"{shape.num_patches} patches, {work.visible_tokens - 1} visible + cls in the encoder")
    table.add_row("batch", f"{batches.global_batch} = {world_size} processes x {batches.accumulation} parts x "
                  f"{batches.micro} images")  # fmt: skip
    table.add_row("steps", _steps(shards, work.optim))
    table.add_row("memory", f"about {gibibytes(needed.state)} state + {gibibytes(needed.activations)} activations + "
                  f"{gibibytes(needed.buffers)} for reductions a process")  # fmt: skip
    if experts is not None:
        table.add_row("experts", _placement(experts, work.ep_size, world_size))
    table.add_row("precision", f"{work.engine.precision}, ZeRO {work.engine.zero_stage}")
    return table


def _steps(shards: Path, optim: OptimSettings) -> str:
    if not ShardSet.recognises(shards):
        return f"unknown: {shards} does not exist yet"
    count = ShardSet.open(shards).count
    schedule = make_schedule(optim, count)
    return (
        f"{schedule.steps} = {optim.epochs:g} epochs of {count} images; {schedule.warmup_steps} of warm-up; "
        f"peak learning rate {schedule.peak_lr:.2e}"
    )


def _placement(experts: ExpertShape, ep_size: int, world_size: int) -> str:
    local = experts.num_experts // ep_size
    held = [f"rank {r}: {r * local}" + (f"-{(r + 1) * local - 1}" if local > 1 else "") for r in range(min(ep_size, 8))]
    more = ", ..." if ep_size > 8 else ""
    copies = world_size // ep_size
    return (
        f"{experts.num_experts} in each of blocks {', '.join(map(str, experts.layers))}; "
        f"{', '.join(held)}{more}; {copies} {'copy' if copies == 1 else 'copies'} of each"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} K"


@contextmanager
def started_run(work: Work, peer_timeout: float) -> Iterator[Runtime]:
    """Join the process group for the length of the block, unless the run does not fit into the memory; a collective.

    Raises:
        ConfigError: as `check_memory`, on every process, and as `started`.
        LostPeerError: as `started`.
    """
    with started(peer_timeout) as runtime:
        with runtime.raise_on_all_ranks():
            check_memory(work, runtime.world_size, runtime.device)
        yield runtime


def check_memory(work: Work, world_size: int, device: torch.device) -> None:
    """Refuse a run whose memory estimate exceeds what this machine has.

    The limit is the memory of the GPU `device` per process, or the host memory for all processes on it
    (LOCAL_WORLD_SIZE; if unset, all `world_size`).

    Raises:
        ConfigError: the run does not fit, with the settings that would help; or the batch cannot be divided.
    """
    if os.environ.get(FORCE):
        return
    on_gpu, local = device.type == "cuda", os.environ.get("LOCAL_WORLD_SIZE", "")
    local_size = min(world_size, int(local)) if local.isdecimal() and int(local) else world_size
    memory = _device_memory(device) if on_gpu else host_memory() / local_size
    needed = _needed(work, world_size, on_gpu)
    if needed <= memory:
        return
    helpful = remedies(work, lambda changed: _needed(changed, world_size, on_gpu), memory, world_size)
    share = f", its share for {local_size} processes" if local_size > 1 and not on_gpu else ""
    raise ConfigError(
        f"The run needs about {gibibytes(needed)} of memory per process; {'the GPU' if on_gpu else 'this machine'} has "
        f"{gibibytes(memory)}{share}. {helpful or 'No setting alone helps: use more or larger machines'}. "
        "`moce plan` predicts other machines; --force starts the run anyway."
    )


def _needed(work: Work, world_size: int, on_gpu: bool) -> float:
    """Bytes of one process. On a host only the part of a reduction buffer that gradients fill counts."""
    needed = work.memory(world_size)
    if on_gpu:
        return needed.total
    return needed.state + needed.activations + min(needed.buffers, 8 * work.parameters.held)


def remedies(work: Work, need: Callable[[Work], float], memory: float, world_size: int) -> str:
    """Single changes of settings that save memory and keep the result, and what each would need; empty if none does.

    Args:
        need: bytes of one process.
        memory: bytes that a process has.
    """
    needed = need(work)
    return "; ".join(
        f"{change}: {gibibytes(less)}{'' if less <= memory else ' (still too much)'}"
        for change, changed in _savings(work, need, memory, world_size)
        if (less := need(changed)) < needed
    )


def _savings(work: Work, need: Callable[[Work], float], memory: float, world_size: int) -> Iterator[tuple[str, Work]]:
    """The changes to try. For `optim.accumulation` it is the lowest value that suffices, or the highest possible."""
    optim, engine, experts = work.optim, work.engine, work.spec.experts
    parts = optim.batch_size // world_size  # images of a process, which accumulation divides
    for accumulation in (n for n in range(optim.accumulation + 1, parts + 1) if parts % n == 0):
        more = replace(work, optim=replace(optim, accumulation=accumulation))
        if need(more) <= memory or accumulation == parts:
            yield f"optim.accumulation={accumulation}", more
            break
    yield "engine.checkpoint_activations=true", replace(work, engine=replace(engine, checkpoint_activations=True))
    yield "engine.zero_stage=2", replace(work, engine=replace(engine, zero_stage=2))
    if experts and experts.num_experts > work.ep_size and world_size % experts.num_experts == 0:
        yield f"experts.ep_size={experts.num_experts}", replace(work, ep_size=experts.num_experts)


def gibibytes(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / 2**30:.2f} GiB"


def _device_memory(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory)


def host_memory() -> float:
    """Memory of the host in bytes, or the lowest limit of the control groups of this process."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in (folder / name for folder in control_groups("memory") for name in _LIMITS):
        try:
            limits.append(float(file.read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return min(limits)
