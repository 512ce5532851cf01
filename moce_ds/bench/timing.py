"""How measurements run: in turns, so that other load on the machine affects all cases equally, and in new processes.

Times are compared between cases of one run. Memory and waits for the device are counted by the profiler.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler_util import EventList
from torch.multiprocessing import spawn
from torch.profiler import ProfilerActivity, profile

from moce_ds.common.host.allocator import keep_freed_memory
from moce_ds.common.host.program import progress_bar
from moce_ds.common.host.rank import SECRET, is_first, new_secret
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.distributed.rendezvous import host_on_loopback
from moce_ds.distributed.runtime import started

# Calls of CUDA that make the host wait for the device, and operations of torch that contain one.
_WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_WAITING_OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero")
_COMMUNICATION = "c10d::"  # begins the names of all operations of torch.distributed
_MESSAGES = {"c10d::send", "c10d::recv_"}


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


def memory_and_waits(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Peak bytes allocated during one call, and how often the host waits for the device.

    On a CPU, where nothing waits, the operations count that would wait on a GPU.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])

    def events_of(call: Callable[[], object]) -> EventList:
        with profile(activities=activities, profile_memory=not on_gpu) as profiled:
            call()
        return profiled.events()

    if on_gpu:
        unprofiled = _count(events_of(lambda: None), _WAITING_CALLS)  # the profiler itself waits
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        waits = _count(events_of(run), _WAITING_CALLS) - unprofiled
        return torch.cuda.max_memory_allocated() - before, waits
    events = events_of(run)
    changes = [(event.time_range.start, event.self_cpu_memory_usage) for event in events]
    held = np.cumsum([change for _, change in sorted(changes)])
    return int(held.max(initial=0)), _count(events, _WAITING_OPERATIONS)


def collectives(run: Callable[[], object]) -> int:
    """How many collectives of torch.distributed this process begins during one call, in the calling thread.

    The small agreements on the host are messages between two processes each, and not counted.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    names = {event.name for event in profiled.events() if event.name.startswith(_COMMUNICATION)}
    return _count(profiled.events(), names - _MESSAGES)


def _count(events: EventList, names: Collection[str]) -> int:
    return sum(event.name in names for event in events)


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


def machine() -> dict[str, Any]:
    """The machine of the measurements."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
