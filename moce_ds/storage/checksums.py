"""Checksums of an artefact's files, kept in one of its JSON documents, and of that document, kept in itself.

    {"format": ..., "files": {"ids.npy": {"bytes": 240, "sha256": "..."}}, ..., "content_sha256": "..."}

`content_sha256` is that of all the rest, serialised with sorted keys and without spaces. Earlier versions wrote
neither: such an artefact opens, and its verification lists what nothing can be said about.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moce_ds.errors import ArtefactError, MoceError
from moce_ds.host.machine import refused
from moce_ds.storage.files import read_json, read_record, sha256_of, write_json

CHECKSUM = "content_sha256"

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when written: size in bytes, and hex SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file that is there."""
        return cls(path.stat().st_size, sha256_of(path))


Files = dict[str, FileRecord]
"""By name, with `/` between the parts, relative to the folder of the document."""


@dataclass(frozen=True)
class Findings:
    """What verifying an artefact has found, a line each; a line begins with the file that it is about.

    Attributes:
        faults: what is not as it was written.
        unverified: what an earlier version wrote without a checksum, so that nothing can be said about it.
    """

    faults: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)

    def __add__(self, other: "Findings") -> "Findings":
        return Findings(self.faults + other.faults, self.unverified + other.unverified)

    def below(self, folder: str) -> "Findings":
        """The same as seen from the folder above."""
        return Findings(*([f"{folder}/{line}" for line in lines] for lines in (self.faults, self.unverified)))


def records_of(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The records of files of a folder, as plain data."""
    return {name: asdict(FileRecord.of(folder / name)) for name in sorted(names)}


def names_below(folder: Path, prefix: str = "") -> list[str]:
    """The names of all files below a folder, as `Files` has them."""
    return [f"{prefix}{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()]


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != CHECKSUM}))
    return {**plain, CHECKSUM: _digest(plain)}


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own checksum, atomically."""
    write_json(path, with_checksum(content))


def has_checksum(content: Any) -> bool:
    """Whether a JSON document holds a checksum of itself, right or wrong."""
    return isinstance(content, dict) and (CHECKSUM in content or _mangled(content))


def checksum_holds(content: Any) -> bool:
    """Whether a JSON document is what was written; true of one without a checksum."""
    if not isinstance(content, dict) or CHECKSUM not in content:
        return not _mangled(content)
    return bool(content[CHECKSUM] == _digest({key: value for key, value in content.items() if key != CHECKSUM}))


def check_document(path: Path, content: Any, what: str, made_by: str) -> None:
    """Refuse a JSON document that is not what was written. Raises ArtefactError."""
    if not checksum_holds(content):
        raise ArtefactError(
            f"{path} is damaged or was edited: its content does not match its checksum: restore it from a copy, or "
            f"write {what} again with `{made_by}`."
        )


def read_checked(path: Path, kind: type[T], what: str, made_by: str, **version: object) -> T:
    """As `files.read_record`, of a document that may hold a checksum of itself.

    Raises:
        ArtefactError: as `read_record`; or the content does not match its checksum.
    """
    record = read_record(path, kind, what, made_by, **version)
    check_document(path, read_json(path, what, made_by), what, made_by)
    return record


def document_findings(path: Path, name: str) -> Findings:
    """What is to be said of a JSON document of ours, that has been read without a fault otherwise."""
    unverified = [] if has_checksum(read_json(path, name, "moce")) else [written_before(name)]
    return Findings(unverified=unverified)


def written_before(name: str) -> str:
    """The line about a file that an earlier version wrote."""
    return f"{name}: written before it had a checksum; nothing can be said about it"


def check_file(folder: Path, name: str, files: Files | None, cure: str, kind: type[MoceError] = ArtefactError) -> None:
    """Refuse a file that is not what was written; one without a record, of an earlier version, passes.

    Raises:
        ArtefactError, or `kind`: the file is missing, or its content is another; `cure` says what to do.
    """
    if files is None or name not in files:
        return
    try:
        fault = _fault(folder / name, files[name])
    except OSError as error:
        raise refused(kind, f"{folder / name} cannot be read", error, folder / name) from None
    if fault:
        raise kind(f"{folder / name} {fault}: {cure}")


def file_findings(folder: Path, files: Files | None, names: Iterable[str] = ()) -> Findings:
    """What is to be said of the files of a folder: those on record, or those of `names` where an earlier version wrote
    no records."""
    if files is None:
        missing = [f"{name}: is missing" for name in names if not (folder / name).is_file()]
        return Findings(missing, [written_before(name) for name in names if (folder / name).is_file()])
    return Findings([f"{name}: {fault}" for name, one in files.items() if (fault := _finding(folder / name, one))])


def _finding(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, one that cannot be read included: verification goes on with the next."""
    try:
        return _fault(path, record)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _fault(path: Path, record: FileRecord) -> str | None:
    """In which way a file is not what was written. Raises OSError where it is there and cannot be read."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"is damaged: it has {size} bytes, expected {record.bytes}"
        return None if sha256_of(path) == record.sha256 else "is damaged or was exchanged: its checksum differs"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"


def _mangled(content: Any) -> bool:
    """Whether a document holds its checksum under another key: the name of the key is what was damaged."""
    if not isinstance(content, dict) or CHECKSUM in content:
        return False
    digests = [key for key, value in content.items() if isinstance(value, str) and len(value) == 64]
    return any(_digest({k: v for k, v in content.items() if k != key}) == content[key] for key in digests)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
