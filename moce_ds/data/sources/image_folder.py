"""The files of a folder of images as a source.

No single entry ends a listing: an inaccessible entry has the size `ODD`, and `why_odd` returns the reason.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.text import in_line
from moce_ds.data.image_file import EMPTY, NOT_A_FILE, NOT_AN_IMAGE, UNREADABLE, Accepted, Rejected, examine
from moce_ds.data.sources.source import Entry

ODD = -1
"""The size of an entry that is not a regular file or is not accessible."""

_Identity = tuple[int, int]
_OF_THE_SYSTEM = {"lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db"}


def list_files(source: Path) -> list[Entry]:
    """All entries of `walk`."""
    return list(walk(source))


def walk(source: Path) -> Iterator[Entry]:
    """All entries below `source` except folders, in the order of their paths; links are followed.

    A folder that cannot be listed, or that a link leads back to, is an entry of size `ODD`. Only the entries of a
    folder and of those above it are in memory.

    Raises:
        DataError: `source` is not a folder, or cannot be listed.
    """
    top = _in_order(_entries_of_source(source), "", frozenset([_identity(source.stat())]))
    waiting = [iter(top)]  # not a recursion, because a tree may exceed its depth limit
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
        elif isinstance(found, Entry):
            yield found
        else:
            path, ancestors = found
            try:
                waiting.append(iter(_in_order(_entries(f"{source}/{path}"), path, ancestors)))
            except OSError as error:  # deleted since its parent was listed
                _raise_if_machine_failed(error, f"{source}/{path}")
                yield Entry(path, ODD)


def list_folder(folder: Path) -> dict[str, int]:
    """Names of the entries of one folder except unwanted ones, with their sizes, `ODD` for folders too.

    Raises:
        DataError: `folder` is not a folder, or cannot be listed.
    """
    return {entry.name: _size(entry) for entry in _entries_of_source(folder) if not unwanted(entry.name)}


@dataclass(frozen=True)
class FolderSource:
    """The files below a folder. The folder of an image is its class, relative to `origin`."""

    origin: Path

    def entries(self) -> Iterator[Entry]:
        """As `walk`."""
        return walk(self.origin)

    def examine(self, entries: Sequence[Entry], max_pixels: int) -> Iterator[Accepted | Rejected]:
        """The verdicts about entries of `walk`. Raises DataError: the machine cannot read a file."""
        return (examine_listed(self.origin, entry, max_pixels) for entry in entries)

    def class_order(self, found: Iterable[str]) -> list[str]:
        """The folders in alphabetical order."""
        return sorted(found)

    def files(self) -> Iterator[tuple[str, Path]]:
        """The files of all entries."""
        return ((entry.path, self.origin / entry.path) for entry in self.entries())


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


def _in_order(
    entries: Iterable["os.DirEntry[str]"], path: str, ancestors: frozenset[_Identity]
) -> list[Entry | tuple[str, frozenset[_Identity]]]:
    """The entries of the folder `path`, in the order of the paths of all that is below them; folders with their
    ancestors."""
    found: list[tuple[str, Entry | tuple[str, frozenset[_Identity]]]] = []
    for entry in entries:
        below = f"{path}/{entry.name}" if path else entry.name
        identity = _folder(entry)
        if identity is None:
            found.append((below, Entry(below, _size(entry))))
        elif identity in ancestors or not _can_be_listed(entry):  # a link to a parent folder would never end
            found.append((below, Entry(below, ODD)))
        else:
            found.append((f"{below}/", (below, ancestors | {identity})))
    return [one for _, one in sorted(found, key=itemgetter(0))]


def _can_be_listed(folder: "os.DirEntry[str]") -> bool:
    try:
        os.scandir(folder.path).close()
    except OSError as error:  # forbidden, or too deep for the system
        _raise_if_machine_failed(error, folder.path)
        return False
    return True


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


def examine_listed(source: Path, file: Entry, max_pixels: int) -> Accepted | Rejected:
    """The verdict about an entry of a listing. Raises DataError: the machine cannot read it."""
    if rejected := unwanted(file.path):
        return rejected
    if file.size == ODD:
        return why_odd(source / file.path)
    if file.size == 0:
        return Rejected(EMPTY, "0 bytes")
    return examine(source / file.path, max_pixels)
