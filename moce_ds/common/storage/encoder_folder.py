"""The folders of dense models, as files: an encoder for timm, or an export for another library.

encoder/
    model.safetensors   weights, by timm's parameter names
    provenance.json     where the encoder comes from
    ...                 other files of the encoder, such as the head of a tuned one
    config.json         shape, input, and the checksums of the other files and of itself; written last

export/
    ...                 what the library reads
    provenance.json     where it comes from
    export.json         format, part, shape, input, and the checksums of the other files and of itself; written last

`models/vit.py` reads the content of an encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import safe_open

from moce_ds.common.storage.artefact import Rows, is_marked, mebibytes
from moce_ds.common.storage.checksums import (
    FileRecord,
    Files,
    Findings,
    check_file,
    document_findings,
    file_findings,
    names_below,
    read_checked,
    records_of,
    write_checked,
)
from moce_ds.common.storage.files import read_json, read_record, reads_from, sha256_of, write_json
from moce_ds.common.text import route_label

WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
EXPORT = "export.json"
_ENCODER_FORMAT, _EXPORT_FORMAT = "moce_ds encoder 1", "moce_ds export 1"
_ENCODER, _EXPORT, _MADE_BY = "an encoder folder", "an export", "moce export"

T = TypeVar("T")


@dataclass(frozen=True)
class _EncoderRecord:
    """The part of `config.json` that verification reads."""

    sha256: str
    files: Files | None = None


@dataclass(frozen=True)
class ModelShape:
    """The shape of a ViT, as recorded and shown."""

    image_size: int
    patch_size: int
    width: int
    depth: int

    def __str__(self) -> str:
        return f"{self.depth} blocks, width {self.width}, patch {self.patch_size}, {self.image_size} px"


@dataclass(frozen=True)
class _Description:
    """The part of `config.json` that is shown."""

    shape: ModelShape
    input: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class EncoderFolder:
    """An encoder folder as an artefact. `models.vit.load_encoder` loads the encoder."""

    kind: ClassVar[str] = "encoder"
    marks: ClassVar[tuple[str, ...]] = (WEIGHTS, PROVENANCE)  # without its weights it is a damaged encoder
    last_file: ClassVar[str] = CONFIG  # written last, with checksums of the others
    path: Path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the folder holds an encoder's weights, or the provenance of an encoder."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path) -> "EncoderFolder":
        """The folder; its files are read when they are asked for."""
        return cls(path)

    @property
    def made_from(self) -> dict[str, Any]:
        """`provenance.json`: the checkpoint, the route and the votes of an export. Raises ArtefactError."""
        return read_provenance(self.path)

    def verify(self) -> Findings:
        """All differences from what was written. Raises ArtefactError if `config.json` is missing or damaged."""
        record = read_config(self.path, _EncoderRecord)
        found = document_findings(self.path / CONFIG, CONFIG)
        if record.files is not None:
            return found + file_findings(self.path, record.files)
        weights = self.path / WEIGHTS
        if not weights.is_file():
            return found + Findings([f"{WEIGHTS}: is missing"])
        differs = [] if sha256_of(weights) == record.sha256 else [f"{WEIGHTS}: is damaged or was exchanged"]
        return found + Findings(differs) + file_findings(self.path, None, [PROVENANCE])

    def describe(self) -> Rows:
        """Shape, input, weights and origin. Raises ArtefactError."""
        config, provenance = read_config(self.path, _Description), self.made_from
        weights = self.path / WEIGHTS
        with reads_from(weights, "export it again."), safe_open(weights, "np") as file:
            tensors = len(file.keys())  # from the header, whose sizes are compared with the file's
        return {
            "shape": str(config.shape),
            "input": str(config.input),
            "weights": f"{tensors} tensors, {mebibytes([weights.stat().st_size])}",
            **described_origin(provenance),
        }


@dataclass(frozen=True)
class _ExportRecord:
    """The part of `export.json` that is read."""

    target: str
    part: str
    shape: ModelShape
    input: dict[str, Any]
    files: dict[str, FileRecord | str]
    """An earlier version wrote SHA-256 alone."""


@dataclass(frozen=True)
class ExportFolder:
    """An export for another library as an artefact."""

    kind: ClassVar[str] = "export"
    marks: ClassVar[tuple[str, ...]] = (EXPORT,)
    path: Path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the folder is such an export, even without its record. Raises ArtefactError."""
        return is_marked(path, cls.marks) or _has_lost_its_record(path)

    @classmethod
    def open(cls, path: Path) -> "ExportFolder":
        """The folder; its files are read when they are asked for."""
        return cls(path)

    @property
    def made_from(self) -> dict[str, Any]:
        """`provenance.json`: the checkpoint, the route and the votes. Raises ArtefactError."""
        return read_record(self.path / PROVENANCE, dict[str, Any], _EXPORT, _MADE_BY)

    def verify(self) -> Findings:
        """All differences from what was written. Raises ArtefactError if `export.json` is missing or damaged."""
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

    def _record(self) -> _ExportRecord:
        return read_checked(self.path / EXPORT, _ExportRecord, _EXPORT, _MADE_BY, format=_EXPORT_FORMAT)


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `config.json` with the checksums of all other files in the folder."""
    others = [name for name in names_below(folder) if name != CONFIG]
    files = records_of(folder, others)
    write_checked(
        folder / CONFIG, {"format": _ENCODER_FORMAT, **content, "sha256": files[WEIGHTS]["sha256"], "files": files}
    )


def replace_provenance(folder: Path, provenance: Any) -> None:
    """Replace `provenance.json` in a complete encoder folder, and update its checksum in `config.json`."""
    write_json(folder / PROVENANCE, provenance)
    write_config(folder, read_json(folder / CONFIG, _ENCODER, _MADE_BY))


def read_config(folder: Path, kind: type[T]) -> T:
    """`config.json` as a `kind`. Raises ArtefactError if it is missing, damaged or of another version."""
    return read_checked(folder / CONFIG, kind, _ENCODER, _MADE_BY, format=_ENCODER_FORMAT)


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of an encoder. Raises ArtefactError."""
    provenance = read_record(folder / PROVENANCE, dict[str, Any], _ENCODER, _MADE_BY)
    check_file(folder, PROVENANCE, read_config(folder, _EncoderRecord).files, "export it again.")
    return provenance


def described_origin(provenance: Mapping[str, Any]) -> Rows:
    """The part of a provenance that is shown."""
    shown = {name: value for name, value in provenance.items() if not isinstance(value, dict)}
    if isinstance(route := shown.get("route"), list):
        shown["route"] = route_label(route)
    return {name: str(value) for name, value in shown.items()}


def write_export_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `export.json` with the checksums of all other files in the folder.

    Args:
        content: `target` (the format), `part`, `shape` and `input`, as plain data.
    """
    files = records_of(folder, names_below(folder))
    write_checked(folder / EXPORT, {"format": _EXPORT_FORMAT, **content, "files": files})


def _has_lost_its_record(path: Path) -> bool:
    """Whether the provenance of a folder without `export.json` is that of an export for another library."""
    if not (path / PROVENANCE).is_file():
        return False
    provenance = read_json(path / PROVENANCE, _EXPORT, _MADE_BY)
    origin = [provenance.get(key) for key in ("format", "part")] if isinstance(provenance, dict) else []
    return origin not in ([], [None, None], ["timm", "encoder"])
