"""torch.cuda without a GPU: its Python functions answer for an H100, and note where the host would wait.

The tensors are those of `watch.py`; torch's own part in C++ is `cuda_guard.cpp`.
"""

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.device.watch import CUDA, FakeDevice

_MEMORY = 80 << 30
_ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 8,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": "H100",
    "get_device_properties": SimpleNamespace(
        total_memory=_MEMORY, major=9, minor=0, name="H100", multi_processor_count=132
    ),
    "mem_get_info": (_MEMORY, _MEMORY),
    "is_bf16_supported": True,
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
    **dict.fromkeys(("manual_seed_all", "empty_cache", "reset_peak_memory_stats"), None),
}


def install(device: FakeDevice) -> None:
    """Replace the functions of torch.cuda for the rest of the process; waits are noted by `device`."""
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, _answering(answer))

    class Event:
        """Has always happened."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.given = device.given

        def record(self, stream: Any = None) -> None:
            self.given = device.given

        def wait(self, stream: Any = None) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            device.wait("Event.synchronize", self.given)

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    class Stream:
        """Every stream is the same."""

        cuda_stream, stream_id, device_index, device_type = 1, 0, 0, 1
        device = torch.device(CUDA, 0)

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def synchronize(self) -> None:
            device.wait("Stream.synchronize")

        def query(self) -> bool:
            return True

        def wait_stream(self, other: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.set_device = lambda device_: device.use_in_thread()
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device_=None: device.wait("torch.cuda.synchronize")
    FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # one copy, as of real tensors
    nn.Module.to = moved
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then copies where `device` sees it


def _answering(answer: Any) -> Any:
    return lambda *args, **kwargs: answer


def moved(module: nn.Module, device: torch.device | str | int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to` for devices: the parameters remain the same objects, with what DeepSpeed has marked them with.

    torch's own replaces a parameter where one of its two sides is fake, and its marks are lost.
    """
    if device is None:
        return module
    target = torch.device(CUDA, device) if isinstance(device, int) else torch.device(device)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.device.type != target.type:
                there = nn.Parameter(parameter.detach().to(target), parameter.requires_grad)
                vars(there).update(vars(parameter))
                setattr(part, name, there)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(target))
    return module


def join(world_size: int, rank: int) -> None:
    """A process group of any size in which this process is alone: collectives return at once, what they were given."""
    os.environ.update(
        DS_ACCELERATOR=CUDA, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
