"""The common interface of artefacts, the recognition of artefacts by path, and records of what they are made from.

An artefact is a file or a folder that `moce` writes. One class, in the package of its subject, knows its paths and its
format. `moce inspect`, the report and the workflow ask that class. Writing differs between kinds, so each class has a
`write` method or a writer function; both leave the complete artefact or nothing.

The writer of an artefact records all that determines its content (`MadeFrom`): settings, and fingerprints of its
inputs. A later command compares this record with its own settings and inputs. If the record is *absent*, it makes the
artefact. If it is the *same*, it keeps or resumes the artefact. If it is *different*, it refuses and lists the
differences, or makes the artefact again.
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


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a record with the current settings and inputs.

    Attributes:
        differences: dotted keys whose values differ, with the recorded and the current value; None if there is no
            record.
    """

    differences: dict[str, tuple[Any, Any]] | None

    @property
    def absent(self) -> bool:
        """Whether there is no record."""
        return self.differences is None

    @property
    def same(self) -> bool:
        """Whether there is a record without differences."""
        return self.differences == {}

    @property
    def listed(self) -> str:
        """The differences as text, one indented line each."""
        return "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in (self.differences or {}).items())

    def refuse_different(self, what: str, kind: type[MoceError] = ArtefactError) -> None:
        """Raise `kind`, listing all differences, if there is a record and it differs.

        Args:
            what: the path and its content, such as "runs/clusters holds clusters".
        """
        if self.differences:
            raise kind(f"{what} made from something else; choose another folder or delete it:{self.listed}")


@dataclass(frozen=True)
class MadeFrom:
    """All that determines the content of an artefact.

    Attributes:
        parts: plain data that JSON can hold.
        settings: the settings class of each part that is a tree of settings. Records of earlier versions are completed
            with the defaults of newer settings.
        digests: parts that map names to digests. A digest that is None in the record of an earlier version is unknown
            and counts as the same.
    """

    parts: dict[str, Any]
    settings: Mapping[str, type[Any]] = field(default_factory=dict)
    digests: Sequence[str] = ()

    def compare(self, recorded: Mapping[str, Any] | None) -> Comparison:
        """Compare with a record (None: there is no record). Other keys of the record are ignored."""
        if recorded is None:
            return Comparison(None)
        old = {name: recorded[name] for name in self.parts if name in recorded}
        for name, kind in self.settings.items():
            if isinstance(old.get(name, {}), dict):
                old[name] = completed(old.get(name, {}), kind)
        for name in self.digests:
            if isinstance(old.get(name), dict):
                now = self.parts[name]
                old[name] = {key: now.get(key) if known is None else known for key, known in old[name].items()}
        return Comparison(differences(old, json.loads(json.dumps(self.parts))))  # as JSON returns it: no tuples


def mebibytes(sizes: Iterable[int]) -> str:
    """A sum of sizes in bytes, as text in MiB."""
    return f"{sum(sizes) / 2**20:.1f} MiB"


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, shortened, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shortened(name, _NAME) for name in names[:_SHOWN]) + more
