"""Batches of a task, prepared by worker processes ahead of the loop that takes them."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from moce_ds.data.sampler import ShuffledSampler
from moce_ds.errors import MoceError
from moce_ds.runtime import Runtime
from moce_ds.tuning.task import Task


class _Batches(Dataset[Any]):
    """This process's part of every global batch, by index."""

    def __init__(self, task: Task, sampler: ShuffledSampler, runtime: Runtime) -> None:
        self._task, self._sampler = task, sampler
        self._rank, self._world_size = runtime.rank, runtime.world_size

    def __getitem__(self, index: int) -> Any:
        part = self._sampler.batch(index).part(self._rank, self._world_size)
        try:
            return self._task.batch(part.ids, part.epochs)
        except MoceError as error:  # as a value: raised in a worker it would arrive with a traceback in its message
            return error


def feed(task: Task, sampler: ShuffledSampler, first: int, last: int, workers: int, runtime: Runtime) -> Iterator[Any]:
    """The batches `first` to `last` (exclusive), on the host.

    Raises (while iterating):
        MoceError: what `task.batch` raised.
    """
    loader = DataLoader(
        _Batches(task, sampler, runtime),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=runtime.device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, MoceError):
            raise batch
        yield batch
