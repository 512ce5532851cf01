"""All checks of `moce doctor`, in the order in which they are printed. Each ends within a limited time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moce_ds.doctor import computing, host, packages
from moce_ds.doctor.computing import Computer
from moce_ds.doctor.finding import Finding

OF_INSTALLATION: tuple[Callable[[], Finding], ...] = (
    packages.python_version,
    host.operating_system,
    packages.required_packages,
)
OF_HOST: tuple[Callable[[], Finding], ...] = (host.cpus_and_threads, host.shared_memory, host.open_files, host.slurm)
OF_LIBRARIES: tuple[Callable[[Computer], Finding], ...] = (
    computing.torch_loads,
    computing.gpus_compute,
    computing.deepspeed_loads,
    computing.dali_loads,
    computing.faiss_loads,
    computing.gloo_sums,
    computing.nccl_sums,
)


def findings(folder: Path) -> Iterator[Finding]:
    """What the checks find on this machine, one after the other.

    Args:
        folder: where results will be written; its disk is measured.
    """
    yield from (check() for check in (*OF_INSTALLATION, *OF_HOST))
    yield host.disk(folder)
    computer = Computer.here()
    yield from (check(computer) for check in OF_LIBRARIES)
    yield from map(packages.optional_extra, packages.EXTRAS)


def as_json(found: Sequence[Finding]) -> dict[str, Any]:
    """The findings, the numbers of faults and warnings, and the lines of `moce --version`, as plain data."""
    counts = {f"{status}s": sum(one.status == status for one in found) for status in ("fault", "warning")}
    return {**counts, "versions": list(packages.version_lines()), "checks": [vars(one) for one in found]}
