"""Work in numbered units that the processes share, with results that do not depend on the number of processes.

Floating-point sums depend on their order. Here every process takes the results of all units in the order of the units,
as a single process does: the sums have the same bits for any number of processes, and on every process.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from moce_ds.distributed.runtime import Runtime

_BATCH_BYTES = 2**24
"""Results that a process receives at a time."""


def own_units(units: int, runtime: Runtime) -> range:
    """The units of this process."""
    return range(runtime.rank, units, runtime.world_size)


def take_in_order(
    results: Iterable[Tensor], units: int, like: Tensor, take: Callable[[Tensor], object], runtime: Runtime
) -> None:
    """Give the results of all units to `take`, in the order of the units, on every process; a collective.

    The results are computed while they are needed. An error in computing or in taking one is raised on all ranks.

    Args:
        results: of `own_units(units, runtime)`, in that order.
        like: a tensor with the shape and the dtype of a result.
        take: gets tensors on the host, or with a single process those of `results` themselves. It must not keep them.
    """
    if runtime.world_size == 1:
        for result in results:
            take(result)
        return
    size = runtime.world_size
    batch = max(1, min(-(-units // size), _BATCH_BYTES // max(1, size * like.nbytes)))
    sent = torch.empty(batch, *like.shape, dtype=like.dtype)
    received = [torch.empty_like(sent) for _ in range(size)]
    remaining, arrived = iter(results), 0
    for first in range(0, units, size * batch):
        number = len(range(first + runtime.rank, min(first + size * batch, units), size))
        with runtime.raise_on_all_ranks():
            _take(received, arrived, take)
            for place, result in enumerate(islice(remaining, number)):
                sent[place] = result
        dist.all_gather(received, sent)
        arrived = min(size * batch, units - first)
    with runtime.raise_on_all_ranks():
        _take(received, arrived, take)


def _take(received: list[Tensor], arrived: int, take: Callable[[Tensor], object]) -> None:
    for number in range(arrived):
        place, rank = divmod(number, len(received))
        take(received[rank][place])


def broadcast(tensor: Tensor, runtime: Runtime) -> Tensor:
    """Rank 0's tensor on every rank; a collective. The others pass one of the same shape and dtype, on the host."""
    if runtime.world_size > 1:
        dist.broadcast(tensor, 0)
    return tensor


def sum_exactly(tensor: Tensor, runtime: Runtime) -> Tensor:
    """The sum of integer tensors of all ranks, on the host; a collective. Integers have the same sum in any order."""
    total = tensor.cpu()
    if runtime.world_size > 1:
        dist.all_reduce(total)
    return total
