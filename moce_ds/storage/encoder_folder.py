"""The folder of a trained encoder, as files. `models/vit.py` reads their content.

encoder/
    model.safetensors   weights, by timm's parameter names
    provenance.json     where the encoder comes from
    ...                 other files of the encoder, such as the head of a tuned one
    config.json         shape, input, and the checksums of the other files and of itself; written last
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moce_ds.storage.checksums import (
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
from moce_ds.storage.files import read_json, read_record, sha256_of, write_json

FORMAT = "moce_ds encoder 1"
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
_WHAT, _MADE_BY = "an encoder folder", "moce export"

T = TypeVar("T")


@dataclass(frozen=True)
class _Record:
    sha256: str
    files: Files | None = None


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `config.json` with the checksums of all other files in the folder."""
    others = [name for name in names_below(folder) if name != CONFIG]
    files = records_of(folder, others)
    write_checked(folder / CONFIG, {"format": FORMAT, **content, "sha256": files[WEIGHTS]["sha256"], "files": files})


def replace_provenance(folder: Path, provenance: Any) -> None:
    """Replace `provenance.json` in a complete encoder folder, and update its checksum in `config.json`."""
    write_json(folder / PROVENANCE, provenance)
    write_config(folder, read_json(folder / CONFIG, _WHAT, _MADE_BY))


def read_config(folder: Path, kind: type[T]) -> T:
    """`config.json` as a `kind`. Raises ArtefactError if it is missing, damaged or of another version."""
    return read_checked(folder / CONFIG, kind, _WHAT, _MADE_BY, format=FORMAT)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Where an encoder comes from. Raises ArtefactError."""
    provenance = read_record(folder / PROVENANCE, dict[str, Any], _WHAT, _MADE_BY)
    check_file(folder, PROVENANCE, read_config(folder, _Record).files, "export it again.")
    return provenance


def findings(folder: Path) -> Findings:
    """Everything in an encoder folder that differs from what was written. Raises ArtefactError if it cannot be
    verified."""
    record = read_config(folder, _Record)
    found = document_findings(folder / CONFIG, CONFIG)
    if record.files is not None:
        return found + file_findings(folder, record.files)
    weights = folder / WEIGHTS
    if not weights.is_file():
        return found + Findings([f"{WEIGHTS}: is missing"])
    differs = [] if sha256_of(weights) == record.sha256 else [f"{WEIGHTS}: is damaged or was exchanged"]
    return found + Findings(differs) + file_findings(folder, None, [PROVENANCE])
