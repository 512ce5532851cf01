"""What is tried in a process of its own, for a limited time, because it can hang, crash, or take long to import.

    python -m moce_ds.doctor.probes NAME ARGUMENTS...

prints the facts that a probe found, as JSON in the last line. `ask` starts such a process and reads them.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from moce_ds.common.host.outside import run_for
from moce_ds.common.text import in_line

_SIZE, _PIECE = 64 * 2**20, 4 * 2**20  # bytes that are written into a folder, and at a time
_WRITE_SECONDS = 5.0  # after which no further piece is written

Facts = dict[str, Any]


class ProbeError(Exception):
    """A probe found nothing. The message is a part of a sentence: the last line that the process printed."""


def ask(name: str, *arguments: str, seconds: float, environment: Mapping[str, str] = os.environ) -> Facts:
    """The facts that a probe finds within `seconds`. Raises ProbeError."""
    outcome = run_for(seconds, [sys.executable, "-m", __name__, name, *arguments], environment)
    if why := outcome.fault(seconds):
        raise ProbeError(in_line(why.removeprefix("Error: ").removesuffix(".")))
    facts: Facts = json.loads(outcome.out.splitlines()[-1])
    return facts


def module(name: str) -> Facts:
    """Import a module: its version, and the number of GPUs that it sees (None if it has no such function)."""
    imported = importlib.import_module(name)
    count = getattr(imported, "get_num_gpus", None)
    return {"version": getattr(imported, "__version__", None), "gpus": count() if count else None}


def torch_gpus() -> Facts:
    """Import torch and compute on every GPU: {version, cuda, nccl, kernels, gpus: [{name, gib, fault}]}."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": torch.cuda.get_arch_list() if count else [],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if count else None,
        "gpus": [_gpu(index) for index in range(count)],
    }


def _gpu(index: int) -> Facts:
    """The GPU's name and memory, and why torch cannot compute on it ("" if it can)."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    facts = {"name": properties.name, "gib": properties.total_memory / 2**30, "fault": ""}
    try:
        a = torch.ones(64, 64, device=f"cuda:{index}")
        correct = float((a @ a).sum()) == 64.0**3
    except RuntimeError as error:
        return facts | {"fault": str(error).splitlines()[0]}
    return facts if correct else facts | {"fault": "a product of matrices of ones is wrong"}


def all_reduce(processes: str) -> Facts:
    """Sum a number over some new processes, with NCCL if torch sees GPUs and else with gloo: {backend, sum}."""
    from moce_ds.bench.timing import in_processes

    facts: Facts = in_processes(_sum_of_ranks, int(processes))
    return facts


def _sum_of_ranks(runtime: Any) -> Facts:
    import torch
    from torch import distributed

    total = torch.tensor([runtime.rank + 1.0], device=runtime.device)
    distributed.all_reduce(total)
    return {"sum": total.item()}


def folder(path: str) -> Facts:
    """Write a file without a name into a folder, read it, and time both: {free, size, written, write_s, read_s}.

    The file vanishes with this process, also if it is killed. The kernel is asked to forget what it holds of the file,
    so that the disk is read.
    """
    space = os.statvfs(path)
    piece = os.urandom(_PIECE)
    with tempfile.TemporaryFile(dir=path, buffering=0) as file:
        began, written = time.monotonic(), 0
        while written < _SIZE and time.monotonic() - began < _WRITE_SECONDS:
            written += file.write(piece)
            os.fsync(file.fileno())
        write_s = time.monotonic() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.monotonic()
        while file.read(_PIECE):
            pass
        read_s = time.monotonic() - began
    free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    return {"free": free, "size": size, "written": written, "write_s": write_s, "read_s": read_s}


PROBES = {probe.__name__: probe for probe in (module, torch_gpus, all_reduce, folder)}


if __name__ == "__main__":
    from moce_ds.common.host.program import run_main, say

    run_main(lambda: say(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:]))))
