"""What every artefact offers, and which artefact a path is.

An artefact is a file or a folder that `moce` writes. One class, in the folder of its subject, knows its paths and its
format. `moce inspect`, the report and the workflow ask that class. How an artefact is written differs from kind to
kind, so each class has its own `write` or its own writer; both leave the whole artefact or nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from moce_ds.errors import ArtefactError
from moce_ds.storage.checksums import Findings
from moce_ds.storage.drafts import restore
from moce_ds.text import shortened

Rows = dict[str, str]
"""Names and values that describe an artefact, in the order in which they are shown."""

_NAME = 60  # characters shown of a name


class Artefact(Protocol):
    """One artefact on disk.

    Attributes:
        kind: what messages call it, such as "shard set".
        marks: names of files in its folder, any one of which says what the folder is.
    """

    kind: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is an artefact of this kind, whole or damaged."""
        ...

    @classmethod
    def open(cls, path: Path, /) -> Self:
        """Open the artefact at `path`. Raises MoceError: a part that everything else depends on is damaged."""
        ...

    def verify(self) -> Findings:
        """Read everything, and return what is not as it was written. Raises MoceError as `open`."""
        ...

    def describe(self) -> Rows:
        """What the artefact holds. Raises MoceError: it is damaged."""
        ...

    @property
    def made_from(self) -> dict[str, Any]:
        """What decided the content, as plain data: fingerprints and settings. Raises MoceError: it is damaged."""
        ...


def is_marked(path: Path, marks: Iterable[str]) -> bool:
    """Whether a folder holds one of the files that mark a kind of artefact."""
    return any((path / mark).exists() for mark in marks)


def recognised(path: Path, kinds: Sequence[type[Artefact]]) -> type[Artefact]:
    """The first of `kinds` that recognises `path`.

    Raises:
        ArtefactError: nothing is there, or none of them.
    """
    restore(path)
    for kind in kinds:
        if kind.recognises(path):
            return kind
    if not path.exists():
        raise ArtefactError(f"{path} not found.")
    known = ", ".join(f"{kind.kind} ({mark})" for kind in kinds for mark in kind.marks)
    raise ArtefactError(f"{path} is nothing that moce writes. Known by a file in them: {known}.")


def mebibytes(sizes: Iterable[int]) -> str:
    """A sum of sizes in bytes, as people read it."""
    return f"{sum(sizes) / 2**20:.1f} MiB"


def some_of(names: Sequence[str], shown: int = 12) -> str:
    """The first names of a list, shortened, and how many follow."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(shortened(name, _NAME) for name in names[:shown]) + more
