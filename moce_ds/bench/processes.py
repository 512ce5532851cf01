"""Runs a function in several new processes of this machine, which form a process group."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import spawn

from moce_ds.bench.timing import keep_freed_memory
from moce_ds.distributed.rendezvous import host_on_loopback
from moce_ds.distributed.runtime import started
from moce_ds.distributed.sealing import SECRET, new_secret
from moce_ds.storage.drafts import scratch_folder


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
