"""Whether this machine gives its processes what they need: system, CPUs, shared memory, open files, a disk, SLURM."""

import os
import platform
import re
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from moce_ds.common.host import threads
from moce_ds.common.host.outside import Outcome, run_for
from moce_ds.common.text import counted, in_line
from moce_ds.doctor.finding import Finding, fault, warning
from moce_ds.doctor.probes import Facts, ProbeError, ask

_LEAST_FILES, _ENOUGH_FILES = 1024, 4096
_LEAST_SHARED, _LEAST_FREE = 2**30, 10 * 2**30  # bytes
_LEAST_SPEED = 50e6  # bytes per second
_FOLDER_SECONDS, _SLURM_SECONDS = 60.0, 10.0
_PARTITIONS_SHOWN = 6


def operating_system() -> Finding:
    """Whether there are wheels of all dependencies for this system."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    text = f"{in_line(name)}, {platform.system()} {platform.release()}, {platform.machine()}"
    return judged_system(platform.system(), platform.machine(), text)


def judged_system(system: str, machine: str, text: str) -> Finding:
    """The finding about a system and its processors, such as "Linux" and "x86_64"."""
    if (system, machine) == ("Linux", "x86_64"):
        return Finding("system", text)
    return fault("system", text, "Use Linux on x86-64: DALI has no wheels for other systems.")


def cpus_and_threads(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether a process may use the CPUs of this machine, and OMP_NUM_THREADS fits them."""
    return judged_cpus(threads.allowed_cpus(), os.cpu_count() or 1, threads.chosen_by_user(environment))


def judged_cpus(allowed: int, cpus: int, chosen: str | None) -> Finding:
    """The finding about CPUs and threads.

    Args:
        allowed: CPUs that a process may use, by its affinity and its control groups.
        cpus: CPUs of this machine.
        chosen: OMP_NUM_THREADS, if the user set it.
    """
    text = f"{allowed} of {counted(cpus, 'CPU')} may be used; OMP_NUM_THREADS is {in_line(chosen or 'unset')}"
    if chosen is not None and not (chosen.isascii() and chosen.isdecimal() and 0 < int(chosen) <= allowed):
        cure = f"Unset it, or set it to at most {allowed}: threads that share a CPU wait for each other."
        return warning("CPUs", text, cure)
    if allowed == 1 < cpus:
        return warning("CPUs", text, "Ask for more: `cpus_per_task` of a SLURM job, `--cpus` of a container.")
    return Finding("CPUs", text)


def shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    """Whether the workers of `moce finetune`, `detect` and `segment`, and NCCL, have enough shared memory."""
    cure = "For a container: --shm-size=8g. Without it use data.workers=0 for finetune, detect and segment."
    try:
        space = os.statvfs(place)
    except OSError as error:
        return warning("shared memory", f"{place}: {error.strerror}", cure)
    free = space.f_bavail * space.f_frsize
    text = f"{_gib(free)} free of {_gib(space.f_blocks * space.f_frsize)} in {place}"
    return Finding("shared memory", text) if free >= _LEAST_SHARED else warning("shared memory", text, cure)


def open_files() -> Finding:
    """Whether a process may have enough files open: shards, workers, connections."""
    return judged_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judged_files(limit: int, most: int) -> Finding:
    """The finding about the limit on open files, and the most that a user can set."""
    text = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} for each process"
    if limit == resource.RLIM_INFINITY or limit >= _LEAST_FILES:
        return Finding("open files", text)
    if most != resource.RLIM_INFINITY and most < _LEAST_FILES:
        return warning("open files", text, f"Ask an administrator for {_ENOUGH_FILES}; users can set {most} at most.")
    enough = _ENOUGH_FILES if most == resource.RLIM_INFINITY else min(_ENOUGH_FILES, most)
    return warning("open files", text, f"`ulimit -n {enough}` in the shell that starts moce.")


def disk(folder: Path) -> Finding:
    """Whether a folder can be written to, has space, and is fast enough."""
    try:
        return judged_disk(folder, ask("folder", str(folder.absolute()), seconds=_FOLDER_SECONDS))
    except ProbeError as error:
        cure = "moce must be able to write to the folder of its results: name another one (--folder)."
        return fault("disk", f"{in_line(folder.absolute())} cannot be used: {error}", cure)


def judged_disk(folder: Path, facts: Facts) -> Finding:
    """The finding about a folder from what `probes.folder` measured."""
    write, read = (facts["written"] / max(facts[key], 1e-9) for key in ("write_s", "read_s"))
    speed = f"writes {_speed(write)}, reads {_speed(read)}"
    text = f"{in_line(folder.absolute())}: {_gib(facts['free'])} free of {_gib(facts['size'])}; {speed}"
    if facts["free"] < _LEAST_FREE:
        cure = "Shards and checkpoints may not fit: free some space, or write to another disk."
        return warning("disk", text, cure)
    if min(write, read) < _LEAST_SPEED:
        cure = "Slow for shards and checkpoints: use another disk; `data.cache` copies shards to one of the node."
        return warning("disk", text, cure)
    return Finding("disk", text)


def slurm(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether jobs can be queued at SLURM."""
    program = shutil.which("sbatch", path=environment.get("PATH"))
    if program is None:
        return Finding("SLURM", "sbatch is not installed; only `moce launch slurm` needs it")
    asked = run_for(_SLURM_SECONDS, [program, "--version"], environment)
    found = re.search(r"slurm\S* +([\w.-]+)", asked.out)
    version = f"version {in_line(found[1])}" if found else "sbatch, of an unknown version"
    sinfo = shutil.which("sinfo", path=environment.get("PATH"))
    if sinfo is None:
        return warning("SLURM", f"{version}; no sinfo", "Only `moce launch slurm` needs SLURM: try a login node.")
    return judged_slurm(version, run_for(_SLURM_SECONDS, [sinfo, "--noheader", "--format=%R %a %D %l"], environment))


def judged_slurm(version: str, partitions: Outcome) -> Finding:
    """The finding about SLURM, from lines of sinfo: partition, up or down, nodes, time limit."""
    if why := partitions.fault(_SLURM_SECONDS):
        cure = "Only `moce launch slurm` needs it: run it on a login node of the cluster, or ask an administrator."
        return warning("SLURM", f"{version}; the cluster does not answer: {in_line(why).removesuffix('.')}", cure)
    rows = [line.split() for line in partitions.out.splitlines() if len(line.split()) == 4]
    shown = [f"{name} ({counted(int(nodes), 'node')}, {limit}{'' if up == 'up' else f', {up}'})"
             for name, up, nodes, limit in rows[:_PARTITIONS_SHOWN]]  # fmt: skip
    more = [f"{len(rows) - len(shown)} more"] if len(rows) > len(shown) else []
    return Finding("SLURM", f"{version}; partitions: {in_line(', '.join([*shown, *more]) or 'none')}")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.0f} GiB" if size >= 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def _speed(rate: float) -> str:
    return f"{rate / 1e6:,.0f} MB/s"
