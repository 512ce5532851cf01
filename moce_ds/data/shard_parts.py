"""The parts of an unfinished shard set: each is a shard with the record of what it adds to the tables of the set.

Part k is made of the entries [k * n, (k + 1) * n) of the listing, n images per shard, so any process may write it, in
any order. The ids of its images follow those of all parts before it. A writer that does not know them all assumes that
the other ones reject nothing; where that was wrong, `renumber` corrects the ids afterwards. Rejected entries leave a
shard with fewer images, or no shard.

        .progress/
          plan.json         what determines the content, and the version of these files
          files.jsonl       the listing: a line for each entry, in order
          000003.npy        the rows of part 3; the label is a position in the classes of the record
          000003.sources    lines of `sources.jsonl`
          000003.rejected   lines of `rejected.jsonl`, if there are any
          000003.json       its `Part`, written last
"""

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moce_ds.common.errors import DataError
from moce_ds.common.storage.files import (
    atomic_file,
    read_record,
    reads_from,
    save_array,
    sha256_of,
    sync,
    write_json,
    writes_to,
)
from moce_ds.common.storage.text_lines import TextLines
from moce_ds.data.image_file import Accepted, Rejected
from moce_ds.data.sample_table import SAMPLE
from moce_ds.data.shard_manifest import index_name, shard_name
from moce_ds.data.shard_tar import index_text, key_of, members_of
from moce_ds.data.shards import PROGRESS
from moce_ds.data.sources.source import Entry, Source, read_listing_line

PLAN, LISTING = "plan.json", "files.jsonl"

_REPORTED = 16  # entries per report of progress


@dataclass(frozen=True)
class Part:
    """The record of a finished part.

    Attributes:
        first_id: the id of its first image, as it is in the tar.
        count: number of images; 0: there is no shard.
        bytes, sha256: of the tar.
        rejected: number of rejected entries by reason.
        classes: names of the classes of its images, sorted.
    """

    first_id: int
    count: int
    bytes: int
    sha256: str
    rejected: dict[str, int]
    classes: list[str]


@dataclass(frozen=True)
class UnfinishedSet:
    """What every writer of a set knows. It can be pickled.

    Attributes:
        source: of the images.
        out: the folder of the set.
        files: the listing.
        images_per_shard, max_pixels: as in the settings.
    """

    source: Source
    out: Path
    files: TextLines
    images_per_shard: int
    max_pixels: int

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-len(self.files) // self.images_per_shard)

    def entries_of(self, number: int) -> list[Entry]:
        """The entries of a part. Raises DataError: the listing was altered."""
        first = number * self.images_per_shard
        with reads_from(self.out / PROGRESS / LISTING, self._cure, DataError):
            return [read_listing_line(line) for line in self.files.between(first, first + self.images_per_shard)]

    def entry_counts(self) -> np.ndarray:
        """[parts] int64, number of entries of each part."""
        counts = np.full(self.parts, self.images_per_shard, np.int64)
        if len(counts):
            counts[-1] -= self.parts * self.images_per_shard - len(self.files)
        return counts

    def finished(self) -> np.ndarray:
        """[parts] bool, whether each part has a record."""
        found = np.zeros(self.parts, bool)
        with os.scandir(self.out / PROGRESS) as entries:
            names = [entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json")]
        found[[int(name) for name in names if name.isdecimal() and int(name) < self.parts]] = True
        return found

    def record_of(self, number: int) -> Part | None:
        """The record of a part; None if it is not finished. Raises ArtefactError: it is damaged."""
        path = self._file(number, "json")
        return read_record(path, Part, "the record of a shard", "moce shards") if path.exists() else None

    def rows_of(self, number: int) -> np.ndarray:
        """[images of the part] the rows of a finished part. Raises ArtefactError: they are damaged."""
        path = self._file(number, "npy")
        with reads_from(path, self._cure):
            rows: np.ndarray = np.load(path)
        return rows

    def sources_of(self, number: int) -> bytes:
        """The lines of `sources.jsonl` from a finished part. Raises ArtefactError: they are missing."""
        path = self._file(number, "sources")
        with reads_from(path, self._cure):
            return path.read_bytes()

    def rejected_of(self, number: int) -> bytes:
        """The lines of `rejected.jsonl` from a finished part that has some. Raises ArtefactError: they are missing."""
        path = self._file(number, "rejected")
        with reads_from(path, self._cure):
            return path.read_bytes()

    def write(self, number: int, first_id: int) -> Iterator[int | Part]:
        """Examine the entries of a part and write it: yields numbers of examined entries, then its record.

        Raises:
            DataError: as `examine`. ArtefactError: the folder cannot be written.
        """
        entries = self.entries_of(number)
        verdicts = self.source.examine(entries, self.max_pixels)
        yield from self.write_examined(number, first_id, zip(entries, verdicts, strict=True))

    def write_examined(
        self, number: int, first_id: int, verdicts: Iterable[tuple[Entry, Accepted | Rejected]]
    ) -> Iterator[int | Part]:
        """As `write`, with the entries of the part and their verdicts."""
        rejected: list[dict[str, str]] = []
        rows: list[tuple[int, ...]] = []
        accepted: list[Entry] = []
        path = self.out / shard_name(number)
        with writes_to(self.out), atomic_file(path) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for examined, (entry, verdict) in enumerate(verdicts, 1):
                    if isinstance(verdict, Rejected):
                        rejected.append({"path": entry.path, **verdict._asdict()})
                    else:
                        rows.append(_add_sample(tar, number, first_id + len(rows), verdict))
                        accepted.append(entry)
                    if examined % _REPORTED == 0:
                        yield _REPORTED
            reasons = Counter(entry["reason"] for entry in rejected)
            classes = sorted({entry.class_name for entry in accepted} - {""})
            size, digest = temporary.stat().st_size, sha256_of(temporary)
            part = Part(first_id, len(rows), size, digest, dict(reasons), classes)
        with writes_to(self.out):
            if not rows:
                path.unlink()
            _write_lines(self._file(number, "sources"), [entry.path for entry in accepted])
            if rejected:
                _write_lines(self._file(number, "rejected"), rejected)
        table = np.array(rows, SAMPLE)
        position = {name: label for label, name in enumerate(classes)}
        table["label"] = [position.get(entry.class_name, -1) for entry in accepted]
        self._record(number, part, table)
        yield part

    def renumber(self, number: int, first_id: int) -> Iterator[Part]:
        """Give the images of a finished part other ids, in place; yields the new record.

        A kill leaves the earlier record, by which the next process does all of it again.

        Raises:
            ArtefactError: the folder cannot be written, or the record is damaged.
        """
        part, rows = self.record_of(number), self.rows_of(number)
        assert part is not None
        path = self.out / shard_name(number)
        if part.count:
            with writes_to(self.out):
                with open(path, "r+b") as tar:
                    for name, offset, size in members_of(rows, first_id):
                        tar.seek(offset - tarfile.BLOCKSIZE)
                        tar.write(_header(name, size))
                        if name.endswith(".idx"):
                            tar.write(_id_bytes(int(name.removesuffix(".idx"))))
                sync(path)
                part = replace(part, sha256=sha256_of(path))
        part = replace(part, first_id=first_id)
        self._record(number, part, rows)
        yield part

    def _record(self, number: int, part: Part, rows: np.ndarray) -> None:
        with writes_to(self.out):
            if part.count:
                with atomic_file(self.out / index_name(shard_name(number))) as temporary:
                    temporary.write_text(index_text(rows, part.first_id), encoding="ascii")
            save_array(self._file(number, "npy"), rows)
            write_json(self._file(number, "json"), asdict(part))

    @property
    def _cure(self) -> str:
        return f"delete {self.out} and write it again with `moce shards`."

    def _file(self, number: int, suffix: str) -> Path:
        return self.out / PROGRESS / f"{number:06d}.{suffix}"


def _write_lines(path: Path, entries: Sequence[Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="ascii")


def _add_sample(tar: tarfile.TarFile, number: int, image_id: int, image: Accepted) -> tuple[int, ...]:
    """Append an image and its id; returns its row, with label -1."""
    offset, key = tar.offset + tarfile.BLOCKSIZE, key_of(image_id)
    for name, content in ((f"{key}.jpg", image.data), (f"{key}.idx", _id_bytes(image_id))):
        tar.addfile(_member(name, len(content)), io.BytesIO(content))
    return (number, offset, len(image.data), image.height, image.width, -1, zlib.crc32(image.data))


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    member.size = size
    return member


def _header(name: str, size: int) -> bytes:
    return _member(name, size).tobuf(tarfile.USTAR_FORMAT)


def _id_bytes(image_id: int) -> bytes:
    return image_id.to_bytes(8, "little", signed=True)
