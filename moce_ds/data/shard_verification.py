"""Verification of the shards of a set: all bytes are read, by as many processes as there are cores."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moce_ds.common.host.program import progress_bar
from moce_ds.common.host.team import as_they_come
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.common.storage.files import sha256_of
from moce_ds.data.sample_table import SAMPLES, SampleTable
from moce_ds.data.shard_manifest import ShardFile, index_name
from moce_ds.data.shard_storage import AddressStorage, ShardStorage
from moce_ds.data.shard_tar import foreign_member, index_text

_ALONE_BYTES = 2**28
"""A set of up to this size is verified by one process: starting others would take longer."""

_SHOWN = 10


@dataclass(frozen=True)
class ShardVerification:
    """What is verified: the shards of a set with the rows of its table. It can be pickled.

    Attributes:
        storage: of the tar files.
        shards, table: as of the set.
    """

    storage: ShardStorage
    shards: list[ShardFile]
    table: SampleTable

    def faults(self) -> list[str]:
        """All differences from what was written, one line each, in the order of the shards.

        Raises:
            LostWorkerError: a process died.
        """
        numbers = range(len(self.shards))
        workers = 1 if sum(shard.bytes for shard in self.shards) <= _ALONE_BYTES else None
        found: dict[int, list[str]] = {}
        with progress_bar(total=len(numbers), desc="verify", unit="shard", disable=None, delay=2) as bar:
            for number, faults in as_they_come(self.faults_of, iter(numbers), workers, __name__):
                if not isinstance(faults, int) and faults:
                    found[number] = faults
                bar.update()
        return [fault for number in sorted(found) for fault in found[number]]

    def faults_of(self, number: int) -> Iterator[int | list[str]]:
        """Yields the differences of one shard from what was written: of its tar, its index and its rows."""
        shard, rows, first_id = self.shards[number], self.table.rows_of(number), int(self.table.first_ids[number])
        faults = list[str]()
        rows_are_valid = self.table.fault_of(number) is None
        if not rows_are_valid:
            faults.append(f"{SAMPLES}: damaged in the rows of {shard.name}")
        try:
            with self._local(shard.name, index_name(shard.name)) as (file, index):
                if sha256_of(file) != shard.sha256:
                    damaged = _damaged(file, rows, first_id) if rows_are_valid else []
                    first = f", ids {', '.join(map(str, damaged[:_SHOWN]))} ..." if damaged else ""
                    faults.append(f"{shard.name}: altered; {len(damaged)} of {len(rows)} images damaged{first}")
                if foreign := foreign_member(file, rows, first_id):
                    faults.append(f"{shard.name}: {foreign}")
                expected = index_text(rows, first_id)
                if not index.is_file() or index.read_text(encoding="ascii", errors="replace") != expected:
                    faults.append(f"{index.name}: missing or altered")
        except OSError as error:
            faults.append(f"{shard.name}: cannot be read ({error.strerror or error})")
        yield faults

    @contextmanager
    def _local(self, *names: str) -> Iterator[list[Path]]:
        """Files of the storage as files of this machine: copies for the length of the block, if they are elsewhere.

        Raises OSError. A file that is missing at an address has no copy.
        """
        if not isinstance(self.storage, AddressStorage):
            yield [Path(self.storage.where(name)) for name in names]
            return
        with scratch_folder() as scratch:
            for name in names:
                with suppress(FileNotFoundError):
                    self.storage.copy(name, scratch / name)
            yield [scratch / name for name in names]


def _damaged(file: Path, rows: np.ndarray, first_id: int) -> list[int]:
    """Ids of the images of a tar whose bytes differ from what was written. Raises OSError."""
    with open(file, "rb") as opened:
        return [
            image_id
            for image_id, row in enumerate(rows, first_id)
            if zlib.crc32(os.pread(opened.fileno(), int(row["size"]), int(row["offset"]))) != row["crc32"]
        ]
