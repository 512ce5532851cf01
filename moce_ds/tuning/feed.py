"""What worker processes prepare ahead of the loop that takes it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from moce_ds.data.sampler import ShuffledSampler
from moce_ds.errors import DataError, MoceError
from moce_ds.runtime import Runtime
from moce_ds.tuning.task import Task


class _Made(Dataset[Any]):
    """What `make` makes of each index; an error as a value: raised in a worker it would arrive with a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        try:
            return self._make(index)
        except MoceError as error:
            return error


def prepared(make: Callable[[int], Any], indices: range, workers: int, device: torch.device) -> Iterator[Any]:
    """`make(index)` for each index in order, by `workers` processes (0: by this one), for use on `device`.

    Raises (while iterating):
        MoceError: what `make` raised.
        DataError: a process died.
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
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"A process that prepares images died ({error}): perhaps killed for lack of memory. The same command "
                "goes on, with fewer data.workers if it happens again."
            ) from None
        yield item


def feed(task: Task, sampler: ShuffledSampler, indices: range, workers: int, runtime: Runtime) -> Iterator[Any]:
    """This process's part of the global batches `indices`, on the host. Raises what `task.batch` does."""

    def make(index: int) -> Any:
        part = sampler.batch(index).part(runtime.rank, runtime.world_size)
        return task.batch(part.ids, part.epochs)

    return prepared(make, indices, workers, runtime.device)
