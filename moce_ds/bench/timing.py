"""Interleaved timing of cases, so that other load on the machine affects all of them equally."""

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
    barrier: Callable[[], object] = lambda: None,
    warmup: int = 2,
) -> dict[str, float]:
    """Median seconds of each case over `repeats` rounds; every round runs every case once, after `warmup` rounds.

    `barrier` is called before each case, if several processes measure the same.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in progress_bar(range(warmup + repeats), desc="measuring", leave=False, delay=2, disable=not is_first()):
        for name, case in cases.items():
            _synchronise()
            barrier()
            began = time.perf_counter()
            case()
            _synchronise()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next allocation, like the caching allocator of a GPU.

    By default it returns large blocks to the system. The page faults of allocating them again depend only on sizes and
    can cost more than the measured products (seen: 150,000 in a step of 1.5 s). No effect without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def machine() -> dict[str, Any]:
    """The machine of the measurements."""
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
