"""`samples.npy`, the table of a shard set: its rows, and checks of the rows that are used (docs/data-format.md).

Legend: N images, S shards. The ids of a shard are consecutive, in the order of the shards.
"""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moce_ds.common.errors import DataError
from moce_ds.common.storage.checksums import check_file, check_size
from moce_ds.common.storage.files import load_array
from moce_ds.data.shard_manifest import MANIFEST, Manifest, restore_from_copy

SAMPLES = "samples.npy"
TARGETS = "targets.npy"

SAMPLE = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the image's bytes in the tar
        ("size", "<i8"),  # bytes
        ("height", "<i4"),  # pixels, after EXIF orientation
        ("width", "<i4"),
        ("label", "<i4"),  # position in `classes`; -1: directly in the source folder
        ("crc32", "<u4"),  # of the image's bytes
    ]
)

CHECKED_AT_OPENING = 64 * 2**20
"""A table of up to this many bytes (1.8 million images) is checked whole when it is opened, in 0.1 s."""

_IN_FINGERPRINT = np.dtype([(name, SAMPLE[name]) for name in ("crc32", "size", "label")])
_CHUNK_BYTES = 2**22


class SampleTable:
    """The rows of a set, memory-mapped. Each shard's rows are checked once in a process, before the first one is used.

    A row is valid if it refers to a place inside its own shard, to a class of the set, and to at least one pixel. The
    rows of a shard have a checksum in the manifest. Earlier versions wrote none: their tables are checked whole when
    they are opened.

    Attributes:
        rows: [N] structured, dtype `SAMPLE`, not checked.
        first_ids: [S + 1] int64, the first id of each shard, then N.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Open the table of the set in `folder`: compare its size, dtype and shape with the manifest.

        Raises:
            DataError: the table is missing, or it has another size, dtype or shape; or it is checked whole and damaged.
        """
        self._made_of = folder, manifest
        self._path, self._shards, self._classes = folder / SAMPLES, manifest.shards, len(manifest.classes)
        self._cure = restore_from_copy(folder)
        self.rows = load_array(self._path, SAMPLE, (manifest.count,), self._cure, DataError)
        check_size(folder, SAMPLES, manifest.files, self._cure, DataError)
        counts_S = np.array([shard.count for shard in manifest.shards], np.int64)
        self.first_ids = np.concatenate([[0], np.cumsum(counts_S)])
        if self.first_ids[-1] != manifest.count or (counts_S < 1).any():
            raise DataError(self._disagreement)
        self._unchecked_S, self._all_checked = np.ones(len(counts_S), bool), False
        whole = any(shard.rows_crc32 is None for shard in manifest.shards)
        if whole or self.rows.nbytes <= CHECKED_AT_OPENING:
            self.check_all()
            check_file(folder, SAMPLES, manifest.files, self._cure, DataError)

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleTable, self._made_of

    def check(self, image_ids: ArrayLike) -> None:
        """Check the shards of some images, each in 0 to N-1. Raises DataError: their rows are damaged."""
        if not self._all_checked:
            numbers = np.searchsorted(self.first_ids, np.atleast_1d(image_ids), side="right") - 1
            if (new := numbers[self._unchecked_S[numbers]]).size:
                self._check(np.unique(new).tolist())

    def check_all(self) -> None:
        """Check all rows. Raises DataError: they are damaged."""
        self._check(np.flatnonzero(self._unchecked_S).tolist())

    def rows_of(self, number: int) -> np.ndarray:
        """[images of a shard] structured: its rows, not checked."""
        return self.rows[self.first_ids[number] : self.first_ids[number + 1]]

    def fault_of(self, number: int) -> str | None:
        """What is wrong with the rows of a shard; None if they are as they were written."""
        rows, shard = self.rows_of(number), self._shards[number]
        if (rows["shard"] != number).any():
            return self._disagreement
        offset, size, label = rows["offset"], rows["size"], rows["label"]
        inside = (offset >= 0) & (size > 0) & (size <= shard.bytes - offset)
        inside &= (rows["height"] > 0) & (rows["width"] > 0) & (label >= -1) & (label < self._classes)
        if not inside.all():
            row = int(self.first_ids[number]) + int(inside.argmin())
            place = "a place outside its shard, an unknown class, or no pixels"
            return f"{self._path}: row {row} refers to {place}. {self._cure}"
        if shard.rows_crc32 not in (None, rows_checksum(rows)):
            beside = self.rows[max(0, self.first_ids[number] - 1) : self.first_ids[number + 1] + 1]["shard"]
            if (beside == number).sum() > len(rows):
                return self._disagreement
            rows_text = f"the rows of {shard.name} do not have their checksum"
            return f"{self._path} is damaged or was exchanged: {rows_text}. {self._cure}"
        return None

    def _check(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if fault := self.fault_of(number):
                raise DataError(fault)
            self._unchecked_S[number] = False
        self._all_checked = not self._unchecked_S.any()

    @property
    def _disagreement(self) -> str:
        return f"{self._path} and {MANIFEST} disagree on the number of images in a shard. {self._cure}"


class Fingerprint:
    """Hex SHA-256 over (crc32 <u4, size <i8, label <i4) of all rows, by id, then over the targets, in parts."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add_rows(self, rows: np.ndarray) -> None:
        """Add the next rows, structured, dtype `SAMPLE`."""
        for part in _parts(rows):
            packed = np.empty(len(part), _IN_FINGERPRINT)
            for name in _IN_FINGERPRINT.names or ():
                packed[name] = part[name]
            self._digest.update(packed.data)

    def add_targets(self, targets: np.ndarray) -> None:
        """Add the next rows [n, K] int8 of the targets, after all rows of the table."""
        for part in _parts(targets):
            self._digest.update(np.ascontiguousarray(part).data)

    @property
    def text(self) -> str:
        """The fingerprint of what was added."""
        return self._digest.hexdigest()


def fingerprint_of(rows: np.ndarray, targets: np.ndarray | None = None) -> str:
    """The fingerprint of a table [N] and of its targets [N, K]."""
    made = Fingerprint()
    made.add_rows(rows)
    if targets is not None:
        made.add_targets(targets)
    return made.text


def rows_checksum(rows: np.ndarray) -> int:
    """CRC-32 of rows as they are stored."""
    return zlib.crc32(np.ascontiguousarray(rows).data)


def load_targets(folder: Path, manifest: Manifest) -> np.ndarray:
    """`targets.npy`, memory-mapped [N, K] int8 and checked whole. Raises DataError: it is damaged."""
    path, cure = folder / TARGETS, restore_from_copy(folder)
    targets = load_array(path, np.dtype(np.int8), (manifest.count, len(manifest.classes)), cure, DataError)
    if not all(np.isin(part, (-1, 0, 1)).all() for part in _parts(targets)):
        raise DataError(f"{path} holds targets other than 1, 0 and -1. {cure}")
    check_file(folder, TARGETS, manifest.files, cure, DataError)
    return targets


def _parts(array: np.ndarray) -> Iterable[np.ndarray]:
    """An array cut along its first axis into parts that a processor's cache holds."""
    step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    return (array[start : start + step] for start in range(0, len(array), step))
