"""Small programs, each with one fault that is to be seen on a fake GPU.

Axes: R rows, G groups, W width.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.device.watch import CUDA, FakeDevice

_ROWS, _GROUPS, _WIDTH = 12, 3, 8


def reads_a_number(x_RW: Tensor) -> None:
    """`Tensor.item`; `bool`, `int` and `float` are the same."""
    x_RW.sum().item()


def reads_a_list(x_RW: Tensor) -> None:
    """One wait, whatever the length of the list."""
    x_RW.tolist()


def decides(x_RW: Tensor) -> None:
    """A branch on what the device computes."""
    assert x_RW.isfinite().all()


def copies_from_pageable_memory(x_RW: Tensor) -> None:
    """Asynchronous only in name."""
    torch.ones(_ROWS).to(CUDA, non_blocking=True)


def makes_a_tensor_of_numbers(x_RW: Tensor) -> None:
    """A copy that is not written as one."""
    torch.tensor([1.0, 2.0], device=CUDA)


def waits_for_a_pinned_copy(x_RW: Tensor) -> None:
    """Pinned memory alone does not make a copy asynchronous."""
    torch.ones(_ROWS).pin_memory().to(CUDA)


def copies_to_pageable_memory(x_RW: Tensor) -> None:
    """A target that is not pinned makes the host wait."""
    torch.empty(_ROWS, _WIDTH).copy_(x_RW, non_blocking=True)


def waits_for_the_device(x_RW: Tensor) -> None:
    """All of its streams."""
    torch.cuda.synchronize()


def waits_late(x_RW: Tensor) -> None:
    """Not a fault: the device has two operators to run while the host waits, once."""
    x_RW = x_RW.neg()
    earlier, arrived = torch.cuda.Event(), torch.cuda.Event()
    earlier.record()
    arrived.record()
    x_RW.mul(2).add(1)
    for event in (arrived, earlier, arrived):
        event.synchronize()


def indexes_from_the_host(x_RW: Tensor) -> None:
    """Torch copies the indices."""
    x_RW[torch.arange(_GROUPS)]


def compares(x_RW: Tensor) -> None:
    """The result is a Python bool."""
    torch.equal(x_RW, x_RW)


def sums_in_bf16(x_RW: Tensor) -> None:
    """Atomics, each of which rounds to bf16."""
    group_R = torch.empty(_ROWS, dtype=torch.int64, device=CUDA)
    torch.zeros(_GROUPS, _WIDTH, dtype=torch.bfloat16, device=CUDA).index_add(0, group_R, x_RW.bfloat16())


def sums_gradients_in_bf16(x_RW: Tensor) -> None:
    """The backward pass of taking rows more than once."""
    rows_GW = torch.zeros(_GROUPS, _WIDTH, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    rows_GW.index_select(0, torch.empty(_ROWS, dtype=torch.int64, device=CUDA)).sum().backward()


def permutes_in_bf16(x_RW: Tensor) -> None:
    """Not a fault: each row is taken once."""
    rows_RW = torch.zeros(_ROWS, _WIDTH, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    rows_RW.index_select(0, torch.empty(_ROWS, dtype=torch.int64, device=CUDA)).sum().backward()


def reduces(x_RW: Tensor) -> None:
    """A collective of bf16."""
    dist.all_reduce(x_RW.bfloat16())


def mixes_devices(x_RW: Tensor) -> None:
    """Torch refuses."""
    x_RW + torch.ones(_ROWS, _WIDTH)


_ALL: tuple[Callable[[Tensor], None], ...] = (
    reads_a_number, reads_a_list, decides, copies_from_pageable_memory, makes_a_tensor_of_numbers,
    waits_for_a_pinned_copy, copies_to_pageable_memory, waits_for_the_device, waits_late, indexes_from_the_host,
    compares, sums_in_bf16, sums_gradients_in_bf16, permutes_in_bf16, reduces, mixes_devices,
)  # fmt: skip


def run_all(device: FakeDevice) -> dict[str, Any]:
    """By the name of the program what `device` saw of it, and under "error" what torch raised."""
    found = {}
    x_RW = torch.empty(_ROWS, _WIDTH, device=CUDA)
    for program in _ALL:
        device.forget()
        error = ""
        try:
            with device.phase("all"):
                program(x_RW)
        except RuntimeError as raised:
            error = str(raised)
        seen = device.forget().get("all")
        found[program.__name__] = (asdict(seen) if seen else {"waits": [], "low_sums": []}) | {"error": error}
    return found
