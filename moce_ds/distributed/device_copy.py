"""Copies between the host and the device that let neither wait for the other."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, through pinned memory for a GPU.

    From pageable memory, CUDA may make the host wait for all earlier work before the copy.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def together_on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on `device`, by a single copy: the results are views of one buffer.

    The tensors of the widest dtype come first, so that all are aligned.

    Raises:
        RuntimeError: a tensor is not aligned.
    """
    by_dtype = groupby(tensors, lambda tensor: tensor.dtype)
    flat = [torch.cat([tensor.reshape(-1) for tensor in group]) for _, group in by_dtype]
    packed = on_device(torch.cat([part.view(torch.uint8) for part in flat]), device)
    parts = packed.split([tensor.nbytes for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class HostCopy:
    """A device tensor on its way to the host: the copy begins at once, and only `wait` waits for it.

    On a CPU it is the tensor itself, so whatever changes that in place changes this.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = tensor

    def wait(self) -> Tensor:
        """The tensor on the host, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
