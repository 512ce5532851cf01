"""Work in several new processes of this machine, which form a process group."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.multiprocessing import spawn

from moce_ds.bench.timing import keep_freed_memory
from moce_ds.runtime import started


def in_processes(work: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """What `work(*arguments, runtime)` returns in the first of `count` new processes, which share the cores.

    Args:
        work: a function of a module, which all processes call; what it returns must be plain data.
    """
    with tempfile.TemporaryDirectory(prefix="moce-bench-") as scratch:
        file = Path(scratch) / "returned.json"
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        spawn(_work, (count, store.port, str(file), work, arguments), nprocs=count)
        return json.loads(file.read_text())


def _work(rank: int, count: int, port: int, file: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with started() as runtime:
        returned = work(*arguments, runtime)
        if runtime.is_main:
            Path(file).write_text(json.dumps(returned))
