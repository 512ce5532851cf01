"""What worker processes prepare ahead of the loop that takes it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import MoceError
from moce_ds.host.machine import machine_fault
from moce_ds.tuning.task import LabelledTask


class _Made(Dataset[Any]):
    """What `make` makes of each index; an error as a value: raised in a worker it would arrive with a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        try:
            made = self._make(index)
            if get_worker_info() is not None:
                _share(made)
            return made
        except MoceError as error:
            return error
        except (OSError, MemoryError, RuntimeError) as error:
            fault = machine_fault(error)
            if fault is None:
                raise
            return fault


def _share(made: Any) -> None:
    """Move tensors to where the main process finds them. The worker would do that in a thread, where a /dev/shm that is
    too small is no error but the end of all answers."""
    if isinstance(made, Tensor):
        made.share_memory_()
    elif isinstance(made, dict):
        _share(list(made.values()))
    elif isinstance(made, list | tuple):
        for part in made:
            _share(part)


def prepared(make: Callable[[int], Any], indices: range, workers: int, device: torch.device) -> Iterator[Any]:
    """`make(index)` for each index in order, by `workers` processes (0: by this one), for use on `device`.

    Raises (while iterating):
        MoceError: what `make` raised.
        MachineError: a process died, or there is too little memory for what it makes.
    """
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # what is read lies in memory already
        pin_memory=device.type == "cuda",
    )
    for item in _unless_one_dies(loader):
        if isinstance(item, MoceError):
            raise item
        yield item


def _unless_one_dies(loader: Iterable[Any]) -> Iterator[Any]:
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            fault = machine_fault(error)
            if fault is None:
                raise
            raise fault from None
        yield item


def feed(task: LabelledTask, sampler: ShuffledSampler, indices: range, workers: int, runtime: Runtime) -> Iterator[Any]:
    """This process's part of the global batches `indices`, on the host. Raises what `task.batch` does."""

    def make(index: int) -> Any:
        part = sampler.batch(index).part(runtime.rank, runtime.world_size)
        return task.batch(part.ids, part.epochs)

    return prepared(make, indices, workers, runtime.device)
