"""Lists the files of a folder of images, and examines each one in a pool of processes.

No single entry ends a listing: an inaccessible entry has the size `ODD`, and `why_odd` returns the reason.
"""

import errno
import json
import multiprocessing
import os
import signal
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from moce_ds.common.errors import LOST_PEER, DataError, MoceError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.text import in_line
from moce_ds.data import image_file
from moce_ds.data.image_file import EMPTY, NOT_A_FILE, NOT_AN_IMAGE, UNREADABLE, Accepted, Rejected, examine

ODD = -1
"""The size of an entry that is not a regular file or is not accessible."""

_Identity = tuple[int, int]
_OF_THE_SYSTEM = {"lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db"}

_BATCH = 16  # files per message to a worker
_BATCHES_AHEAD = 3  # per worker, so that one large image does not delay the others


class SourceFile(NamedTuple):
    """A listed entry: path relative to the source folder, and size in bytes or `ODD`."""

    path: str
    size: int


def list_files(source: Path) -> list[SourceFile]:
    """All entries below `source` except folders, sorted by path; links are followed.

    A folder that cannot be listed, or that a link leads back to, is an entry of size `ODD`.

    Raises:
        DataError: `source` is not a folder, or cannot be listed.
    """
    return sorted(_walk(source))


def listing_digest(files: Sequence[SourceFile]) -> str:
    """SHA-256 of paths and sizes, by which a folder of images is recognised: none of its files is read."""
    listing = sha256()
    for file in files:
        listing.update(json.dumps(file).encode() + b"\n")
    return listing.hexdigest()


def list_folder(folder: Path) -> dict[str, int]:
    """Names of the entries of one folder except unwanted ones, with their sizes, `ODD` for folders too.

    Raises:
        DataError: `folder` is not a folder, or cannot be listed.
    """
    return {entry.name: _size(entry) for entry in _entries_of_source(folder) if not unwanted(entry.name)}


def examined(
    source: Path, files: Sequence[SourceFile], max_pixels: int, workers: int | None
) -> Generator[tuple[SourceFile, Accepted | Rejected], None, None]:
    """Each of `files` with its verdict, in order; `workers` processes examine them, None: one per core.

    The workers take turns at batches, and each has its own pipe. If a process dies, even in the middle of a message,
    its pipe closes and the other side notices; the shared queue of an executor would block forever.

    Raises:
        DataError: a worker process died, or the machine cannot read a file (`examine`).
    """
    workers = workers or len(os.sched_getaffinity(0))
    batches = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    team = [_start_worker(source, max_pixels) for _ in range(min(workers, len(batches)))]
    ahead = _BATCHES_AHEAD * len(team)
    number = 0
    try:
        for number, batch in enumerate(batches[:ahead]):
            team[number % len(team)][1].send(batch)
        for number, batch in enumerate(batches):
            _, connection = team[number % len(team)]
            verdicts = connection.recv()
            if isinstance(verdicts, MoceError):
                raise verdicts
            if number + ahead < len(batches):
                connection.send(batches[number + ahead])
            yield from zip(batch, verdicts, strict=True)
    except (EOFError, OSError):
        fault = DataError(
            f"A worker process died between {in_line(batches[number][0].path)} and "
            f"{in_line(batches[number][-1].path)}: perhaps for lack of memory. Rerun the same command to "
            "resume, with fewer `workers=` if it happens again."
        )
        fault.status = LOST_PEER  # the same as for workers that prepare batches (`common/host/machine.py`)
        raise fault from None
    finally:
        for process, connection in team:
            connection.close()
            process.terminate()
            process.join()


def unwanted(path: str) -> Rejected | None:
    """The reason to skip a file because of its name; None to keep it."""
    parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return Rejected(NOT_AN_IMAGE, "hidden file, or in a hidden folder")
    if names := _OF_THE_SYSTEM.intersection(parts):
        return Rejected(NOT_AN_IMAGE, f"{names.pop()} belongs to the system")
    return None


def leads_out(path: str) -> bool:
    """Whether a path listed by a data set leads out of its folder.

    Links in the folder may lead anywhere: data sets are often kept as links.
    """
    try:
        return path.startswith("/") or ".." in path.split("/") or not path.strip("./") or b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        return True


def why_odd(path: Path) -> Rejected:
    """The reason why an entry has the size `ODD`. Raises DataError for a fault of the machine."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            os.scandir(path).close()
    except OSError as error:
        _raise_if_machine_failed(error, path)
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return Rejected(UNREADABLE, f"{type(error).__name__}: {error.strerror}")
    return Rejected(NOT_A_FILE, "broken link, link to itself or to a parent folder, pipe, socket or device")


def _walk(source: Path) -> Iterator[SourceFile]:
    entries = _entries_of_source(source)
    # folders still to list; not a recursion, because a tree may exceed its depth limit
    waiting: list[tuple[str, frozenset[_Identity]]] = []
    path, ancestors = "", frozenset([_identity(source.stat())])
    while True:
        for entry in entries:
            below = f"{path}/{entry.name}" if path else entry.name
            identity = _folder(entry)
            if identity is None:
                yield SourceFile(below, _size(entry))
            elif identity in ancestors:  # a link to a parent folder would never end
                yield SourceFile(below, ODD)
            else:
                waiting.append((below, ancestors | {identity}))
        if not waiting:
            return
        path, ancestors = waiting.pop()
        try:
            entries = _entries(f"{source}/{path}")
        except OSError as error:  # forbidden, deleted, or too deep for the system
            _raise_if_machine_failed(error, f"{source}/{path}")
            entries = []
            yield SourceFile(path, ODD)


def _entries_of_source(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        return _entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{in_line(folder)} is not a folder: expected one with images, at any depth.") from None
    except OSError as error:
        _raise_if_machine_failed(error, folder)
        raise DataError(f"{in_line(folder)} cannot be listed ({error.strerror}): make it readable.") from None


def _entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return list(entries)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _folder(entry: "os.DirEntry[str]") -> _Identity | None:
    """Identity of a folder; None for other entries and inaccessible ones, such as a link into a closed folder."""
    try:
        return _identity(entry.stat()) if entry.is_dir() else None
    except OSError as error:
        _raise_if_machine_failed(error, entry.path)
        return None


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size if entry.is_file() else ODD
    except OSError as error:
        _raise_if_machine_failed(error, entry.path)
        return ODD


def _raise_if_machine_failed(error: OSError, path: Path | str) -> None:
    """Raise DataError if an entry is inaccessible because of a fault of the machine."""
    if machine_failed(error):
        raise refused(DataError, f"{in_line(path)} cannot be read", error, Path(path)) from None


def _start_worker(source: Path, max_pixels: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that threads of torch hold
    context.set_forkserver_preload(["__main__", image_file.__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, source, max_pixels), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(connection: Connection, source: Path, max_pixels: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with suppress(EOFError, ConnectionError):  # the parent has finished, or is dead
        while True:
            batch = connection.recv()
            try:
                verdicts: list[Accepted | Rejected] | MoceError = [
                    _examine_listed(source, file, max_pixels) for file in batch
                ]
            except MoceError as error:
                verdicts = error
            connection.send(verdicts)


def _examine_listed(source: Path, file: SourceFile, max_pixels: int) -> Accepted | Rejected:
    if rejected := unwanted(file.path):
        return rejected
    if file.size == ODD:
        return why_odd(source / file.path)
    if file.size == 0:
        return Rejected(EMPTY, "0 bytes")
    return examine(source / file.path, max_pixels)
