"""How measurements run: in turns, so that other load on the machine affects all cases equally, and in new processes."""

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import spawn

from moce_ds.console import progress_bar
from moce_ds.distributed.rendezvous import host_on_loopback
from moce_ds.distributed.runtime import started
from moce_ds.host.place import SECRET, is_first, new_secret
from moce_ds.storage.drafts import scratch_folder

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


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_processes(work: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """The result of `work(*arguments, runtime)` in the first of `count` new processes, which share the cores.

    Args:
        work: a module-level function, which all processes call; its result must be plain data.
    """
    with scratch_folder() as scratch:
        file = scratch / "result.json"
        store = host_on_loopback()
        variables = {"MASTER_PORT": str(store.port), SECRET: new_secret()}
        spawn(_work, (count, variables, str(file), work, arguments), nprocs=count)
        return json.loads(file.read_text())


def _work(
    rank: int, count: int, variables: dict[str, str], file: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()} | variables
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with started() as runtime:
        result = work(*arguments, runtime)
        if runtime.is_main:
            Path(file).write_text(json.dumps(result))


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
