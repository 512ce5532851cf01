"""How many threads a process computes with where OMP_NUM_THREADS is unset.

PyTorch takes one for every core, whoever else uses them. Its threads wait for each other at each operation, so on a
machine that others share a process with all threads can be many times slower than with one.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from moce_ds.host.machine import control_groups
from moce_ds.text import counted

_COUNT = "OMP_NUM_THREADS"
_CPUS = "MOCE_CPUS"  # what the outermost process of ours found, for its children to share
CHOSEN = "MOCE_THREADS"  # what was chosen here: where OMP_NUM_THREADS is something else, the user set it


def apply_choice(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_NUM_THREADS for this process, unless the user did: before torch is imported, which reads it then."""
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or "1"
    environment.update(shared_by(int(local) if local.isdecimal() and int(local) else 1, environment))


def keep(count: int | None, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Compute with as many threads as the run that is resumed did, so that its numbers stay the same to the bit; unless
    the user says otherwise, or there are not as many CPUs here. Returns the change in a line; None: there is none."""
    if count and not _by_user(environment) and _COUNT in environment and count <= allowed_cpus():
        import torch

        if count != torch.get_num_threads():
            torch.set_num_threads(count)
            return (
                f"{counted(count, 'thread')} per process, as this run had before; OMP_NUM_THREADS sets another number."
            )
    return None


def shared_by(processes: int, environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for each of so many processes on this machine; none where the user set OMP_NUM_THREADS.

    The machine is looked at once, by the outermost process: what its children do is no load of others.
    """
    if _by_user(environment):
        return {}
    cpus = environment.get(_CPUS) or str(free_cpus())
    count = str(max(1, int(cpus) // processes))
    return {_CPUS: cpus, _COUNT: count, CHOSEN: count}


def told(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """The choice in a line; None where it was the user's."""
    if _by_user(environment) or _COUNT not in environment:
        return None
    count = environment[_COUNT]
    return (
        f"{counted(int(count), 'thread')} per process, since {environment[_CPUS]} of {os.cpu_count()} CPUs "
        f"{'is' if environment[_CPUS] == '1' else 'are'} free; OMP_NUM_THREADS sets another number."
    )


def free_cpus() -> int:
    """CPUs that this process may use and that others leave free, at least 1."""
    return max(1, min(allowed_cpus(), (os.cpu_count() or 1) - round(_load())))


def allowed_cpus() -> int:
    """CPUs that this process may use: of its affinity, and of its control groups' quotas."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([affinity, *map(cgroup_cpus, control_groups("cpu"))])


def cgroup_cpus(folder: Path) -> int:
    """The quota of CPUs of a control group, given its folder, rounded up; many where there is none."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return 2**20
    return 2**20 if quota.strip() in ("max", "-1") else max(1, math.ceil(int(quota) / int(period)))


def _load() -> float:
    """CPUs that others use: the less of the last minute's mean and of this moment, so that neither what has just ended
    nor what lasts for a moment counts."""
    try:
        mean = os.getloadavg()[0]
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, min(mean, float(running)))


def _by_user(environment: MutableMapping[str, str]) -> bool:
    return _COUNT in environment and environment[_COUNT] != environment.get(CHOSEN)
