"""Reading checkpoints with several processes: over the whole run each file is read once, and checked while it is read.

The members of a group read equal parts of the files that they need, and broadcast them to the other members: bytes that
many processes need cross the disk, or the network to the file system, once. Nothing is verified in advance: `resume`
loads the newest checkpoint and, if a file turns out to be damaged, the one before it.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.checkpoint.format import Checkpoint, Routes, set_aside, step_folder, steps_of
from moce_ds.common.errors import LOST_PEER, ArtefactError, DamagedError, MoceError, OtherVersionError
from moce_ds.common.storage.files import writes_to
from moce_ds.distributed.runtime import Runtime

_AHEAD = 1  # files read while an earlier one is broadcast
_READABLE = 1  # the byte after a broadcast file: its reader found it intact

T = TypeVar("T")


class Wanted(NamedTuple):
    """A file of a checkpoint, and the processes that need it."""

    name: str
    group: dist.ProcessGroup | None  # None: all


Take = Callable[[str, Tensor], None]
"""Gets a file's name and its bytes, uint8 [bytes], on this process's device."""


class SharedReader:
    """Reads a checkpoint with all processes; every method is a collective.

    Attributes:
        checkpoint: is open on every process.
        files_read: by this process, each once.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime) -> None:
        self.checkpoint, self.runtime = checkpoint, runtime
        self.files_read: list[str] = []
        self._damage: list[str] = []  # found by this process

    @classmethod
    def open(cls, folder: Path, runtime: Runtime) -> "SharedReader":
        """Open a checkpoint to resume from it.

        Raises:
            DamagedError: on all processes, if one of them cannot: a file is missing or truncated.
            ArtefactError: on all processes, if the machine of one of them fails, perhaps only now.
        """
        checkpoint, faults = None, list[str]()
        with runtime.raise_on_all_ranks(), _damage_noted(faults):
            checkpoint = Checkpoint.open(folder, resumable=True)
        _raise_damage(faults, runtime)
        assert checkpoint is not None
        return cls(checkpoint, runtime)

    def read(self, wanted: Sequence[Wanted], take: Take) -> None:
        """Pass each wanted file to `take`, one at a time: `take` copies what it keeps.

        Args:
            wanted: the files that this process needs. All members of a group name the same files of it in the same
                order, and processes of several groups name the groups in the same order.
            take: must contain no collective.

        Raises:
            DamagedError: on all processes, if one of them has found damage. All other files have been passed to `take`.
            ArtefactError: on all processes, if the manifest lacks a file, or `take` refuses one on one of them.
        """
        with self.runtime.raise_on_all_ranks():
            self.checkpoint.check_holds(name for name, _ in wanted)
        refused: list[Exception] = []
        for name, content in self._contents(wanted, refused):
            if content is not None:
                with _noted(refused):
                    take(name, content)
        _raise_damage(self._damage, self.runtime)
        with self.runtime.raise_on_all_ranks():
            for fault in refused:
                raise fault

    def load(self, part: str) -> dict[str, Tensor]:
        """All tensors of `weights`, `optimizer` or `state`, on the host of every process. Raises as `read`."""
        tensors: dict[str, Tensor] = {}

        def take(name: str, content: Tensor) -> None:
            tensors.update(self.checkpoint.tensors(name, content.cpu()))

        self.read([Wanted(name, None) for name in self.checkpoint.names(part)], take)
        return tensors

    def routes(self) -> Routes:
        """The routes of a model with experts by cluster. Raises as `read`."""
        name = self.checkpoint.routing_file
        if name is None:
            return self.checkpoint.routes
        found: list[Tensor] = []
        self.read([Wanted(name, None)], lambda _, content: found.append(content.cpu()))
        return self.checkpoint.routes_in(found[0].numpy().tobytes())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block that reads what it needs; then the processes check the files that none of them has read.

        Raises:
            DamagedError: on all processes, if any file is damaged; it lists all of these.
            ArtefactError: on all processes, if the machine of one of them fails, perhaps only now.
        """
        with suppress(DamagedError):
            yield
        read = {name for text in self.runtime.texts(json.dumps(self.files_read)) for name in json.loads(text)}
        rest = sorted(self.checkpoint.manifest["files"].keys() - read)
        with self.runtime.raise_on_all_ranks():
            for name in rest[self.runtime.rank :: self.runtime.world_size]:
                self.files_read.append(name)
                with _damage_noted(self._damage):
                    self.checkpoint.check(name)
        _raise_damage(self._damage, self.runtime)

    def _contents(self, wanted: Sequence[Wanted], failed: list[Exception]) -> Iterator[tuple[str, Tensor | None]]:
        """Each file with its bytes; None if its reader, which notes damage, or why it `failed`, could not read it."""
        readers = self._readers(wanted)
        own = [name for (name, _), reader in zip(wanted, readers, strict=True) if reader == self.runtime.rank]
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-read") as pool:
            reads = _ahead(pool, self.checkpoint.content, own)
            for (name, group), reader in zip(wanted, readers, strict=True):
                content: Tensor | None = None
                if reader == self.runtime.rank:
                    self.files_read.append(name)
                    with _noted(failed), _damage_noted(self._damage):
                        content = torch.from_numpy(next(reads).result()).to(self.runtime.device)
                yield name, _broadcast(content, self.checkpoint.bytes_of(name), reader, group, self.runtime)

    def _readers(self, wanted: Sequence[Wanted]) -> list[int]:
        """The rank that reads each file: from the largest on, the member of its group with the fewest bytes so far."""
        sizes = [self.checkpoint.bytes_of(name) for name, _ in wanted]
        readers = [0] * len(wanted)
        shares: dict[tuple[int, ...], Counter[int]] = {}
        for place in sorted(range(len(wanted)), key=lambda place: -sizes[place]):
            ranks = tuple(_members(wanted[place].group, self.runtime))
            share = shares.setdefault(ranks, Counter())
            readers[place] = min(ranks, key=lambda rank: share[rank])
            share[readers[place]] += sizes[place]
        return readers


def checkpoint_steps(run: Path, runtime: Runtime) -> list[int]:
    """Steps of the checkpoints in a run folder, in rising order, as rank 0 sees them; a collective."""
    steps: list[int] = json.loads(runtime.texts(json.dumps(steps_of(run)))[0])
    return steps


def resume(
    run: Path, steps: Sequence[int], load: Callable[[SharedReader], T], runtime: Runtime
) -> tuple[Checkpoint, T]:
    """Load the newest intact checkpoint of a run; returns it, and what `load` made of it. A collective.

    Newer, damaged checkpoints are then renamed `damaged-step-...`, with a warning.

    Args:
        steps: of its checkpoints, in rising order; the same on all processes.
        load: loads a checkpoint; a collective. It is called again with an older one where a file was damaged, and must
            then replace all that it has loaded. Its other errors, such as for the checkpoint of another model, pass.

    Raises:
        OtherVersionError: another version wrote one that is newer than all intact ones; nothing was renamed.
        ArtefactError: no checkpoint is intact; nothing was renamed.
    """
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps):
        try:
            reader = SharedReader.open(step_folder(run, step), runtime)
            with reader.whole():
                loaded = load(reader)
        except DamagedError as error:
            damaged[step] = error.faults
            continue
        _set_aside(run, damaged, step, runtime)
        return reader.checkpoint, loaded
    listed = "\n".join(f"  {fault}" for faults in damaged.values() for fault in faults)
    raise ArtefactError(
        f"{run} holds no valid checkpoint to resume from:\n{listed}\nRestore these files, or remove "
        f"{run / 'checkpoints'} to begin at step 0."
    )


def is_intact(run: Path, step: int, runtime: Runtime) -> bool:
    """Whether all files of a checkpoint are what was written. A collective: the processes share the reading."""
    try:
        with SharedReader.open(step_folder(run, step), runtime).whole():
            pass  # nothing is needed: all files are checked
    except DamagedError:
        return False
    return True


def _raise_damage(faults: Iterable[str], runtime: Runtime) -> None:
    """Raise DamagedError, on all processes, with the faults that any of them has found; a collective."""
    found = {line for text in runtime.texts("\n".join(faults)) for line in text.splitlines()}
    if found:
        raise DamagedError("\n".join(sorted(found)))


def _set_aside(run: Path, damaged: dict[int, list[str]], good: int, runtime: Runtime) -> None:
    with runtime.raise_on_all_ranks(), writes_to(run):
        for step, faults in damaged.items():
            aside = set_aside(run, step) if runtime.is_main else None
            listed = "\n".join(f"  {fault}" for fault in faults)
            runtime.warn(
                f"the checkpoint of step {step} is damaged; resuming from step {good}, the newest valid one:\n"
                f"{listed}\n  It is kept as {aside}."
            )


def _members(group: dist.ProcessGroup | None, runtime: Runtime) -> list[int]:
    return list(range(runtime.world_size)) if group is None else dist.get_process_group_ranks(group)


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
def _damage_noted(faults: list[str]) -> Iterator[None]:
    """Note what is wrong with a file. A fault that may pass, such as one of a file server, is no damage, and neither is
    the format of a newer version."""
    try:
        yield
    except ArtefactError as error:
        if error.status == LOST_PEER or isinstance(error, OtherVersionError):
            raise
        faults.append(str(error))


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
    if len(_members(group, runtime)) == 1:
        return content
    message = torch.empty(size + 1, dtype=torch.uint8, device=runtime.device)
    message[size] = 0
    if content is not None:
        message[:size], message[size] = content, _READABLE
    dist.broadcast(message, reader, group=group)
    return message[:size] if message[size] == _READABLE else None
