"""How time and memory of the parts of the program grow with the number of images.

Every measurement runs in a new process, on inputs that another process wrote. Three sizes, each ten times the one
before, give a power law, which is extrapolated to sets that this machine does not hold.

Axes: P sizes.
"""

import gc
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moce_ds.common.errors import ConfigError
from moce_ds.common.host.machine import MachineError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.drafts import scratch_folder

TARGETS = {"14M": 14e6, "100M": 1e8, "1B": 1e9}
"""Numbers of images that the laws are extrapolated to: ImageNet-22k, and what users of object stores have."""

SMALLEST = 10_000
FITTED = 3
"""Sizes of a law: the largest ones, where constant costs weigh least."""

_PROC = Path("/proc/self")
_LEAST = {"seconds": 1e-6, "peak_mib": 0.1}
"""What a value counts for in a law if it is smaller, such as 0 MiB."""

T = TypeVar("T")
Call = Callable[[], object]


@dataclass(frozen=True)
class ScaleCase:
    """A part of the program to measure.

    Attributes:
        what: what is measured, in a few words.
        ready: opens or makes the inputs for n images, in the measuring process, and returns the call to measure.
        inputs: name of the inputs on disk, which cases may share.
        write: writes them into an empty folder; None if there are none.
        times: the largest n is this many times that of the other cases.
    """

    what: str
    ready: Callable[[Path, int], Call]
    inputs: str = ""
    write: Callable[[Path, int], None] | None = None
    times: float = 1


@dataclass(frozen=True)
class Law:
    """y ~ scale * n ** power."""

    scale: float
    power: float

    @classmethod
    def fitted(cls, sizes: Sequence[float], values: Sequence[float]) -> "Law":
        """Least squares of log y on log n, over the `FITTED` largest sizes, which must be in order."""
        power, intercept = np.polyfit(np.log(sizes[-FITTED:]), np.log(values[-FITTED:]), 1)
        return cls(float(np.exp(intercept)), float(power))

    def at(self, size: float) -> float:
        """The value at n = `size`."""
        return self.scale * float(size**self.power)


def sizes_of(case: ScaleCase, largest: int) -> list[int]:
    """Numbers of images to measure, in order: the largest, a tenth of it and so on down to `SMALLEST`; at least
    `FITTED`."""
    sizes = [round(largest * case.times)]
    while len(sizes) < FITTED or sizes[-1] // 10 >= SMALLEST:
        sizes.append(sizes[-1] // 10)
    return sizes[::-1]


def bench_scale(
    cases: Mapping[str, ScaleCase], largest: int, repeats: int, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure cases at all their sizes; returns the rows of measurements and those of laws, as plain data.

    Args:
        cases: by name; they must be module-level, since new processes call them.
        largest: n of a case with `times` 1.
        repeats: new processes a size; medians are reported.
        folder: a folder on the disk for the inputs, which are removed at the end.

    Raises:
        ConfigError: the system has no `/proc/self/clear_refs`, so peaks of memory cannot be measured.
        MachineError: a process died, as for lack of memory.
    """
    if not (_PROC / "clear_refs").exists():
        raise ConfigError("moce bench scale needs Linux: it reads the peak of memory from /proc.")
    plan = [(name, size) for name, case in cases.items() for size in sizes_of(case, largest)]
    rows = []
    with scratch_folder(folder) as scratch, progress_bar(plan, desc="measuring", leave=False, delay=2) as bar:
        for name, size in bar:
            bar.set_postfix_str(f"{name} {size:,}")
            case, inputs = cases[name], scratch / f"{cases[name].inputs or name}-{size}"
            if case.write is not None and not inputs.exists():
                inputs.mkdir()
                _in_new_process(name, size, case.write, inputs, size)
            found = [_in_new_process(name, size, _measured, case.ready, inputs, size) for _ in range(repeats)]
            median = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"case": name, "n": size, **median})
    return rows, [_law_of(name, [row for row in rows if row["case"] == name]) for name in cases]


def _in_new_process(name: str, size: int, function: Callable[..., T], *arguments: Any) -> T:
    """The result of a module-level function in a process of its own."""
    context = get_context("forkserver")  # imports the case's module once, not in each process
    context.set_forkserver_preload([function.__module__, *(part.__module__ for part in arguments if callable(part))])
    ends_at_once = (signal.signal, (signal.SIGINT, signal.SIG_DFL))  # without a traceback of its own
    with ProcessPoolExecutor(1, context, *ends_at_once) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise MachineError(
                f"The process that measures {name} with {size:,} images died, perhaps for lack of memory: lower "
                "--largest, or leave the case out of --cases."
            ) from None


def _measured(ready: Callable[[Path, int], Call], inputs: Path, size: int) -> dict[str, float]:
    """Time and memory of one call. Memory counts above what the process held before, in MiB: `peak_mib` at its highest,
    with the pages of mapped files, which processes share; `mapped_mib` of these at the end."""
    call = ready(inputs, size)
    gc.collect()
    (_PROC / "clear_refs").write_text("5")  # the peak begins at the present size
    before, mapped = _memory("VmRSS"), _memory("RssFile")
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = max(0.0, _memory("VmHWM") - before)
    mapped = max(0.0, _memory("RssFile") - mapped)
    del result
    return {"seconds": wall, "cpu_seconds": cpu, "peak_mib": peak, "mapped_mib": mapped}


def _memory(key: str) -> float:
    (line,) = (line for line in (_PROC / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def _law_of(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row with the laws of time and of memory, and both at the `TARGETS`."""
    sizes = [row["n"] for row in rows]
    seconds, mebibytes = (Law.fitted(sizes, [max(row[key], least) for row in rows]) for key, least in _LEAST.items())
    return {
        "case": name,
        "seconds": f"{seconds.scale:.2g} n^{seconds.power:.2f}",
        **{f"{target}, s": seconds.at(size) for target, size in TARGETS.items()},
        "MiB": f"{mebibytes.scale:.2g} n^{mebibytes.power:.2f}",
        **{f"{target}, MiB": mebibytes.at(size) for target, size in TARGETS.items()},
    }
