"""Tar files of images as a source, such as those of the `webdataset` library.

The members of a sample have one name up to the first dot of its last part, and follow one another: `n01/0007.jpg`,
`n01/0007.cls`. Images are read by their offset; nothing is unpacked.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moce_ds.common.errors import DataError
from moce_ds.common.host.machine import machine_failed, refused
from moce_ds.common.storage.files import reads_from
from moce_ds.common.text import in_line
from moce_ds.data.image_file import DAMAGED, EMPTY, Accepted, Rejected, examine_bytes, suffixes
from moce_ds.data.sources.image_folder import list_folder, unwanted
from moce_ds.data.sources.source import Entry

_CLASS_BYTES = 1000
_BESIDE = (".tar", ".idx", ".json", ".jsonl", ".txt", ".md", ".csv")
"""Suffixes of files in a folder of tar files; with others, or with folders, it is a folder of images."""

_CURE = "copy it again from its source."


@dataclass(frozen=True)
class TarSource:
    """The images in tar files, in the order of the files' names and then of their members.

    The class of an image is the text of the member `.cls` of its sample, else the folder in the name of its member.

    Attributes:
        origin: a tar file, or a folder of them.
    """

    origin: Path

    def entries(self) -> Iterator[Entry]:
        """The images of all tar files; reads their headers. Raises DataError: a file is damaged."""
        for name, path in self.files():
            try:
                with reads_from(path, _CURE, DataError), tarfile.open(path, "r:") as opened:
                    yield from _images(name, opened)
            except tarfile.TarError as error:
                raise DataError(f"{path} is not a readable tar file ({error}): {_CURE}") from None

    def examine(self, entries: Sequence[Entry], max_pixels: int) -> Iterator[Accepted | Rejected]:
        """The verdicts about images, which are read by their offsets. Raises DataError."""
        with ExitStack() as stack:
            name, descriptor = "", -1
            for entry in entries:
                if (own := entry.path.partition("/")[0]) != name:
                    stack.close()
                    path = self._folder / own
                    with reads_from(path, _CURE, DataError):
                        name, descriptor = own, stack.enter_context(open(path, "rb")).fileno()
                yield self._verdict(entry, descriptor, max_pixels)

    def class_order(self, found: Iterable[str]) -> list[str]:
        """Numbers by their size if all classes are numbers, else in alphabetical order."""
        names = list(found)
        return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else sorted(names)

    def files(self) -> Iterator[tuple[str, Path]]:
        """The tar files. Raises DataError: the folder cannot be listed."""
        single = self.origin.is_file()
        names = [self.origin.name] if single else sorted(n for n in list_folder(self.origin) if n.endswith(".tar"))
        return ((name, self._folder / name) for name in names)

    @property
    def _folder(self) -> Path:
        return self.origin.parent if self.origin.is_file() else self.origin

    def _verdict(self, entry: Entry, descriptor: int, max_pixels: int) -> Accepted | Rejected:
        if hidden := unwanted(entry.path.partition("/")[2]):
            return hidden
        if entry.size == 0:
            return Rejected(EMPTY, "0 bytes")
        try:
            data = os.pread(descriptor, entry.size, entry.key)
        except OSError as error:
            if machine_failed(error):
                raise refused(DataError, f"{in_line(entry.path)} cannot be read", error) from None
            raise
        if len(data) < entry.size:
            return Rejected(DAMAGED, "the tar file ends before the image")
        return examine_bytes(data, max_pixels)


def holds_tars(folder: Path) -> bool:
    """Whether a folder holds tar files, and no folders or files of other kinds but lists."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    names = [entry.name for entry in seen if entry.is_file()]
    return (
        len(names) == len(seen) and any(n.endswith(".tar") for n in names) and all(n.endswith(_BESIDE) for n in names)
    )


def _images(tar: str, opened: tarfile.TarFile) -> Iterator[Entry]:
    """The images of a tar file with their classes; one sample is in memory."""
    sample: list[Entry] = []
    key, label = "", ""
    while member := opened.next():
        opened.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        if not member.isreg() or member.issparse():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        if f"{folder}/{stem}" != key:
            yield from (entry._replace(label=label) for entry in sample)
            key, label, sample = f"{folder}/{stem}", folder, []
        if kind == "cls" and (text := opened.extractfile(member)):
            label = text.read(_CLASS_BYTES).decode("utf-8", "replace").strip()
        elif f".{kind.rpartition('.')[2].lower()}" in suffixes():
            sample.append(Entry(f"{tar}/{member.name}", member.size, member.offset_data))
    yield from (entry._replace(label=label) for entry in sample)
