"""The folder of a pipeline: the records of its stages, and their outputs.

out/
  pipeline/stages.json    the stages in order, with their outputs
  pipeline/NAME.json      the record of a started stage
  ...                     outputs of the stages: shards, runs, features, clusters, encoders, results.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.errors import MoceError
from moce_ds.common.storage.artefact import Artefact, Rows, is_marked, recognised, some_of
from moce_ds.common.storage.checksums import (
    Findings,
    document_findings,
    has_checksum,
    read_checked,
    write_checked,
    written_before,
)
from moce_ds.common.storage.encoder_folder import EncoderFolder, ExportFolder
from moce_ds.common.storage.files import read_json, writes_to
from moce_ds.data.clusters import Clusters
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.evaluation.results_file import RESULTS, ResultsFile

PIPELINE, STAGES = "pipeline", "stages.json"
_MADE_BY = "moce pipeline"
_MESSAGE = "told"  # key of the message in the record of a stage
_MADE: tuple[type[Artefact], ...] = (
    ShardSet, FeatureSet, Clusters, ExportFolder, RunFolder, EncoderFolder, ResultsFile,
)  # fmt: skip
"""The kinds of artefacts that stages make."""


@dataclass(frozen=True)
class StagesRecord:
    """`stages.json`: the stages in order, with their outputs; paths in OUT are relative to it."""

    makes: dict[str, list[str]]

    @classmethod
    def read(cls, out: Path) -> "StagesRecord | None":
        """The record in a pipeline's folder; None if an earlier version wrote the folder. Raises ArtefactError."""
        path = out / PIPELINE / STAGES
        return read_checked(path, cls, "a pipeline's record", _MADE_BY) if path.exists() else None

    def write(self, out: Path) -> None:
        """Replace the record in a pipeline's folder. Raises ArtefactError."""
        with writes_to(out):
            write_checked(out / PIPELINE / STAGES, asdict(self))


@dataclass(frozen=True)
class PipelineStageRecord:
    """OUT/pipeline/NAME.json: a stage and its state.

    Attributes:
        made_from: its commands, their settings, and digests of their inputs.
        at: time of the change to this state, ISO 8601.
        seconds: duration of the last start.
        message: the cause of a failure; has another key in the file.
    """

    made_from: dict[str, Any]
    at: str
    state: Literal["begun", "done", "failed"] = "begun"
    seconds: float = 0.0
    message: Annotated[str, Field(validation_alias=_MESSAGE)] = ""

    @classmethod
    def read(cls, path: Path) -> "PipelineStageRecord | None":
        """The record in a file; None if the stage has not started. Raises ArtefactError."""
        return read_checked(path, cls, "a stage's record", _MADE_BY) if path.exists() else None

    def write(self, path: Path) -> None:
        """Replace the record in a file. Raises ArtefactError."""
        content = asdict(self)
        content[_MESSAGE] = content.pop("message")
        with writes_to(path):
            write_checked(path, content)


@dataclass(frozen=True)
class PipelineFolder:
    """The folder of a pipeline on disk. The records of its stages are read on use."""

    kind: ClassVar[str] = "pipeline"
    marks: ClassVar[tuple[str, ...]] = (PIPELINE,)
    path: Path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is the folder of a pipeline."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path, /) -> "PipelineFolder":
        """The folder; nothing is read yet."""
        return cls(path)

    @property
    def makes(self) -> dict[str, list[str]]:
        """The outputs of each stage, in the order of the stages. Raises ArtefactError."""
        record = StagesRecord.read(self.path)
        if record is not None:
            return record.makes
        return {path.stem: [] for path in sorted((self.path / PIPELINE).glob("*.json"))}

    @property
    def made_from(self) -> dict[str, Any]:
        """What determines the output of each started stage. Raises ArtefactError."""
        return {name: record.get("made_from") for name in self.makes if (record := self._record(name)) is not None}

    def describe(self) -> Rows:
        """The stages with their states and outputs, and the results. Raises ArtefactError."""
        rows = {name: f"{self._state(name)}: {some_of(made)}" for name, made in self.makes.items()}
        return rows | (ResultsFile.open(self.path).describe() if (self.path / RESULTS).exists() else {})

    def verify(self) -> Findings:
        """Faults of the records of the stages and of their outputs; reads all files. Raises ArtefactError."""
        record = StagesRecord.read(self.path)
        if record is None:  # earlier versions did not write it, nor checksums into the records
            documents = [
                read_json(path, "a stage's record", _MADE_BY) for path in (self.path / PIPELINE).glob("*.json")
            ]
            lost = any(has_checksum(document) for document in documents)
            missing = [f"{PIPELINE}/{STAGES}: is missing"] if lost else []
            return Findings(missing, [] if lost else [written_before(PIPELINE)])
        found, seen = Findings(), set[str]()
        for name, made in record.makes.items():
            try:
                found += self._verified_stage(name, made, seen)
            except MoceError as error:
                found += Findings([str(error)])
        return found

    def _verified_stage(self, name: str, made: Sequence[str], seen: set[str]) -> Findings:
        """Faults of a stage's record and of its outputs, except those in `seen`, to which they are added."""
        file, state = f"{PIPELINE}/{name}.json", self._state(name)
        if state == "waiting":
            all_there = all((self.path / place).exists() for place in made)
            return Findings([f"{file}: is missing, but the outputs of the stage exist"] if all_there else [])
        found = document_findings(self.path / file, file)
        for place in made:
            path = self.path / place
            if not path.exists():
                found += Findings([f"{place}: is missing"] if state == "done" else [])
            elif str(path) not in seen and path.suffix != ".html":
                seen.add(str(path))
                try:
                    found += recognised(path, _MADE).open(path).verify().below(place)
                except MoceError as error:
                    found += Findings([str(error)])
        return found

    def _record(self, name: str) -> Mapping[str, Any] | None:
        path = self.path / PIPELINE / f"{name}.json"
        return read_checked(path, dict[str, Any], "a stage's record", _MADE_BY) if path.exists() else None

    def _state(self, name: str) -> str:
        """ "waiting", or what the stage's record says: "begun", "done" or "failed"."""
        record = self._record(name)
        return "waiting" if record is None else str(record.get("state"))
