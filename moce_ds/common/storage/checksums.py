"""Checksums of an artefact's files, stored in one of its JSON documents, and the checksum of that document itself.

        {"format": ..., "files": {"ids.npy": {"bytes": 240, "sha256": "..."}}, ..., "content_sha256": "..."}

`content_sha256` covers all other keys, serialised with sorted keys and without spaces. Earlier versions wrote neither:
such an artefact still opens, and its verification lists the parts that cannot be verified.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moce_ds.common.errors import ArtefactError, MoceError
from moce_ds.common.host.machine import refused
from moce_ds.common.storage.files import read_json, reads_from, record_in, sha256_of, write_json

CHECKSUM = "content_sha256"

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hex SHA-256 of a file when it was written."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of an existing file."""
        return cls(path.stat().st_size, sha256_of(path))


Files = dict[str, FileRecord]
"""Records by file name relative to the folder of the document, with `/` as separator."""


@dataclass(frozen=True)
class Findings:
    """The result of verifying an artefact, one line per finding; a line begins with the name of its file.

    Attributes:
        faults: differences from what was written.
        unverified: files of an earlier version without a checksum, which cannot be verified.
    """

    faults: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)

    def __add__(self, other: "Findings") -> "Findings":
        return Findings(self.faults + other.faults, self.unverified + other.unverified)

    def below(self, folder: str) -> "Findings":
        """The same findings with paths relative to the parent of `folder`."""
        return Findings(*([f"{folder}/{line}" for line in lines] for lines in (self.faults, self.unverified)))


def records_of(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The records of some files of a folder, as plain data."""
    return {name: asdict(FileRecord.of(folder / name)) for name in sorted(names)}


def names_below(folder: Path, prefix: str = "") -> list[str]:
    """The names of all files below a folder, in the form of `Files`."""
    return [f"{prefix}{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()]


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != CHECKSUM}))
    return {**plain, CHECKSUM: _digest(plain)}


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own checksum, atomically."""
    write_json(path, with_checksum(content))


def has_checksum(content: Any) -> bool:
    """Whether a JSON document contains a checksum of itself, valid or not."""
    return isinstance(content, dict) and (CHECKSUM in content or _mangled(content))


def checksum_holds(content: Any) -> bool:
    """Whether a JSON document is unchanged; true for one without a checksum."""
    if not isinstance(content, dict) or CHECKSUM not in content:
        return not _mangled(content)
    return bool(content[CHECKSUM] == _digest({key: value for key, value in content.items() if key != CHECKSUM}))


def check_document(path: Path, content: Any, what: str, made_by: str) -> None:
    """Raise ArtefactError if a JSON document does not match its checksum."""
    if not checksum_holds(content):
        raise ArtefactError(
            f"{path} is damaged or was edited: its content does not match its checksum: restore it from a copy, or "
            f"write {what} again with `{made_by}`."
        )


def read_checked(path: Path, kind: type[T], what: str, made_by: str, **version: object) -> T:
    """As `files.read_record`, for a document that may contain a checksum of itself.

    Raises:
        ArtefactError: as `read_record`; or the content does not match its checksum.
    """
    content = read_json(path, what, made_by)
    record = record_in(content, path, kind, what, made_by, **version)
    check_document(path, content, what, made_by)
    return record


def document_findings(path: Path, name: str) -> Findings:
    """Findings about a JSON document that was read without an error."""
    unverified = [] if has_checksum(read_json(path, name, "moce")) else [written_before(name)]
    return Findings(unverified=unverified)


def written_before(name: str) -> str:
    """The finding about a file of an earlier version."""
    return f"{name}: written before it had a checksum; it cannot be verified"


def check_file(folder: Path, name: str, files: Files | None, cure: str, kind: type[MoceError] = ArtefactError) -> None:
    """Raise if a file differs from its record. A file without a record, from an earlier version, passes.

    Raises:
        ArtefactError, or `kind`: the file is missing or its content differs; `cure` says what to do.
    """
    if files is None or name not in files:
        return
    try:
        fault = _fault(folder / name, files[name])
    except OSError as error:
        raise refused(kind, f"{folder / name} cannot be read", error, folder / name) from None
    if fault:
        raise kind(f"{folder / name} {fault}: {cure}")


def check_size(folder: Path, name: str, files: Files | None, cure: str, kind: type[MoceError] = ArtefactError) -> None:
    """As `check_file`, but compares only the size: it does not read the file."""
    if files is None or name not in files:
        return
    with reads_from(folder / name, cure, kind):
        size = (folder / name).stat().st_size
    if size != files[name].bytes:
        raise kind(f"{folder / name} {_wrong_size(size, files[name])}: {cure}")


def file_findings(folder: Path, files: Files | None, names: Iterable[str] = ()) -> Findings:
    """Findings about the files of a folder: those with a record, or `names` if an earlier version wrote no records."""
    if files is None:
        missing = [f"{name}: is missing" for name in names if not (folder / name).is_file()]
        return Findings(missing, [written_before(name) for name in names if (folder / name).is_file()])
    return Findings([f"{name}: {fault}" for name, one in files.items() if (fault := _finding(folder / name, one))])


def _finding(path: Path, record: FileRecord) -> str | None:
    """The fault of a file, or None; an unreadable file is a fault, so that verification continues."""
    try:
        return _fault(path, record)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _fault(path: Path, record: FileRecord) -> str | None:
    """The difference of a file from its record, or None. Raises OSError if it exists but cannot be read."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return _wrong_size(size, record)
        return None if sha256_of(path) == record.sha256 else "is damaged or was exchanged: its checksum differs"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"


def _wrong_size(size: int, record: FileRecord) -> str:
    return f"is damaged: it has {size} bytes, expected {record.bytes}"


def _mangled(content: Any) -> bool:
    """Whether a document has its checksum under another key, because the name of the key was damaged."""
    if not isinstance(content, dict) or CHECKSUM in content:
        return False
    digests = [key for key, value in content.items() if isinstance(value, str) and len(value) == 64]
    return any(_digest({k: v for k, v in content.items() if k != key}) == content[key] for key in digests)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
