"""Whether a run fits into the memory of the machine that it starts on: refused before it is killed for it."""

import os
from pathlib import Path

import torch

from moce_ds.command_line import FORCE
from moce_ds.errors import ConfigError
from moce_ds.planning import work
from moce_ds.planning.dry_run import gibibytes
from moce_ds.planning.report import savings
from moce_ds.training.settings import PretrainSettings

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def check_memory(config: PretrainSettings, world_size: int) -> None:
    """Refuse a run whose estimate is more than this machine has: a GPU's memory for each process, or the host's for all
    processes on it (LOCAL_WORLD_SIZE; where that is unset, all `world_size`).

    Raises:
        ConfigError: it does not fit, with the settings that would help; or the batch cannot be shared so.
    """
    if os.environ.get(FORCE):
        return
    on_gpu, told = torch.cuda.is_available(), os.environ.get("LOCAL_WORLD_SIZE", "")
    local_size = min(world_size, int(told)) if told.isdecimal() and int(told) else world_size
    memory = _device_memory() if on_gpu else host_memory() / local_size
    needed = _needed(config, world_size, on_gpu)
    if needed <= memory:
        return
    found = [
        f"{change}: {gibibytes(need)}{'' if need <= memory else ' (still too much)'}"
        for change, changed in savings(config, lambda c: _needed(c, world_size, on_gpu), memory, world_size)
        if (need := _needed(changed, world_size, on_gpu)) < needed
    ]
    share = f", its share for {local_size} processes" if local_size > 1 and not on_gpu else ""
    raise ConfigError(
        f"The run needs about {gibibytes(needed)} of memory a process; {'the GPU' if on_gpu else 'this machine'} has "
        f"{gibibytes(memory)}{share}. {'; '.join(found) or 'No setting alone helps: use more or larger machines'}. "
        "`moce plan` says what it would take elsewhere; --force starts it all the same."
    )


def _needed(config: PretrainSettings, world_size: int, on_gpu: bool) -> float:
    """Bytes of one process. On a host only the part of a reduction buffer is taken that gradients fill."""
    needed = work.memory(config, world_size)
    if on_gpu:
        return needed.total
    return needed.state + needed.activations + min(needed.buffers, 8 * work.count_parameters(config).held)


def _device_memory() -> float:
    return float(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)


def host_memory(cgroup: Path = _CGROUP) -> float:
    """Bytes of the host, or of the control group's limit where that is lower."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for name in _LIMITS:
        try:
            limits.append(float((cgroup / name).read_text()))
        except (OSError, ValueError):  # another version of control groups; "max"
            continue
    return min(limits)
