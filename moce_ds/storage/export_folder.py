"""The folder of a dense model exported for another library than timm; the files are those of that library.

export/
  ...                 what the library reads
  provenance.json     where it comes from
  export.json         format, part, shape, input, and the checksums of the other files and of itself; written last
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moce_ds.storage.artefact import Rows, is_marked
from moce_ds.storage.checksums import (
    FileRecord,
    Findings,
    document_findings,
    file_findings,
    names_below,
    read_checked,
    records_of,
    write_checked,
)
from moce_ds.storage.encoder_folder import PROVENANCE, ModelShape, described_origin
from moce_ds.storage.files import read_json, read_record, sha256_of

FORMAT = "moce_ds export 1"
EXPORT = "export.json"
_WHAT, _MADE_BY = "an export", "moce export"


@dataclass(frozen=True)
class _Record:
    """What is read of `export.json`."""

    target: str
    part: str
    shape: ModelShape
    input: dict[str, Any]
    files: dict[str, FileRecord | str]
    """An earlier version wrote SHA-256 alone."""


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `export.json` with the checksums of all files that are in the folder by now.

    Args:
        content: `target` (the format), `part`, `shape` and `input`, as plain data.
    """
    files = records_of(folder, names_below(folder))
    write_checked(folder / EXPORT, {"format": FORMAT, **content, "files": files})


@dataclass(frozen=True)
class ExportFolder:
    """An export for another library as an artefact."""

    kind: ClassVar[str] = "export"
    marks: ClassVar[tuple[str, ...]] = (EXPORT,)
    path: Path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the folder is such an export, also one that has lost its record. Raises ArtefactError."""
        return is_marked(path, cls.marks) or _has_lost_its_record(path)

    @classmethod
    def open(cls, path: Path) -> "ExportFolder":
        """The folder; its files are read when they are asked for."""
        return cls(path)

    @property
    def made_from(self) -> dict[str, Any]:
        """`provenance.json`: the checkpoint, the route and the votes. Raises ArtefactError."""
        return read_record(self.path / PROVENANCE, dict[str, Any], _WHAT, _MADE_BY)

    def verify(self) -> Findings:
        """Everything that is not as it was written. Raises ArtefactError: `export.json` is missing or damaged."""
        record = self._record()
        document = document_findings(self.path / EXPORT, EXPORT)
        files = {name: one for name, one in record.files.items() if isinstance(one, FileRecord)}
        if len(files) == len(record.files):
            return document + file_findings(self.path, files)
        faults = [
            f"{name}: {'is damaged or was exchanged' if (self.path / name).is_file() else 'is missing'}"
            for name, sha256 in record.files.items()
            if not (self.path / name).is_file() or sha256_of(self.path / name) != sha256
        ]
        return Findings(faults) + document

    def describe(self) -> Rows:
        """Format, shape, input, files and origin. Raises ArtefactError."""
        record = self._record()
        return {
            "for": f"{record.target} ({record.part})",
            "shape": str(record.shape),
            "input": str(record.input),
            "files": ", ".join(record.files),
            **described_origin(self.made_from),
        }

    def _record(self) -> _Record:
        return read_checked(self.path / EXPORT, _Record, _WHAT, _MADE_BY, format=FORMAT)


def _has_lost_its_record(path: Path) -> bool:
    """Whether a folder without `export.json` says that it was exported for another library."""
    if not (path / PROVENANCE).is_file():
        return False
    provenance = read_json(path / PROVENANCE, _WHAT, _MADE_BY)
    origin = [provenance.get(key) for key in ("format", "part")] if isinstance(provenance, dict) else []
    return origin not in ([], [None, None], ["timm", "encoder"])
