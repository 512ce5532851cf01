"""The entries of folders as they are found. No single entry can end the listing of the others: one that cannot be
looked at is listed with the size `ODD`, and `why_odd` says what it is.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moce_ds.data.image_file import NOT_A_FILE, NOT_AN_IMAGE, UNREADABLE, Rejected
from moce_ds.errors import DataError
from moce_ds.host.machine import machine_failed, refused
from moce_ds.text import in_line

ODD = -1
"""The size of what is no regular file, or cannot be looked at."""

_Identity = tuple[int, int]
_OF_THE_SYSTEM = {"lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db"}


class SourceFile(NamedTuple):
    """An entry as listed: path relative to the source folder, and size in bytes or `ODD`."""

    path: str
    size: int


def list_files(source: Path) -> list[SourceFile]:
    """Everything below `source` that is not a folder, sorted by path; links are followed.

    A folder that cannot be listed, or that links lead back to, is an entry itself, of size `ODD`.

    Raises:
        DataError: `source` is not a folder, or cannot be listed.
    """
    return sorted(_walk(source))


def list_folder(folder: Path) -> dict[str, int]:
    """Names of the entries of one folder, without those that nobody wants, with their sizes, `ODD` for folders too.

    Raises:
        DataError: `folder` is not a folder, or cannot be listed.
    """
    return {entry.name: _size(entry) for entry in _entries_of_source(folder) if not unwanted(entry.name)}


def unwanted(path: str) -> Rejected | None:
    """Why a file is left out by its name alone, whatever it holds; None where it is not."""
    parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return Rejected(NOT_AN_IMAGE, "hidden file, or in a hidden folder")
    if found := _OF_THE_SYSTEM.intersection(parts):
        return Rejected(NOT_AN_IMAGE, f"{found.pop()} belongs to the system")
    return None


def leads_out(path: str) -> bool:
    """Whether a path that a data set lists cannot be that of a file below its folder.

    Links in the folder are followed wherever they lead: data sets are often kept as links.
    """
    try:
        return path.startswith("/") or ".." in path.split("/") or not path.strip("./") or b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        return True


def why_odd(path: Path) -> Rejected:
    """Why an entry has the size `ODD`. Raises DataError where the machine fails, which says nothing about it."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            os.scandir(path).close()
    except OSError as error:
        _raise_if_machine_failed(error, path)
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return Rejected(UNREADABLE, f"{type(error).__name__}: {error.strerror}")
    return Rejected(NOT_A_FILE, "broken link, link to itself or to a parent folder, pipe, socket or device")


def _walk(source: Path) -> Iterator[SourceFile]:
    found = _entries_of_source(source)
    # Folders that are to be listed: no calls within one another, since a tree may be deeper than those can be.
    waiting: list[tuple[str, frozenset[_Identity]]] = []
    path, ancestors = "", frozenset([_identity(source.stat())])
    while True:
        for entry in found:
            below = f"{path}/{entry.name}" if path else entry.name
            identity = _folder(entry)
            if identity is None:
                yield SourceFile(below, _size(entry))
            elif identity in ancestors:  # a link to one of its own parents has no end
                yield SourceFile(below, ODD)
            else:
                waiting.append((below, ancestors | {identity}))
        if not waiting:
            return
        path, ancestors = waiting.pop()
        try:
            found = _entries(f"{source}/{path}")
        except OSError as error:  # closed, gone meanwhile, too deep for the system
            _raise_if_machine_failed(error, f"{source}/{path}")
            found = []
            yield SourceFile(path, ODD)


def _entries_of_source(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        return _entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{in_line(folder)} is not a folder: expected one that holds images, at any depth.") from None
    except OSError as error:
        _raise_if_machine_failed(error, folder)
        raise DataError(f"{in_line(folder)} cannot be listed ({error.strerror}): make it readable.") from None


def _entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return list(entries)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _folder(entry: "os.DirEntry[str]") -> _Identity | None:
    """What a folder is known by; None for what is none or cannot be looked at, such as a link into a closed one."""
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
    """Raise DataError where an entry that cannot be looked at is no odd one, but the machine fails."""
    if machine_failed(error):
        raise refused(DataError, f"{in_line(path)} cannot be read", error, Path(path)) from None
