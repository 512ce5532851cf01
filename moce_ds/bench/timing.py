"""Timing cases against one another: interleaved, so that whatever else the machine does hits all alike."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moce_ds.console import progress_bar
from moce_ds.host.place import is_first

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    together: Callable[[], object] = lambda: None,
    warmup: int = 2,
) -> dict[str, float]:
    """Median seconds of each case over `repeats` rounds; every round runs every case once, after `warmup` rounds.

    `raise_on_all_ranks` is called before each case: a barrier, where several processes measure the same.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in progress_bar(range(warmup + repeats), desc="measuring", leave=False, delay=2, disable=not is_first()):
        for name, case in cases.items():
            _synchronise()
            together()
            began = time.perf_counter()
            case()
            _synchronise()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next allocation, as the caching allocator of a GPU does.

    By default it gives large ones back to the system, and the page faults of getting them again, which depend on sizes
    alone, cost more than the products that are measured (seen: 150,000 in a step of 1.5 s). Without effect elsewhere.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def this_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
