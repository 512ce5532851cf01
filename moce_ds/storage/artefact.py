"""What every artefact offers, which artefact a path is, and what it is made from.

An artefact is a file or a folder that `moce` writes. One class, in the folder of its subject, knows its paths and its
format. `moce inspect`, the report and the workflow ask that class. How an artefact is written differs from kind to
kind, so each class has its own `write` or its own writer; both leave the whole artefact or nothing.

Whoever writes an artefact keeps a record of all that decides its content: settings, and fingerprints of what it reads
(`MadeFrom`). When the same place is asked for again, the record has one of three outcomes: *absent*, make it; *same*,
keep it or resume it; *different*, refuse and name the differences, or make it again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from moce_ds.config.settings import completed, differences
from moce_ds.errors import ArtefactError, MoceError
from moce_ds.storage.checksums import Findings
from moce_ds.storage.drafts import restore
from moce_ds.text import shortened

Rows = dict[str, str]
"""Names and values that describe an artefact, in the order in which they are shown."""

_NAME, _SHOWN = 60, 12  # characters shown of a name, names shown of a list


class Artefact(Protocol):
    """One artefact on disk.

    Attributes:
        kind: what messages call it, such as "shard set".
        marks: names of files; a folder with one of them is of this kind.
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


@dataclass(frozen=True)
class Comparison:
    """What a record says, beside what is asked for now.

    Attributes:
        differences: dotted keys at which the two differ, with the recorded value and the one of now; None where there
            is no record.
    """

    differences: dict[str, tuple[Any, Any]] | None

    @property
    def absent(self) -> bool:
        """Whether there is no record."""
        return self.differences is None

    @property
    def same(self) -> bool:
        """Whether there is a record, and it says the same."""
        return self.differences == {}

    @property
    def listed(self) -> str:
        """The differences, each on an indented line of its own."""
        return "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in (self.differences or {}).items())

    def refuse_different(self, what: str, kind: type[MoceError] = ArtefactError) -> None:
        """Raise `kind`, which names every difference, if there is a record and it differs.

        Args:
            what: the place and what it holds, such as "runs/clusters holds clusters".
        """
        if self.differences:
            raise kind(f"{what} made from something else; choose another folder or delete it:{self.listed}")


@dataclass(frozen=True)
class MadeFrom:
    """All that decides the content of an artefact.

    Attributes:
        parts: plain data, as JSON can hold it.
        settings: for each part that is a tree of settings, their class: a record of an earlier version is completed
            with the defaults of settings added since.
    """

    parts: dict[str, Any]
    settings: Mapping[str, type[Any]] = field(default_factory=dict)

    def compare(self, recorded: Mapping[str, Any] | None) -> Comparison:
        """Compare with a record, None where there is none. What else the record holds decides nothing."""
        if recorded is None:
            return Comparison(None)
        old = {name: recorded[name] for name in self.parts if name in recorded}
        for name, kind in self.settings.items():
            if isinstance(old.get(name, {}), dict):
                old[name] = completed(old.get(name, {}), kind)
        return Comparison(differences(old, json.loads(json.dumps(self.parts))))  # as it is read again: no tuples


def mebibytes(sizes: Iterable[int]) -> str:
    """A sum of sizes in bytes, as people read it."""
    return f"{sum(sizes) / 2**20:.1f} MiB"


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, shortened, and how many follow."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shortened(name, _NAME) for name in names[:_SHOWN]) + more
