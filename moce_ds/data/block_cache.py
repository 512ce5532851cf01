"""A shard set whose blocks are copied to a disk of this node before they are needed.

The storage is read in large pieces (`blocks_of`), each of them once a node and window of the reading order. Images
whose block has not been copied are read one by one from the storage, and the checksum of each image that a copy yields
is compared. So a cache that was killed, is too small or damaged makes reading slower, and never wrong.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import ArtefactError
from moce_ds.common.host.machine import refused
from moce_ds.common.storage.drafts import draft_of
from moce_ds.data.reading_order import blocks_of
from moce_ds.data.shards import ShardSet

_FOLDER = re.compile(r"moce-cache-[0-9a-f]{16}")
_USED = ".used"
"""A file on which each process that uses a cache holds a shared lock."""


@dataclass(frozen=True)
class BlockCache:
    """Copies of blocks, a file each, in a folder that the processes of a node share.

    Attributes:
        folder: of one shard set.
    """

    folder: Path

    @classmethod
    def of(cls, place: Path, shards: ShardSet) -> "BlockCache":
        """The cache of a shard set in the folder `place`, which may hold caches of several."""
        return cls(place / f"moce-cache-{shards.fingerprint[:16]}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other processes from removing the cache, and remove those beside it that no process uses.

        Raises:
            ArtefactError: the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / _USED, "ab") as used:
                fcntl.flock(used, fcntl.LOCK_SH)
                for other in self.folder.parent.iterdir():
                    if other != self.folder and _FOLDER.fullmatch(other.name):
                        _remove_unused(other)
                yield
        except OSError as error:
            raise refused(ArtefactError, f"data.cache: {self.folder} cannot be written", error, self.folder) from None

    def read(self, block: int, offset: int, size: int) -> bytes | None:
        """Part of a block; None if there is no copy of it, or a part of one."""
        try:
            with open(self._path(block), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError:  # absent, or its disk fails: the storage has it
            return None
        return data if len(data) == size else None

    def write(self, block: int, data: bytes) -> None:
        """Keep a block. Raises OSError, as on a full disk."""
        draft = draft_of(self._path(block))
        try:
            draft.write_bytes(data)
            os.replace(draft, self._path(block))
        finally:
            draft.unlink(missing_ok=True)

    def drop(self, block: int) -> None:
        """Forget a block."""
        with suppress(OSError):
            self._path(block).unlink()

    def sizes(self) -> dict[int, int]:
        """Bytes of each block in the cache."""
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has just dropped it
                    if entry.name.isdecimal():
                        found[int(entry.name)] = entry.stat().st_size
        return found

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:08d}"


@dataclass(frozen=True, eq=False)
class CachedShardSet(ShardSet):
    """A shard set that reads images from a cache where it has them. Pickling it keeps the set without the cache.

    Attributes:
        first_K1: the first image of each block, and N.
    """

    first_K1: NDArray[np.int64] = None  # type: ignore[assignment]
    cache: BlockCache = None  # type: ignore[assignment]

    @classmethod
    def of(cls, shards: ShardSet, place: Path) -> "CachedShardSet":
        """`shards` with a cache in the folder `place`."""
        opened = {part.name: getattr(shards, part.name) for part in fields(shards)}
        return cls(**opened, first_K1=blocks_of(shards.shards), cache=BlockCache.of(place, shards))

    @property
    def blocks(self) -> int:
        """K."""
        return len(self.first_K1) - 1

    def block_of(self, image_id: int) -> int:
        """The block that an image is in."""
        return int(np.searchsorted(self.first_K1, image_id, side="right")) - 1

    def read(self, image_id: int) -> bytes:
        """The stored bytes of an image, from the cache or the storage. Raises DataError as `ShardSet.read`."""
        row = self._row(image_id)
        block = self.block_of(image_id)
        begin = int(self._row(int(self.first_K1[block]))["offset"])
        data = self.cache.read(block, int(row["offset"]) - begin, int(row["size"]))
        if data is not None:
            if self.is_intact(image_id, data):
                return data
            self.cache.drop(block)
        return super().read(image_id)

    def size_of_block(self, block: int) -> int:
        """Bytes of the shard from the first image of a block to its last. Raises DataError: the table is damaged."""
        first, last = (self._row(int(self.first_K1[place]) - back) for place, back in ((block, 0), (block + 1, 1)))
        return int(last["offset"] + last["size"] - first["offset"])

    def read_block(self, block: int) -> bytes:
        """A block from the storage. Raises OSError, and DataError: the table is damaged."""
        first = self._row(int(self.first_K1[block]))
        return self.storage.read(self.shards[first["shard"]].name, int(first["offset"]), self.size_of_block(block))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.open, (self.path, self.named)


def _remove_unused(folder: Path) -> None:
    with suppress(OSError), open(folder / _USED, "r+b") as used:  # absent: not a cache; locked: in use
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
