"""The number of compute threads per process where OMP_NUM_THREADS is unset.

PyTorch takes one thread per core, even if other processes use the cores too. Its threads wait for each other at every
operation, so on a shared machine all threads together can be many times slower than one.
"""

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from moce_ds.common.host.machine import control_groups
from moce_ds.common.text import counted

_COUNT = "OMP_NUM_THREADS"
_CPUS = "MOCE_CPUS"  # free CPUs as the outermost of our processes found them; its children share them
CHOSEN = "MOCE_THREADS"  # the number chosen here; if OMP_NUM_THREADS differs, the user set it


def apply_choice(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_NUM_THREADS for this process unless the user did. Call it before importing torch, which reads it."""
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or "1"
    environment.update(shared_by(int(local) if local.isdecimal() and int(local) else 1, environment))


def keep(count: int | None, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Use as many threads as the run that is resumed, so that its results stay bit-identical.

    Does nothing if the user set OMP_NUM_THREADS or this machine has fewer CPUs. Returns a notice of the change, or
    None.
    """
    if count and not _by_user(environment) and _COUNT in environment and count <= allowed_cpus():
        import torch

        if count != torch.get_num_threads():
            torch.set_num_threads(count)
            return (
                f"{counted(count, 'thread')} per process, as this run had before; OMP_NUM_THREADS sets another number."
            )
    return None


def shared_by(processes: int, environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for each of `processes` processes on this machine; empty if the user set OMP_NUM_THREADS.

    Only the outermost process measures the load of the machine: the work of its children is not load of others.
    """
    if _by_user(environment):
        return {}
    cpus = environment.get(_CPUS) or str(free_cpus())
    count = str(max(1, int(cpus) // processes))
    return {_CPUS: cpus, _COUNT: count, CHOSEN: count}


def notice(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """A notice of the number of threads; None if the user chose it."""
    if _by_user(environment) or _COUNT not in environment:
        return None
    count = environment[_COUNT]
    return (
        f"{counted(int(count), 'thread')} per process, since {environment[_CPUS]} of {os.cpu_count()} CPUs "
        f"{'is' if environment[_CPUS] == '1' else 'are'} free; OMP_NUM_THREADS sets another number."
    )


def free_cpus() -> int:
    """CPUs that this process may use and that other processes leave free, at least 1."""
    return cpus_left(allowed_cpus(), os.cpu_count() or 1, *_load())


def cpus_left(allowed: int, cpus: int, mean: float, running: int) -> int:
    """CPUs of `cpus` that other processes leave to one that may use `allowed`, at least 1.

    Args:
        mean: CPUs in use by others, on average over the last minute.
        running: CPUs in use by others now.

    The smaller of the two counts, so that neither a process that has just ended nor a short peak does.
    """
    return max(1, min(allowed, cpus - round(max(0.0, min(mean, running)))))


def allowed_cpus() -> int:
    """CPUs that this process may use, by its affinity and the quotas of its control groups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([affinity, *map(cgroup_cpus, control_groups("cpu"))])


def cgroup_cpus(folder: Path) -> int:
    """The CPU quota of a control group, rounded up; a large number if it has none."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return 2**20
    return 2**20 if quota.strip() in ("max", "-1") else max(1, math.ceil(int(quota) / int(period)))


def chosen_by_user(environment: Mapping[str, str] = os.environ) -> str | None:
    """OMP_NUM_THREADS, if the user set it; None if it is unset or was chosen here."""
    return environment[_COUNT] if _by_user(environment) else None


def _load() -> tuple[float, int]:
    """CPUs in use by others: the mean over the last minute, and now; zeros where the system does not tell."""
    try:
        return os.getloadavg()[0], int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0.0, 0


def _by_user(environment: Mapping[str, str]) -> bool:
    return _COUNT in environment and environment[_COUNT] != environment.get(CHOSEN)
