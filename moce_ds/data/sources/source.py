"""Where the images of a shard set come from: a source lists its entries, and examines any of them.

Entries are listed once, one after the other; their number may exceed what memory holds. Each entry says all that a
worker process needs to find its bytes.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

from moce_ds.common.errors import LOST_PEER, DataError
from moce_ds.common.host.team import LostWorkerError, Worker
from moce_ds.common.host.threads import allowed_cpus
from moce_ds.common.text import in_line
from moce_ds.data.image_file import Accepted, Rejected

_BATCH = 16  # entries per message to a worker
_BATCHES_AHEAD = 3  # per worker, so that one large image does not delay the others


class Entry(NamedTuple):
    """A listed entry.

    Attributes:
        path: its name, unique in the source, with `/` as separator.
        size: bytes of the image, or of the file that contains it; for a file of a folder also `ODD`.
        key: where it is in that file: an offset or a row.
        label: the name of its class, "" for none; None: the folder in `path`.
    """

    path: str
    size: int
    key: int = -1
    label: str | None = None

    @property
    def class_name(self) -> str:
        """The name of its class; "" if it has none."""
        return self.path.rpartition("/")[0] if self.label is None else self.label


class Source(Protocol):
    """A source of images. It can be pickled."""

    @property
    def origin(self) -> Path:
        """The file or folder, absolute."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All entries, in the order of the ids. Raises DataError: the source is damaged or missing."""
        ...

    def examine(self, entries: Sequence[Entry], max_pixels: int) -> Iterator[Accepted | Rejected]:
        """The verdict about each entry, in order. Raises DataError: the machine cannot read it."""
        ...

    def class_order(self, found: Iterable[str]) -> list[str]:
        """The classes of a set in the order of their labels, from the names found, each once."""
        ...

    def files(self) -> Iterator[tuple[str, Path]]:
        """All files that a set is made from, in order, each with what decides the set beside their content: names, and
        classes that are listed. Raises DataError as `entries`."""
        ...


def examined(
    source: Source, entries: Sequence[Entry], max_pixels: int, workers: int | None
) -> Generator[tuple[Entry, Accepted | Rejected], None, None]:
    """Each of `entries` with its verdict, in order; `workers` processes examine them, None: one per core.

    The workers take turns at batches.

    Raises:
        DataError: a worker process died, or the machine cannot read an entry.
    """
    workers = workers or allowed_cpus()
    batches = [entries[start : start + _BATCH] for start in range(0, len(entries), _BATCH)]
    work = partial(_examine_batch, source, max_pixels)
    team = [Worker(work, __name__) for _ in range(min(workers, len(batches)))]
    ahead = _BATCHES_AHEAD * len(team)
    number = 0
    try:
        for number, batch in enumerate(batches[:ahead]):
            team[number % len(team)].send(batch)
        for number, batch in enumerate(batches):
            worker = team[number % len(team)]
            verdicts = worker.receive()
            if number + ahead < len(batches):
                worker.send(batches[number + ahead])
            yield from zip(batch, verdicts, strict=True)
    except LostWorkerError:
        raise lost_worker(batches[number]) from None
    finally:
        for worker in team:
            worker.close()


def lost_worker(entries: Sequence[Entry]) -> DataError:
    """The error for a process that died while it examined some of `entries`."""
    fault = DataError(
        f"A worker process died between {in_line(entries[0].path)} and {in_line(entries[-1].path)}: perhaps for lack "
        "of memory. Rerun the same command to resume, with fewer `workers=` if it happens again."
    )
    fault.status = LOST_PEER  # the same as for workers that prepare batches (`common/host/machine.py`)
    return fault


def listing_line(entry: Entry) -> str:
    """An entry as a line of a listing, in ASCII."""
    return json.dumps(entry[:2] if entry.key == -1 and entry.label is None else entry) + "\n"


def read_listing_line(line: str) -> Entry:
    """The entry in a line of a listing. Raises ValueError or TypeError."""
    return Entry(*json.loads(line))


def listing_digest(entries: Iterable[Entry]) -> str:
    """SHA-256 of a listing, by which a source is recognised: no image is read."""
    listing = sha256()
    for entry in entries:
        listing.update(listing_line(entry).encode())
    return listing.hexdigest()


def _examine_batch(source: Source, max_pixels: int, batch: Sequence[Entry]) -> Iterator[list[Accepted | Rejected]]:
    yield list(source.examine(batch, max_pixels))
