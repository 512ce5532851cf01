"""Read what `moce pipeline` left of its stages: OUT/pipeline/stages.json and a record of each stage that was begun."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_ds.errors import MoceError
from moce_ds.storage.checksums import Findings, document_findings, has_checksum, read_checked, written_before
from moce_ds.storage.files import read_json

PIPELINE, STAGES = "pipeline", "stages.json"
_WHAT, _MADE_BY = "a pipeline's record", "moce pipeline"


@dataclass(frozen=True)
class StagesRecord:
    """`stages.json`: the stages in order, and what each makes; what lies in OUT relative to it."""

    makes: dict[str, list[str]]


def read_stages(out: Path) -> dict[str, tuple[str, list[str]]]:
    """State ("waiting", "begun", "done", "failed") and products of every stage, in order. Raises ArtefactError."""
    if not (out / PIPELINE / STAGES).exists():
        return {path.stem: (_state(out, path.stem), []) for path in sorted((out / PIPELINE).glob("*.json"))}
    record = read_checked(out / PIPELINE / STAGES, StagesRecord, _WHAT, _MADE_BY)
    return {name: (_state(out, name), made) for name, made in record.makes.items()}


def pipeline_findings(out: Path, verify: Callable[[Path], Findings]) -> Findings:
    """What is wrong with the records of stages and, by `verify`, with what they made. Raises ArtefactError."""
    if not (out / PIPELINE / STAGES).exists():  # earlier versions did not write it, nor checksums into the records
        records = [read_json(path, "a stage's record", _MADE_BY) for path in (out / PIPELINE).glob("*.json")]
        lost = any(has_checksum(record) for record in records)
        return Findings(
            [f"{PIPELINE}/{STAGES}: is missing"] if lost else [], [] if lost else [written_before(PIPELINE)]
        )
    record = read_checked(out / PIPELINE / STAGES, StagesRecord, _WHAT, _MADE_BY)
    found, seen = Findings(), set[Path]()
    for name, made in record.makes.items():
        file = f"{PIPELINE}/{name}.json"
        try:
            state = _state(out, name)
        except MoceError as error:
            found += Findings([str(error)])
            continue
        if state == "waiting":
            all_there = all((out / place).exists() for place in made)
            found += Findings([f"{file}: is missing, and what the stage makes is there"] if all_there else [])
            continue
        found += document_findings(out / file, file)
        for place in made:
            if not (out / place).exists():
                found += Findings([f"{place}: is missing"] if state == "done" else [])
            elif out / place not in seen and (out / place).suffix != ".html":
                seen.add(out / place)
                found += _verified(out / place, place, verify)
    return found


def _verified(path: Path, name: str, verify: Callable[[Path], Findings]) -> Findings:
    try:
        return verify(path).below(name)
    except MoceError as error:
        return Findings([str(error)])


def _state(out: Path, name: str) -> str:
    path = out / PIPELINE / f"{name}.json"
    if not path.exists():
        return "waiting"
    return str(read_checked(path, dict[str, Any], "a stage's record", _MADE_BY).get("state"))
