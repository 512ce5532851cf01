"""Checks before a run starts whether it fits into the memory of this machine."""

import os

import torch

from moce_ds.errors import ConfigError
from moce_ds.host.machine import control_groups
from moce_ds.planning.dry_run import gibibytes
from moce_ds.planning.report import savings
from moce_ds.planning.work import Work
from moce_ds.training.settings import PretrainSettings

FORCE = "MOCE_FORCE"
"""The environment variable by which `--force` reaches the processes of a run."""

_LIMITS = ("memory.max", "memory.limit_in_bytes")


def check_memory(config: PretrainSettings, world_size: int, device: torch.device) -> None:
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
    needed = _needed(config, world_size, on_gpu)
    if needed <= memory:
        return
    remedies = [
        f"{change}: {gibibytes(need)}{'' if need <= memory else ' (still too much)'}"
        for change, changed in savings(config, lambda c: _needed(c, world_size, on_gpu), memory, world_size)
        if (need := _needed(changed, world_size, on_gpu)) < needed
    ]
    share = f", its share for {local_size} processes" if local_size > 1 and not on_gpu else ""
    raise ConfigError(
        f"The run needs about {gibibytes(needed)} of memory per process; {'the GPU' if on_gpu else 'this machine'} has "
        f"{gibibytes(memory)}{share}. {'; '.join(remedies) or 'No setting alone helps: use more or larger machines'}. "
        "`moce plan` predicts other machines; --force starts the run anyway."
    )


def _needed(config: PretrainSettings, world_size: int, on_gpu: bool) -> float:
    """Bytes of one process. On a host only the part of a reduction buffer that gradients fill counts."""
    work = Work.of(config)
    needed = work.memory(world_size)
    if on_gpu:
        return needed.total
    return needed.state + needed.activations + min(needed.buffers, 8 * work.parameters.held)


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
