"""A list of images in a text file as a source: a path on each line, and after a tab the class, if it has one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.storage.files import reads_from
from moce_ds.common.text import in_line
from moce_ds.data.image_file import EMPTY, Accepted, Rejected, examine
from moce_ds.data.sources.image_folder import ODD, why_odd
from moce_ds.data.sources.source import Entry, listing_line


@dataclass(frozen=True)
class PathList:
    """The images of a list, in its order. Without a tab, the folder in the path of an image is its class.

    Attributes:
        origin: the list, UTF-8. Its paths are relative to its folder, or absolute.
    """

    origin: Path

    def entries(self) -> Iterator[Entry]:
        """An entry for each line that is not empty. Raises DataError: the list cannot be read."""
        cure = "expected a text file in UTF-8 with a path on each line."
        with reads_from(self.origin, cure, DataError), open(self.origin, encoding="utf-8") as lines:
            for line in lines:
                path, tab, label = line.rstrip("\n").partition("\t")
                if path:
                    yield Entry(path, _size(self.origin.parent / path), label=label.strip() if tab else None)

    def examine(self, entries: Sequence[Entry], max_pixels: int) -> Iterator[Accepted | Rejected]:
        """The verdicts about the files. Raises DataError: the machine cannot read one."""
        for entry in entries:
            path = self.origin.parent / entry.path
            if entry.size == ODD:
                yield why_odd(path)
            else:
                yield examine(path, max_pixels) if entry.size else Rejected(EMPTY, "0 bytes")

    def class_order(self, found: Iterable[str]) -> list[str]:
        """The classes in alphabetical order."""
        return sorted(found)

    def files(self) -> Iterator[tuple[str, Path]]:
        """The files of all entries; their classes are listed."""
        return ((listing_line(entry), self.origin.parent / entry.path) for entry in self.entries())


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in it
        if isinstance(error, OSError) and machine_failed(error):
            raise refused(DataError, f"{in_line(path)} cannot be read", error, path) from None
        return ODD
    return status.st_size if S_ISREG(status.st_mode) else ODD
