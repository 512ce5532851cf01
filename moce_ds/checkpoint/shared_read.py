"""Reading a checkpoint with several processes: each file is read once in the group of processes that need it.

The members of a group read equal parts of its files, check what they read, and broadcast it to the other members: bytes
that many processes need cross the disk, or the network to the file system, once.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.common.errors import MoceError
from moce_ds.distributed.runtime import Runtime

_AHEAD = 1  # files read while an earlier one is broadcast
_READABLE = 1  # the byte after a broadcast file: its reader found it intact


class Wanted(NamedTuple):
    """A file of a checkpoint, and the processes that need it."""

    name: str
    group: dist.ProcessGroup | None  # None: all


Take = Callable[[str, dict[str, Tensor]], None]


def read_together(checkpoint: Checkpoint, wanted: Sequence[Wanted], take: Take, runtime: Runtime) -> None:
    """Pass each file's name and tensors, on this process's device, to `take`; a collective.

    One file is held at a time: `take` copies what it keeps.

    Args:
        wanted: the files that this process needs. All members of a group name the same files of it in the same order,
            and processes of several groups name the groups in the same order.
        take: must contain no collective.

    Raises:
        ArtefactError: on all processes, if a file is missing, damaged, or refused by `take` on one of them. The files
            before it, and others, have been passed to `take`.
    """
    with runtime.raise_on_all_ranks():
        checkpoint.check_holds(name for name, _ in wanted)
    readers = _readers(wanted)
    own = [name for (name, _), reader in zip(wanted, readers, strict=True) if reader == runtime.rank]
    faults: list[Exception] = []
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-read") as pool:
        reads = _ahead(pool, checkpoint.content, own)
        for (name, group), reader in zip(wanted, readers, strict=True):
            content: Tensor | None = None
            with _noted(faults):
                if reader == runtime.rank:
                    content = torch.from_numpy(next(reads).result()).to(runtime.device)
            content = _broadcast(content, checkpoint.bytes_of(name), reader, group, runtime)
            with _noted(faults):
                if content is not None:
                    take(name, checkpoint.tensors(name, content))
    with runtime.raise_on_all_ranks():
        for fault in faults:
            raise fault


def _readers(wanted: Sequence[Wanted]) -> list[int]:
    """The rank that reads each file: the members of a group take turns."""
    readers: list[int] = []
    turns: Counter[tuple[int, ...]] = Counter()
    for _, group in wanted:
        ranks = tuple(dist.get_process_group_ranks(group))
        readers.append(ranks[turns[ranks] % len(ranks)])
        turns[ranks] += 1
    return readers


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], NDArray[np.uint8]], names: Sequence[str]
) -> Iterator[Future[NDArray[np.uint8]]]:
    """The reading of each file, begun `_AHEAD` files before it is asked for."""
    begun: deque[Future[NDArray[np.uint8]]] = deque()
    for name in names:
        begun.append(pool.submit(read, name))
        if len(begun) > _AHEAD:
            yield begun.popleft()
    yield from begun


@contextmanager
def _noted(faults: list[Exception]) -> Iterator[None]:
    """Note a failure of the block instead of raising it: the collectives of the other files must still run."""
    try:
        yield
    except (MoceError, OSError, MemoryError, RuntimeError) as error:  # what `raise_on_all_ranks` handles
        faults.append(error)


def _broadcast(
    content: Tensor | None, size: int, reader: int, group: dist.ProcessGroup | None, runtime: Runtime
) -> Tensor | None:
    """The bytes of a file, uint8 [size], from its reader to its group; None if the reader could not read it."""
    if dist.get_world_size(group) == 1:
        return content
    message = torch.empty(size + 1, dtype=torch.uint8, device=runtime.device)
    message[size] = 0
    if content is not None:
        message[:size], message[size] = content, _READABLE
    dist.broadcast(message, reader, group=group)
    return message[:size] if message[size] == _READABLE else None
