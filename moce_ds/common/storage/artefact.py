"""The common interface of artefacts, and the recognition of artefacts by path.

An artefact is a file or a folder that `moce` writes. One class, in the package of its subject, knows its paths and its
format. `moce inspect`, the report and the workflow ask that class. Writing differs between kinds, so each class has a
`write` method or a writer function; both leave the complete artefact or nothing.

The writer of an artefact records all that determines its content (`common/config/made_from.py`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.checksums import Findings
from moce_ds.common.storage.drafts import restore
from moce_ds.common.text import shortened

Rows = dict[str, str]
"""Names and values that describe an artefact, in the order in which they are shown."""

_NAME, _SHOWN = 60, 12  # characters shown of a name, names shown of a list


class Artefact(Protocol):
    """One artefact on disk.

    Attributes:
        kind: its name in messages, such as "shard set".
        marks: names of files; a folder that contains one of them is of this kind.
    """

    kind: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is an artefact of this kind, whole or damaged."""
        ...

    @classmethod
    def open(cls, path: Path, /) -> Self:
        """Open the artefact at `path`. Raises MoceError if a part that all others depend on is damaged."""
        ...

    def verify(self) -> Findings:
        """Read all files and return all differences from what was written. Raises MoceError if `open` does."""
        ...

    def describe(self) -> Rows:
        """Describe the content of the artefact. Raises MoceError if it is damaged."""
        ...

    @property
    def made_from(self) -> dict[str, Any]:
        """The fingerprints and settings that determined the content, as plain data. Raises MoceError if damaged."""
        ...


def is_marked(path: Path, marks: Iterable[str]) -> bool:
    """Whether a folder holds one of the files that mark a kind of artefact."""
    return any((path / mark).exists() for mark in marks)


def recognised(path: Path, kinds: Sequence[type[Artefact]]) -> type[Artefact]:
    """The first of `kinds` that recognises `path`.

    Raises:
        ArtefactError: `path` does not exist, or is none of `kinds`.
    """
    restore(path)
    for kind in kinds:
        if kind.recognises(path):
            return kind
    if not path.exists():
        raise ArtefactError(f"{path} not found.")
    known = ", ".join(f"{kind.kind} ({mark})" for kind in kinds for mark in kind.marks)
    raise ArtefactError(f"{path} was not written by moce. Artefacts contain one of these files: {known}.")


def mebibytes(sizes: Iterable[int]) -> str:
    """A sum of sizes in bytes, as text in MiB."""
    return f"{sum(sizes) / 2**20:.1f} MiB"


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, shortened, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shortened(name, _NAME) for name in names[:_SHOWN]) + more
